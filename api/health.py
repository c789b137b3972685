"""Is the process alive, and do MongoDB and S3 answer it?"""

import falcon

from api.answers import Health as Told
from api.operations import Answer, operation
from engine.errors import HeadraceError
from engine.objects import Objects
from engine.store import Store

__all__ = ["Health", "Ready"]


class Health:
    """GET /healthz: this process answers; nothing else is touched."""

    @operation(
        summary="Whether this process answers",
        group="health",
        scope=None,
        answers={200: Answer("It does", Told)},
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 always."""
        resp.media = {"status": "ok"}


class Ready:
    """GET /readyz: whether MongoDB and S3 answer."""

    def __init__(self, store: Store, objects: Objects) -> None:
        self._checks = {"mongodb": store.ping, "s3": objects.check}

    @operation(
        summary="Whether MongoDB and S3 answer",
        group="health",
        scope=None,
        answers={200: Answer("Both do", Told), 503: Answer("One does not, and which", Told)},
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 when both answer, else 503 that says which does not."""
        told: dict[str, str] = {}
        for name, check in self._checks.items():
            try:
                check()
                told[name] = "ok"
            except HeadraceError as error:
                told[name] = str(error)
                resp.status = 503
        resp.media = {"status": "ready" if resp.status_code == 200 else "not ready", **told}
