"""Storing streams of any length as objects, in constant memory and parallel parts."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from engine.errors import HeadraceError
from engine.model import Source
from engine.s3.client import PART_TYPE, S3_ERRORS, s3_translated
from engine.s3.replies import field

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client  # type stubs: installed for type checking only

__all__ = ["MAX_PARTS", "Parts", "Recorded", "Stream"]

MAX_PARTS: Final = 10_000
"""S3's limit on the parts of one multipart upload."""

Recorded = Callable[[str, str], AbstractContextManager[None]]
"""Makes a context from an object's key and the id of a multipart upload to it."""


class Stream(Protocol):
    """Anything that bytes can be read from."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; b"" at the end."""
        ...


class Parts:
    """Sends the parts of all uploads.

    Args:
        client: made by `connect`.
        bucket: its name.
        part_bytes: size of a part; S3 takes at most `MAX_PARTS` of them.
        parallel: parts in flight at a time, over all uploads.
        head: returns the current version of an object.
    """

    def __init__(
        self, client: "S3Client", bucket: str, part_bytes: int, parallel: int, head: Callable[[str], Source]
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._part_bytes = part_bytes
        self._head = head
        # Limits the parts in memory, however many uploads there are.
        self._room = threading.Semaphore(parallel)
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="part")

    def store(self, stream: Stream, key: str, before_complete: Callable[[], None], recorded: Recorded) -> None:
        """Store a stream under `key`; the arguments are those of `Objects.upload`."""
        with self._room:
            first = _exactly(stream, self._part_bytes)
            whole = len(first) < self._part_bytes
            if whole:
                before_complete()
                with s3_translated(f"storing {key}"):
                    self._client.put_object(Bucket=self._bucket, Key=key, Body=first, ContentType=PART_TYPE)
        if not whole:
            stream = _Pushed(first, stream)
            del first  # else it stays in memory until the last part is sent
            self._in_parts(stream, key, before_complete, recorded)

    def _in_parts(self, stream: Stream, key: str, before_complete: Callable[[], None], recorded: Recorded) -> None:
        with s3_translated(f"storing {key}"):
            made = self._client.create_multipart_upload(Bucket=self._bucket, Key=key, ContentType=PART_TYPE)
            upload = field(made, "UploadId", key)
            try:
                with recorded(key, upload):
                    parts = self._send(stream, key, upload)
                    before_complete()
                    self._complete(key, upload, parts)
            except BaseException:
                # A failure to abort must not replace the original error.
                with suppress(*S3_ERRORS):
                    self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)
                raise

    def _complete(self, key: str, upload: str, parts: list[Any]) -> None:
        """Have S3 make the object from its parts; if the answer is lost, check whether it did."""
        try:
            self._client.complete_multipart_upload(
                Bucket=self._bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except S3_ERRORS:
            with suppress(HeadraceError):
                if self._head(key).etag.strip('"') == _etag_of(parts):
                    return
            raise

    def _send(self, stream: Stream, key: str, upload: str) -> list[Any]:
        broken = threading.Event()

        def send(number: int, data: bytes) -> dict[str, Any]:
            try:
                if broken.is_set():
                    return {}
                sent = self._client.upload_part(
                    Bucket=self._bucket, Key=key, UploadId=upload, PartNumber=number, Body=data
                )
                return {"PartNumber": number, "ETag": field(sent, "ETag", f"part {number} of {key}")}
            except BaseException:
                broken.set()
                raise
            finally:
                self._room.release()

        futures: list[Future[dict[str, Any]]] = []
        try:
            while not broken.is_set():
                self._room.acquire()
                try:
                    if not (data := _exactly(stream, self._part_bytes)):
                        self._room.release()
                        break
                    futures.append(self._pool.submit(send, len(futures) + 1, data))
                except BaseException:
                    self._room.release()
                    raise
                del data
            return [future.result() for future in futures]
        except BaseException:
            broken.set()
            raise
        finally:
            wait(futures)  # no part may be in flight when the upload is completed or aborted


class _Pushed:
    """A stream whose first part was already read and comes before the rest."""

    def __init__(self, part: bytes, rest: Stream) -> None:
        self._part = part
        self._rest = rest

    def read(self, size: int = -1, /) -> bytes:
        part, self._part = self._part, b""
        return part or self._rest.read(size)


def _exactly(stream: Stream, size: int) -> bytes:
    """Exactly `size` bytes; fewer only at the end of the stream."""
    pieces: list[bytes] = []
    while size > 0 and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _etag_of(parts: list[Any]) -> str:
    """The ETag of an object made from these parts: the MD5 of their MD5s, and their number; "" if it is unknown."""
    digests = "".join(part["ETag"].strip('"') for part in parts)
    try:
        return f"{hashlib.md5(bytes.fromhex(digests), usedforsecurity=False).hexdigest()}-{len(parts)}"
    except ValueError:
        return ""  # the ETag of an encrypted part is not its MD5
