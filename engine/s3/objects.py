"""Objects of one bucket: looking one up, ranged reads of one pinned version of it, uploads and listings.

Every read carries `If-Match`, so two versions of an object are never mixed, and every answer is checked to be the range
that was asked for.
"""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from engine.errors import (
    AccessDenied,
    HeadraceError,
    NotFound,
    ObjectChanged,
    ObjectGone,
    TokenExpired,
    Transient,
    WrongClock,
)
from engine.logs import get_logger
from engine.model import Source
from engine.s3.client import code_of, s3_translated, status_of, translate
from engine.s3.parts import Parts, Recorded, Stream
from engine.s3.replies import LOOK, field, reply_translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client  # type stubs: installed for type checking only

__all__ = [
    "Listed",
    "Objects",
    "RangeReader",
    "warn_if_away",
]

log = get_logger()

DRAIN_BYTES: Final = 256 * 1024
"""An answer with no more than this left is read to its end, so that its connection can be reused."""

SLICE_BYTES: Final = 256 * 1024
"""Maximum bytes read between two signs of life; halved each time a read takes longer than `SLICE_SECONDS`."""

FIRST_SLICE_BYTES: Final = 16 * 1024
SLICE_SECONDS: Final = 1.0

_LISTING: Final = frozenset(("Name", "MaxKeys", "KeyCount", "IsTruncated", "Contents"))
"""Elements of a listing; even an empty one has some of them."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An object as it is listed: `etag` with its quotes, `size` in bytes."""

    key: str
    size: int
    etag: str
    modified: datetime


class RangeReader:
    """One answer to a ranged GET. Use it as a context manager."""

    def __init__(self, answer: Any, key: str, start: int, stop: int) -> None:
        self._body = answer["Body"]
        self._key = key
        self._at = start
        self._stop = stop
        self._slice = FIRST_SLICE_BYTES

    def read(self, size: int, moved: Callable[[], None] = lambda: None) -> bytes:
        """Exactly `size` bytes unless the range ends before; b"" at its end.

        `moved` is called as bytes arrive: from a slow server, all of them may take longer than a worker may be silent.

        Raises:
            Transient: the answer broke off, or nothing arrived within the read timeout.
        """
        size = min(size, self._stop - self._at)
        if size <= 0:
            return b""
        pieces: list[bytes] = []
        left = size
        try:
            while left > 0:
                began = time.monotonic()
                if not (piece := self._body.read(min(left, self._slice))):
                    break
                pieces.append(piece)
                left -= len(piece)
                moved()
                quick = time.monotonic() - began < SLICE_SECONDS
                self._slice = min(2 * self._slice, SLICE_BYTES) if quick else max(self._slice // 2, 1)
        except (BotoCoreError, HTTPError, OSError) as error:
            raise Transient(f"reading {self._key} broke off at byte {self._at} ({type(error).__name__})") from error
        if left > 0:
            raise Transient(f"reading {self._key} broke off at byte {self._at + size - left}: the answer was too short")
        self._at += size
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Return the connection to the pool, or drop it if much is left to read, or what is left arrives slowly."""
        try:
            if self._stop - self._at <= DRAIN_BYTES:
                while self._at < self._stop and self._slice >= FIRST_SLICE_BYTES:
                    self._slice = FIRST_SLICE_BYTES  # a slow read halves it, which ends the loop
                    self.read(FIRST_SLICE_BYTES)
        except Transient:
            pass
        # Once it is read to its end, the connection has returned to the pool by itself.
        if self._at < self._stop:
            self.drop()

    def drop(self) -> None:
        """Close the connection, whatever is left to read."""
        self._body.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Transient):
            self.drop()
        else:
            self.close()


class Objects:
    """The objects of one bucket.

    Args:
        client: made by `connect`.
        bucket: its name.
        part_bytes: size of a part of an upload; S3 takes at most `MAX_PARTS` of them.
        parallel: parts in flight at a time, over all uploads.
    """

    def __init__(self, client: "S3Client", bucket: str, part_bytes: int = 8 * 1024 * 1024, parallel: int = 4) -> None:
        self._client = client
        self.bucket = bucket
        self._parts = Parts(client, bucket, part_bytes, parallel, self.head)

    def head(self, key: str) -> Source:
        """The current version of the object, pinned.

        Raises:
            NotFound, AccessDenied, WrongClock, Transient.
        """
        with reply_translated(key), s3_translated(f"looking up {key}"):
            try:
                found = self._client.head_object(Bucket=self.bucket, Key=key)
            except ClientError as error:
                if status_of(error) in (400, 403):
                    self._tell_why(key)
                # SeaweedFS and others answer 400 to keys that no object can have, such as a/../b.
                if status_of(error) in (400, 404):
                    raise NotFound(f"there is no object {key!r} in bucket {self.bucket}: check its key") from None
                raise
        version = found.get("VersionId", "")
        etag, size = field(found, "ETag", key), field(found, "ContentLength", key)
        return Source(self.bucket, key, etag, "" if version == "null" else version, size)

    def _tell_why(self, key: str) -> None:
        """Raises what is wrong with the credentials or the clock, as a GET reports it: a HEAD's answer has no body."""
        try:
            self._client.get_object(Bucket=self.bucket, Key=key, Range="bytes=0-0")["Body"].close()
        except ClientError as error:
            cause = translate(error, f"looking up {key}")
            if isinstance(cause, AccessDenied | TokenExpired | WrongClock):
                raise cause from error

    def open(self, source: Source, start: int, stop: int) -> RangeReader:
        """Start reading bytes `start` to `stop` (exclusive) of the version that `source` pins.

        Raises:
            ObjectGone, ObjectChanged, AccessDenied: final.
            Transient, WrongClock: may be retried.
        """
        version = {"VersionId": source.version} if source.version else {}
        with reply_translated(source.key), s3_translated(f"reading {source.key}"):
            try:
                answer = self._client.get_object(
                    Bucket=source.bucket,
                    Key=source.key,
                    Range=f"bytes={start}-{stop - 1}",
                    IfMatch=source.etag,
                    **version,  # type: ignore[arg-type]
                )
            except ClientError as error:
                status = status_of(error)
                if status == 412 or status == 416:
                    raise ObjectChanged(
                        f"{source.key} was overwritten after the job was submitted: submit a new job for the new "
                        "version"
                    ) from None
                if status == 404 and code_of(error) != "NoSuchBucket":
                    raise ObjectGone(
                        f"{source.key} was deleted after the job was submitted: upload it again and submit a new job"
                    ) from None
                if status == 403 and code_of(error) == "AccessDenied" and version:
                    raise AccessDenied(
                        f"S3 does not allow reading {source.key} by its version: give these credentials s3:GetObjectVersion, "
                        "which a bucket with versions needs besides s3:GetObject"
                    ) from None
                raise
        reader = RangeReader(answer, source.key, start, stop)
        content_range = answer.get("ContentRange", "")
        try:
            etag, size = field(answer, "ETag", source.key), field(answer, "ContentLength", source.key)
        except Transient:
            reader.drop()
            raise
        if etag != source.etag:
            reader.drop()
            raise ObjectChanged(f"{source.key} was overwritten after the job was submitted: submit a new job")
        if content_range != f"bytes {start}-{stop - 1}/{source.size}" or size != stop - start:
            reader.drop()
            raise Transient(
                f"S3 answered a request for bytes {start}-{stop - 1} of {source.key} with {content_range or 'the whole object'!r}"
            )
        return reader

    def upload(
        self,
        stream: Stream,
        key: str,
        before_complete: Callable[[], None] = lambda: None,
        recorded: Recorded = lambda key, upload_id: nullcontext(),
    ) -> Source:
        """Store a stream of any length under `key`, in constant memory and parallel parts.

        Args:
            stream: read to its end.
            key: a new one. An existing object is overwritten and, if the upload fails, deleted.
            before_complete: called when every byte has been read, before the object is made; if it raises, there will
                be no object.
            recorded: makes a context that is held while S3 has an unfinished multipart upload.

        Raises:
            AccessDenied, WrongClock, Transient: nothing is left behind, provided that S3 can be reached.
        """
        try:
            self._parts.store(stream, key, before_complete, recorded)
            return self.head(key)
        except HeadraceError:
            # Perhaps only the answer was lost, and the object exists.
            with suppress(HeadraceError), s3_translated(f"deleting {key}"):
                self._client.delete_object(Bucket=self.bucket, Key=key)
            raise

    def page(self, prefix: str = "", limit: int = 1000, after: str | None = None) -> tuple[list[Listed], str | None]:
        """A page of the bucket's objects, by key, and the token of the next page; None at the end.

        Args:
            prefix: only keys that start with it.
            limit: maximum number of objects, up to 1000.
            after: the token that the previous page returned.

        Raises:
            AccessDenied, Refused, WrongClock, Transient.
        """
        more: dict[str, Any] = {"ContinuationToken": after} if after else {}
        listing = f"the listing of bucket {self.bucket}"
        with reply_translated(listing), s3_translated(f"listing bucket {self.bucket}"):
            page = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=limit, **more)
        if not _LISTING.intersection(page):
            raise Transient(f"S3's answer for {listing} is not a listing: {LOOK}")
        found = [_listed(told, listing) for told in page.get("Contents", ())]
        return found, field(page, "NextContinuationToken", listing) if page.get("IsTruncated") else None

    def delete(self, key: str) -> None:
        """Delete an object. Raises NotFound if there is none."""
        self.head(key)
        with s3_translated(f"deleting {key}"):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def check(self) -> None:
        """Raises a HeadraceError unless S3 answers and the bucket exists."""
        with s3_translated(f"checking bucket {self.bucket}"):
            try:
                self._head_bucket()
            except ClientError as error:
                if status_of(error) == 404:
                    raise NotFound(f"there is no bucket {self.bucket}: create it, or set AWS_BUCKET_NAME") from None
                raise

    def time(self) -> datetime:
        """The time by S3's clock, to the second."""
        with reply_translated("its time"), s3_translated("reading the time of S3"):
            answer = self._head_bucket()
            return parsedate_to_datetime(field(answer["ResponseMetadata"]["HTTPHeaders"], "date", "its time"))

    def _head_bucket(self) -> Any:
        try:
            return self._client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            if status_of(error) in (400, 403):
                self._client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)  # its error says why, unlike that of a HEAD
            raise

    def ensure_bucket(self) -> None:
        """Make the bucket if it is missing; for the embedded server only."""
        with s3_translated(f"creating bucket {self.bucket}"):
            try:
                self._client.create_bucket(Bucket=self.bucket)
            except ClientError as error:
                if code_of(error) not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
                    raise


def _listed(told: Any, listing: str) -> Listed:
    key = field(told, "Key", listing)
    of = f"{key} in {listing}"
    return Listed(key, field(told, "Size", of), field(told, "ETag", of), field(told, "LastModified", of))


def warn_if_away(objects: Objects) -> None:
    """Check in the background whether the bucket can be used, and log a warning if not: early, rather than when the
    first call fails."""

    def look() -> None:
        try:
            objects.check()
        except HeadraceError as error:
            log.warning("S3 cannot be used for now", action="start", cause=str(error))

    threading.Thread(target=look, name="s3-check", daemon=True).start()
