"""POST /upload: a form's file, streamed to S3 in parallel parts at constant memory."""

import re
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import quote

import falcon
from falcon.media.multipart import BodyPart, MultipartForm, MultipartParseError
from ulid import ULID

from api.answers import UploadAnswer
from api.limits import LEAVE, gone_of
from api.models import FileForm
from api.operations import Answer, Scope, check_form, not_a_form, operation
from api.problems import Problem
from api.views import stored_file
from engine.model import Source
from engine.s3.objects import Objects
from engine.s3.parts import Recorded, Stream
from engine.settings import Settings

__all__ = ["FormUploads", "key_for", "location_of", "reduced", "spool_fault"]

MAX_NAME_LENGTH: Final = 200
"""Most characters of a file's name that its key keeps."""

MAX_EXTENSION_LENGTH: Final = 20
"""Longest extension: anything longer after the last dot of a name is not one."""

MISSING: Final = "the form has no part named `file`: send the file in one"
HEADER: Final = 'Content-Disposition: form-data; name="file"; filename="..."'


def reduced(name: str) -> str:
    """A file's name reduced to letters, digits, dot, dash and underscore; never empty.

    The extension is kept, since it determines the format, even if nothing is left of the name before it.
    """
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    stem, dot, extension = name.rpartition(".")
    stem, extension = (_plain(stem), _plain(extension)) if dot else (_plain(name), "")
    if not extension or len(extension) > MAX_EXTENSION_LENGTH:
        return _plain(name)[:MAX_NAME_LENGTH] or "file"
    return f"{stem[-max(MAX_NAME_LENGTH - len(extension) - 1, 1) :].lstrip('._-') or 'file'}.{extension}"


def _plain(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")


def key_for(name: str) -> str:
    """A new, unique key; keys sort by the time at which they were made."""
    return f"{ULID()}-{reduced(name)}"


def location_of(key: str) -> str:
    """The path of an object in this API."""
    return f"/files/{quote(key)}"


def spool_fault(settings: Settings) -> str | None:
    """Why bodies cannot be spooled; None if they can."""
    try:
        with tempfile.TemporaryFile(dir=settings.api_spool_dir):
            return None
    except OSError as error:
        where = settings.api_spool_dir or "unset"
        return f"API_SPOOL_DIR={where} accepts no files ({error.strerror}): use a folder that does"


class FormUploads:
    """POST /upload.

    Args:
        objects: the bucket that files go to.
        recorded: makes the context within which a multipart upload is unfinished.
        stopping: set when the process is to stop; uploads under way are then given up.
    """

    def __init__(self, objects: Objects, recorded: Recorded, stopping: threading.Event) -> None:
        self._objects = objects
        self._recorded = recorded
        self._stopping = stopping

    @operation(
        summary="Upload a file",
        group="uploads",
        scope=Scope.SUBMIT,
        body=FileForm,
        body_media="multipart/form-data",
        answers={201: Answer("The file was stored", UploadAnswer, headers={"Location": "Its path"})},
        errors=(415, 503),
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """201 with the key that the file was stored under."""
        check_form(req.content_type)
        try:
            if not req.content_length:
                raise Problem(400, "missing_file", MISSING)
            try:
                form: MultipartForm = req.get_media()
            except falcon.HTTPUnsupportedMediaType:
                raise not_a_form() from None  # its parameters exclude the type itself, as `q=0` does
            stored = self._store(form, gone_of(req))
        except (MultipartParseError, falcon.HTTPBadRequest) as error:
            detail = error.description or "the form cannot be read"
            raise Problem(400, "malformed_form", f"{detail}: send a complete multipart/form-data body") from None
        except UnicodeDecodeError:
            detail = "a header in the form is not UTF-8: send the names of parts and files in UTF-8, all else in ASCII"
            raise Problem(400, "malformed_form", detail) from None
        except ValueError:
            detail = "the form cannot be read: send a complete multipart/form-data body"
            raise Problem(400, "malformed_form", detail) from None
        finally:
            if leave := req.env.get(LEAVE):
                leave()
        resp.status = 201
        resp.location = location_of(stored.key)
        resp.media = stored_file(stored)

    def _store(self, form: MultipartForm, gone: Callable[[], bool]) -> Source:
        parts = iter(form)

        def go_on() -> None:
            """Raises Problem if the client has gone, as nobody would know the key, or if the server is stopping."""
            if gone():
                raise Problem(499, "client_gone", "the client has left before the file was stored")
            if self._stopping.is_set():
                raise Problem(503, "stopping", "the server is stopping: send the file again")

        def complete() -> None:
            _finish(parts)
            go_on()

        part = next(parts, None)
        if part is None:
            raise Problem(400, "missing_file", MISSING)
        _check_is_file(part)
        stored = self._objects.upload(_Watched(part.stream, go_on), key_for(_name(part)), complete, self._recorded)
        if gone():
            self._objects.delete(stored.key)
            go_on()
        return stored


class _Watched:
    """A stream that calls `go_on` before each read: it raises if nobody waits for the upload any longer."""

    def __init__(self, stream: Stream, go_on: Callable[[], None]) -> None:
        self._stream = stream
        self._go_on = go_on

    def read(self, size: int = -1, /) -> bytes:
        self._go_on()
        return self._stream.read(size)


def _name(part: BodyPart) -> str:
    try:
        return part.filename or ""
    except (MultipartParseError, UnicodeDecodeError, LookupError):
        return ""


def _check_is_file(part: BodyPart) -> None:
    """Raises Problem for any other part: job options that are sent along would be silently ignored."""
    if not part.name:
        raise Problem(400, "missing_file", f"{MISSING}, whose header is `{HEADER}` (mind the blanks)")
    if part.name != "file":
        raise Problem(
            422,
            "invalid_request",
            f"{part.name[:MAX_NAME_LENGTH]!r}: the form takes only a part named `file`: send the options of a job to "
            "POST /process",
        )
    if part.content_type.lower().startswith("multipart/"):
        # RFC 7578, 4.3, deprecates this; its headers and boundaries would be stored as lines of the file.
        raise Problem(400, "two_files", "the part named `file` is itself multipart: send one file per form")


def _finish(parts: Iterator[BodyPart]) -> None:
    """Read the form to its final boundary: otherwise one that was cut short in transit would look complete."""
    for part in parts:
        if not part.name:
            raise Problem(400, "malformed_form", "the form has a part without a name: send one part, named `file`")
        _check_is_file(part)
        raise Problem(400, "two_files", "the form has two parts named `file`: send one file per form")
