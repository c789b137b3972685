"""Direct uploads: the API signs URLs, and the client PUTs the parts to S3 itself."""

from collections.abc import Sequence
from typing import Final

import falcon
from ulid import ULID

from api.answers import DirectUpload, UploadAnswer
from api.models import PartsQuery, UploadBegin
from api.operations import Answer, Scope, Wait, body_of, operation, query_of
from api.uploads import key_for, location_of
from api.views import stored_file
from engine.s3.client import PART_TYPE
from engine.s3.direct import DirectUploads, Part, Upload

__all__ = ["Abort", "Complete", "DirectUploadById", "NewDirectUpload"]

URLS_AT_FIRST: Final = 100
"""Signed URLs in the answer that starts an upload."""


def _upload_body(upload: Upload, urls: Sequence[tuple[int, str]], stored: Sequence[Part]) -> DirectUpload:
    return {
        "uploadId": upload.id,
        "fileKey": upload.key,
        "size": upload.size,
        "partBytes": upload.part_bytes,
        "parts": upload.parts,
        # SeaweedFS gzips what looks like text unless each part has this type.
        "headers": {"Content-Type": PART_TYPE},
        "urls": [{"partNumber": number, "url": url} for number, url in urls],
        "stored": [{"partNumber": p.number, "size": p.size, "etag": p.etag.strip('"')} for p in stored],
    }


class NewDirectUpload:
    """POST /uploads."""

    def __init__(self, uploads: DirectUploads) -> None:
        self._uploads = uploads

    @operation(
        waits_for_s3=Wait.BRIEF,
        summary="Start an upload whose parts the client sends straight to S3",
        group="uploads",
        scope=Scope.SUBMIT,
        body=UploadBegin,
        answers={
            201: Answer(
                "The upload, with signed URLs of its first parts", DirectUpload, headers={"Location": "Its path"}
            )
        },
        errors=(422,),
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """201 with the upload."""
        request = body_of(req, UploadBegin)
        upload = self._uploads.begin(str(ULID()), key_for(request.file_name), request.size, request.part_bytes)
        resp.status = 201
        resp.location = f"/uploads/{upload.id}"
        resp.media = _upload_body(upload, self._uploads.urls(upload, 1, URLS_AT_FIRST), ())


class DirectUploadById:
    """GET and DELETE /uploads/{uploadId}."""

    def __init__(self, uploads: DirectUploads) -> None:
        self._uploads = uploads

    @operation(
        waits_for_s3=Wait.BRIEF,
        summary="An upload under way: the parts that S3 has, and signed URLs",
        group="uploads",
        scope=Scope.SUBMIT,
        query=PartsQuery,
        answers={200: Answer("The upload", DirectUpload)},
        errors=(404, 422),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response, upload_id: str) -> None:
        """200 with the parts that S3 has, and signed URLs for `count` parts from number `first` on."""
        query = query_of(req, PartsQuery)
        upload = self._uploads.get(upload_id)
        resp.cache_control = ["no-store"]
        urls = self._uploads.urls(upload, query.first, query.count)
        resp.media = _upload_body(upload, urls, self._uploads.parts(upload))

    @operation(
        waits_for_s3=Wait.BRIEF,
        summary="Abort an upload",
        group="uploads",
        scope=Scope.SUBMIT,
        answers={204: Answer("The upload and its parts are gone")},
        errors=(404, 409),
    )
    def on_delete(self, req: falcon.Request, resp: falcon.Response, upload_id: str) -> None:
        """204."""
        self._uploads.abort(upload_id)
        resp.status = 204


class Complete:
    """POST /uploads/{uploadId}/complete."""

    def __init__(self, uploads: DirectUploads) -> None:
        self._uploads = uploads

    @operation(
        waits_for_s3=Wait.LONG,
        summary="Complete an upload: turn its parts into an object",
        group="uploads",
        scope=Scope.SUBMIT,
        answers={201: Answer("The file was stored", UploadAnswer, headers={"Location": "Its path"})},
        errors=(404, 409),
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response, upload_id: str) -> None:
        """201 with the key; 409, which names them, if parts are missing or have the wrong size."""
        source = self._uploads.complete(upload_id)
        resp.status = 201
        resp.location = location_of(source.key)
        resp.media = stored_file(source)


class Abort:
    """POST /uploads/{uploadId}/abort."""

    def __init__(self, uploads: DirectUploads) -> None:
        self._uploads = uploads

    @operation(
        waits_for_s3=Wait.BRIEF,
        summary="Abort an upload",
        group="uploads",
        scope=Scope.SUBMIT,
        answers={204: Answer("The upload and its parts are gone")},
        errors=(404, 409),
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response, upload_id: str) -> None:
        """204."""
        self._uploads.abort(upload_id)
        resp.status = 204
