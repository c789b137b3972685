"""POST /upload: a form's file, streamed to S3 in parallel parts at constant memory."""

import re
import unicodedata
from typing import Final

import falcon
from falcon.media.multipart import BodyPart, MultipartForm, MultipartParseError
from ulid import ULID

from api.answers import UploadAnswer
from api.limits import Slots
from api.models import FileForm
from api.operations import Answer, Scope, operation
from api.problems import Problem
from engine.model import Source
from engine.objects import Objects

__all__ = ["Uploads", "key_for", "reduced"]

NAME_MOST: Final = 200
"""Characters of a file's name that its key keeps."""

REST_BYTES: Final = 256 * 1024


def reduced(name: str) -> str:
    """A file's name reduced to letters, digits, dot, dash and underscore; never empty."""
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")
    if len(plain) > NAME_MOST:
        # The end is kept, since the extension tells the format.
        plain = plain[-NAME_MOST:].lstrip("._-")
    return plain or "file"


def key_for(name: str) -> str:
    """A key that nobody has used: keys sort by the time of their making."""
    return f"{ULID()}-{reduced(name)}"


class Uploads:
    """POST /upload."""

    def __init__(self, objects: Objects, slots: Slots) -> None:
        self._objects = objects
        self._slots = slots

    @operation(
        summary="Upload a file",
        group="uploads",
        scope=Scope.SUBMIT,
        body=FileForm,
        body_media="multipart/form-data",
        answers={201: Answer("The file was stored", UploadAnswer)},
        errors=(415, 503),
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """201 with the key that the file was stored under."""
        kind = (req.content_type or "").split(";", 1)[0].strip().lower()
        if kind != "multipart/form-data":
            raise Problem(415, "not_a_form", "send the file as multipart/form-data, in a part named `file`")
        self._slots.take()
        try:
            form: MultipartForm = req.get_media()
            stored = self._store(form)
        except (MultipartParseError, falcon.HTTPBadRequest) as error:
            detail = error.description or "the form cannot be read"
            raise Problem(400, "malformed_form", f"{detail}: send multipart/form-data, complete to its end") from None
        except (UnicodeDecodeError, ValueError) as error:
            raise Problem(400, "malformed_form", f"the form cannot be read ({type(error).__name__})") from None
        finally:
            self._slots.give()
        resp.status = 201
        told: UploadAnswer = {
            "message": "File uploaded successfully",
            "fileKey": stored.key,
            "size": stored.size,
            "etag": stored.etag.strip('"'),
        }
        resp.media = told

    def _store(self, form: MultipartForm) -> Source:
        parts = iter(form)
        for part in parts:
            if part.name == "file":
                return self._objects.upload(part.stream, key_for(_name(part)), before_complete=lambda: _finish(parts))
        raise Problem(400, "missing_file", "the form has no part named `file`: send the file in one")


def _name(part: BodyPart) -> str:
    try:
        return part.filename or ""
    except (MultipartParseError, UnicodeDecodeError, LookupError):
        return ""


def _finish(parts: "object") -> None:
    """Read the form to its final boundary: one that was cut short in transit otherwise reads as whole."""
    for part in parts:  # type: ignore[attr-defined]
        if part.name == "file":
            raise Problem(400, "two_files", "the form has two parts named `file`: send one file a form")
        while part.stream.read(REST_BYTES):
            pass
