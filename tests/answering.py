"""A client of the HTTP API whose requests the test itself answers. No servers."""

import httpx

from api.client import Client


def client_of(answer):
    """A client of the API; `answer` is called with each request and returns the response."""
    client = Client("http://api")
    client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(answer))
    return client


def problem(status, kind):
    """An error response with a problem of type `kind`."""
    told = {"type": f"urn:headrace:problem:{kind}", "detail": f"it is {kind}"}
    return httpx.Response(status, headers={"X-Request-ID": "r"}, json=told)
