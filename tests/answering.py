"""An HTTP API that answers as a test says, and a client of it."""

import httpx

from api.client import Client


def client_of(answer):
    """A client whose requests `answer` answers."""
    client = Client("http://api")
    client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(answer))
    return client


def problem(status, kind):
    """An answer that tells of a problem of this kind."""
    told = {"type": f"urn:headrace:problem:{kind}", "detail": f"it is {kind}"}
    return httpx.Response(status, headers={"X-Request-ID": "r"}, json=told)
