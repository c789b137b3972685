"""The Falcon application: its routes with the objects they need, its middleware and its options."""

import threading
from typing import Any, cast

import falcon
import orjson
from falcon.media import JSONHandler
from prometheus_client import CollectorRegistry

from api.auth import Guard
from api.direct import Abort, Complete, DirectUploadById, NewDirectUpload
from api.files import File, Files
from api.health import Health, Ready
from api.jobs import Cancel, Detail, Jobs, RejectLines, Retry, Status
from api.limits import OpenJobsLimit, S3Calls, Slots
from api.metrics import Durations, Metrics
from api.openapi import Docs, OpenApi, Route
from api.operations import RefuseUnexpected
from api.problems import RequestIds, install
from api.queue import Pause, QueueNow, Resume, Workers
from api.submit import Batches, Process, ProcessMany
from api.uploads import FormUploads
from api.watch import Events, Watch
from engine.control.history import History
from engine.control.job_batches import JobBatches
from engine.control.queue import Queue
from engine.control.rejects import Rejects
from engine.control.store import Store
from engine.errors import NotFound
from engine.s3.direct import DirectUploads
from engine.s3.objects import Objects
from engine.settings import Settings

__all__ = ["create_app"]


def create_app(
    settings: Settings,
    store: Store,
    queue: Queue,
    objects: Objects,
    rejects: Rejects,
    uploads: DirectUploads,
    guard: Guard,
    durations: Durations,
    stopping: threading.Event,
) -> "falcon.App[Any, Any]":
    """Build the WSGI application; `stopping` is set when the process is to stop."""
    history, batches, place = History(store), JobBatches(store), f"{objects.bucket}:{store.data.name}"
    registry = CollectorRegistry()
    app = falcon.App(
        middleware=cast(
            "Any", [RequestIds(), durations, _WholePath(), guard, RefuseUnexpected(), S3Calls(_s3_calls(settings))]
        ),
    )
    app.req_options.strip_url_path_trailing_slash = False
    app.req_options.keep_blank_qs_values = True
    app.req_options.auto_parse_qs_csv = False
    json = JSONHandler(dumps=orjson.dumps, loads=orjson.loads)
    app.resp_options.media_handlers["application/json"] = json
    install(app)
    open_jobs = OpenJobsLimit(queue, settings.api_max_open_jobs)
    watch = Watch(queue, Slots(settings.api_max_watchers, 429, "waiting requests"), stopping)
    api = OpenApi()
    job, key = {"jobId": "Id of the job"}, {"fileKey": "Key of the object; may contain slashes"}
    upload = {"uploadId": "Id of the upload"}
    routes: list[Route] = [
        ("/upload", FormUploads(objects, uploads.recorded, stopping), {}),
        ("/uploads", NewDirectUpload(uploads), {}),
        ("/uploads/{upload_id}", DirectUploadById(uploads), upload),
        ("/uploads/{upload_id}/complete", Complete(uploads), upload),
        ("/uploads/{upload_id}/abort", Abort(uploads), upload),
        ("/files", Files(objects), {}),
        ("/files/{file_key:path}", File(objects, history), key),
        ("/process", ProcessMany(batches, objects, open_jobs, place), {}),
        ("/process/{file_key:path}", Process(queue, objects, open_jobs, place), key),
        ("/batches/{batch_id}", Batches(batches), {"batchId": "Id of the batch"}),
        ("/status/{job_id}", Status(watch), job),
        ("/jobs", Jobs(history), {}),
        ("/jobs/{job_id}", Detail(store, queue, history, watch), job),
        ("/jobs/{job_id}/events", Events(watch), job),
        ("/jobs/{job_id}/cancel", Cancel(queue), job),
        ("/jobs/{job_id}/retry", Retry(queue, open_jobs), job),
        (
            "/jobs/{job_id}/rejects",
            RejectLines(queue, rejects, Slots(settings.api_max_downloads, 429, "downloads")),
            job,
        ),
        ("/queue", QueueNow(queue, history), {}),
        ("/queue/pause", Pause(queue, history), {}),
        ("/queue/resume", Resume(queue, history), {}),
        ("/workers", Workers(store), {}),
        ("/metrics", Metrics(store, history, queue, durations, registry), {}),
        ("/healthz", Health(), {}),
        ("/readyz", Ready({"mongodb": store.ping, "s3": objects.check}), {}),
        ("/openapi.json", api, {}),
    ]
    for path, resource, _ in routes:
        _add(app, path, resource)
    docs = Docs()
    _add(app, "/docs", docs)
    _add(app, "/docs/{asset}", docs)
    api.describe(routes)
    return app


def _s3_calls(settings: Settings) -> int:
    """How many calls may wait for S3 at once: 3/4 of the threads that uploads, watchers and downloads leave."""
    others = settings.api_max_uploads + settings.api_max_watchers + settings.api_max_downloads
    return max(1, 3 * (settings.api_threads - others) // 4)


def _add(app: "falcon.App[Any, Any]", path: str, resource: Any) -> None:
    """Add a route. HEAD is handled like GET, under the same rules, except on event streams: nobody would close them."""
    if hasattr(resource, "on_get") and not isinstance(resource, Events):
        resource.on_head = resource.on_get
    app.add_route(path, resource)


class _WholePath:
    """Middleware: passes object keys on unchanged, however many slashes they have, and wherever."""

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Take the key from the raw path. Raises NotFound if it is not UTF-8: Falcon would turn it into another key."""
        if "file_key" in params:
            try:
                path = req.env["PATH_INFO"].encode("latin-1").decode()  # WSGI passes bytes as Latin-1
            except UnicodeDecodeError:
                raise NotFound(
                    "there is no such file, as its key is not UTF-8: send it as percent-encoded UTF-8"
                ) from None
            # Falcon ignores extra slashes before the first segment: they are not part of the key.
            params["file_key"] = path.lstrip("/").split("/", 1)[1]
