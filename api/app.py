"""The routes, and nothing else."""

from typing import Any, cast

import falcon
import orjson
from falcon.media import JSONHandler

from api.health import Health, Ready
from api.jobs import Cancel, Process, RejectLines, Retry, Status
from api.problems import RequestIds, install
from api.uploads import Uploads
from engine.objects import Objects
from engine.queue import Queue
from engine.rejects import Rejects
from engine.store import Store

__all__ = ["create_app"]


def create_app(store: Store, queue: Queue, objects: Objects, rejects: Rejects) -> "falcon.App[Any, Any]":
    """The WSGI application over these."""
    app = falcon.App(middleware=cast("Any", [RequestIds(), _WholePath()]))
    app.req_options.strip_url_path_trailing_slash = False
    json = JSONHandler(dumps=orjson.dumps, loads=orjson.loads)
    app.resp_options.media_handlers["application/json"] = json
    install(app)
    app.add_route("/upload", Uploads(objects))
    app.add_route("/process/{file_key:path}", Process(queue, objects))
    app.add_route("/status/{job_id}", Status(queue, rejects))
    app.add_route("/jobs/{job_id}/cancel", Cancel(queue))
    app.add_route("/jobs/{job_id}/retry", Retry(queue))
    app.add_route("/jobs/{job_id}/rejects", RejectLines(queue, rejects))
    app.add_route("/healthz", Health())
    app.add_route("/readyz", Ready(store, objects))
    return app


class _WholePath:
    """Middleware: keys come through as they are, with slashes of any number at any place."""

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Take the key from the path itself."""
        if "file_key" in params:
            params["file_key"] = req.path.removeprefix("/process/")
