"""The objects of the bucket: list, show, delete."""

import falcon

from api.answers import FileDetail, FilePage
from api.models import FilesQuery
from api.operations import Answer, Scope, Wait, operation, query_of
from api.submit import checked_key
from api.views import job_status, moment
from engine.control.history import History
from engine.errors import Conflict
from engine.s3.objects import Objects

__all__ = ["File", "Files"]

JOBS_SHOWN = 20


class Files:
    """GET /files."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    @operation(
        waits_for_s3=Wait.BRIEF,
        summary="The objects in the bucket, by key",
        group="files",
        scope=Scope.READ,
        query=FilesQuery,
        answers={200: Answer("A page of objects", FilePage)},
        errors=(422,),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 with a page."""
        query = query_of(req, FilesQuery)
        page, after = self._objects.page(query.prefix, query.limit, query.cursor)
        body: FilePage = {
            "bucket": self._objects.bucket,
            "files": [
                {"fileKey": o.key, "size": o.size, "etag": o.etag.strip('"'), "modifiedAt": moment(o.modified)}
                for o in page
            ],
            "next": after,
        }
        resp.media = body


class File:
    """GET and DELETE /files/{fileKey}."""

    def __init__(self, objects: Objects, history: History) -> None:
        self._objects = objects
        self._history = history

    @operation(
        waits_for_s3=Wait.BRIEF,
        summary="An object and its latest jobs",
        group="files",
        scope=Scope.READ,
        answers={200: Answer("The object", FileDetail)},
        errors=(404,),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response, file_key: str) -> None:
        """200 with the object's size, ETag and jobs."""
        source = self._objects.head(checked_key(file_key))
        body: FileDetail = {
            "fileKey": source.key,
            "size": source.size,
            "etag": source.etag.strip('"'),
            "jobs": [job_status(job) for job in self._history.page(JOBS_SHOWN, key=source.key, bucket=source.bucket)],
        }
        resp.media = body

    @operation(
        waits_for_s3=Wait.BRIEF,
        summary="Delete an object that no open job needs",
        group="files",
        scope=Scope.ADMIN,
        answers={204: Answer("It was deleted")},
        errors=(404, 409),
    )
    def on_delete(self, req: falcon.Request, resp: falcon.Response, file_key: str) -> None:
        """204; the documents that were loaded from it stay."""
        key = checked_key(file_key)
        if (job := self._history.open_job_of(self._objects.bucket, key)) is not None:
            raise Conflict(f"job {job.id} is {job.state} and reads {key}: cancel it first, or wait until it ends")
        self._objects.delete(key)
        resp.status = 204
