"""Uploads whose bytes go straight from the client to S3: a multipart upload, and a signed URL for each of its parts.

S3 holds the state of an upload; `uploads` in the control database only keeps what S3 does not report: the size of the
file and of its parts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from botocore.exceptions import ClientError

from engine.control.store import Document, Store, literals, translated
from engine.errors import Conflict, HeadraceError, NotFound, Refused, Transient
from engine.model import Source
from engine.s3.client import PART_TYPE, S3_ERRORS, code_of, s3_translated
from engine.s3.objects import Objects
from engine.s3.parts import MAX_PARTS
from engine.s3.replies import field, reply_translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client  # type stubs: installed for type checking only

__all__ = ["MAX_URLS", "DirectUploads", "Part", "Upload"]

MIN_PART_BYTES: Final = 5 * 1024 * 1024
MAX_PART_BYTES: Final = 5 * 1024**3
"""S3's limits on the size of a part; the last part may be smaller."""

MAX_URLS: Final = 1000
"""Signed URLs in one answer."""

URL_SECONDS: Final = 3600
"""How long a signed URL is valid."""

UNFINISHED_HOURS: Final = 24
"""An upload that is not completed within this time is aborted."""

SHOWN_SECONDS: Final = 1.0
"""How long `complete` looks for the object of an upload that S3 does not know, or whose parts are missing: SeaweedFS
drops upload and parts a moment before the object is visible."""

_PART_FIELDS: Final = ("PartNumber", "Size", "ETag", "LastModified")

SWEEP_UPLOADS: Final = 1000
"""Maximum number of uploads that one sweep aborts."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part that S3 holds: its 1-based number, its size in bytes, its ETag with quotes."""

    number: int
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload under way. `size` is that of the whole file in bytes, None if the client did not give it; `s3_id` is S3's
    name for the upload."""

    id: str
    s3_id: str
    key: str
    part_bytes: int
    size: int | None
    created_at: datetime

    @property
    def parts(self) -> int:
        """The maximum number of parts."""
        return MAX_PARTS if self.size is None else max(1, -(-self.size // self.part_bytes))

    def size_of(self, number: int) -> int | None:
        """The size in bytes that a part must have; None if the size of the file is unknown."""
        if self.size is None:
            return None
        return self.part_bytes if number < self.parts else self.size - (self.parts - 1) * self.part_bytes


class DirectUploads:
    """Uploads under way in one bucket.

    Args:
        store: the databases.
        client: made by `connect`.
        objects: of the same client; uploads go to its bucket.
        part_bytes: default size of a part; larger files get larger parts.
    """

    def __init__(self, store: Store, client: "S3Client", objects: Objects, part_bytes: int) -> None:
        self._uploads = store.uploads
        self._client = client
        self._objects = objects
        self._bucket = objects.bucket
        self._here = {"bucket": {"$in": [objects.bucket, None]}}
        self._part_bytes = part_bytes

    def begin(self, upload_id: str, key: str, size: int | None, part_bytes: int | None) -> Upload:
        """Start a multipart upload under `key`.

        Raises:
            Refused: S3 takes no parts of this size, or the file needs more of them than it takes.
        """
        chosen = part_bytes or max(self._part_bytes, -(-(size or 0) // MAX_PARTS))
        if not MIN_PART_BYTES <= chosen <= MAX_PART_BYTES:
            raise Refused(f"partBytes: S3 takes parts of {MIN_PART_BYTES} to {MAX_PART_BYTES} bytes")
        if size is not None and size > chosen * MAX_PARTS:
            raise Refused(
                f"partBytes: {size} bytes in parts of {chosen} are more than the {MAX_PARTS} parts that S3 takes"
            )
        with s3_translated(f"starting the upload of {key}"):
            made = self._client.create_multipart_upload(Bucket=self._bucket, Key=key, ContentType=PART_TYPE)
            upload = field(made, "UploadId", key)
        fields = {"key": key, "uploadId": upload, "size": size, "partBytes": chosen}
        try:
            self._record(upload_id, fields)
        except BaseException:
            # Without its record no sweep would ever find it.
            with suppress(*S3_ERRORS):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)
            raise
        return self.get(upload_id)

    def _record(self, name: str, fields: Document) -> None:
        changes = literals(fields | {"bucket": self._bucket}) | {"createdAt": "$$NOW"}
        with translated("starting an upload"):
            self._uploads.update_one({"_id": name}, [{"$set": changes}], upsert=True)

    def get(self, upload_id: str) -> Upload:
        """An upload under way. Raises NotFound."""
        return _upload(self._find(upload_id))

    def urls(self, upload: Upload, first: int, count: int) -> list[tuple[int, str]]:
        """Numbers and signed URLs of `count` parts from number `first` on, or fewer if the upload has fewer."""
        last = min(first + count - 1, upload.parts)
        where = {"Bucket": self._bucket, "Key": upload.key, "UploadId": upload.s3_id}
        with s3_translated(f"signing URLs for {upload.key}"):  # signing may refresh the credentials
            return [
                (
                    number,
                    self._client.generate_presigned_url(
                        "upload_part", Params=where | {"PartNumber": number}, ExpiresIn=URL_SECONDS
                    ),
                )
                for number in range(first, last + 1)
            ]

    def parts(self, upload: Upload) -> list[Part]:
        """The parts that S3 holds, by number. Raises NotFound if S3 does not know the upload.

        Some servers list a part twice that was sent twice: the one of the right size is returned, or else the latest.
        """
        parts: dict[int, tuple[tuple[bool, datetime], Part]] = {}
        marker = 0
        of = f"the parts of {upload.key}"
        with reply_translated(of), s3_translated(f"listing {of}"), _known(upload.id):
            while True:
                page: Any = self._client.list_parts(
                    Bucket=self._bucket, Key=upload.key, UploadId=upload.s3_id, PartNumberMarker=marker
                )
                for part in page.get("Parts", ()):
                    number, size, etag, modified = (field(part, name, of) for name in _PART_FIELDS)
                    rank = (size == upload.size_of(number), modified)
                    if number not in parts or rank >= parts[number][0]:
                        parts[number] = (rank, Part(number, size, etag))
                following = int(page.get("NextPartNumberMarker") or 0)
                if not page.get("IsTruncated") or following <= marker:
                    break
                marker = following
        return [parts[number][1] for number in sorted(parts)]

    def complete(self, upload_id: str) -> Source:
        """Make the object from the parts that S3 holds. Safe to repeat for a day: it returns the same object again.

        Raises:
            NotFound: the upload was aborted, or completed too long ago.
            Conflict: parts are missing or of the wrong size.
        """
        with translated("looking up an upload"):
            found = self._uploads.find_one({"_id": upload_id, **self._here})
        if found is None:
            raise _gone(upload_id)
        if done := found.get("done"):
            return Source(self._bucket, found["key"], done["etag"], "", done["size"])
        try:
            self._assemble(_upload(found))
        except (NotFound, Conflict):
            # S3 may have completed this upload although its answer, or the record of it, was lost. No other upload has
            # its key, so an object there proves it. Or another request is completing it now: SeaweedFS drops the parts
            # and the upload a moment before the object is visible.
            end = time.monotonic() + SHOWN_SECONDS
            while time.monotonic() < end:
                with suppress(NotFound):
                    return self._completed(found)
                time.sleep(0.05)
            raise
        return self._completed(found)

    def _completed(self, found: Document) -> Source:
        """The object of an upload, after recording that it exists. Raises NotFound if it does not."""
        source = self._objects.head(found["key"])
        done = {"done": {"etag": source.etag, "size": source.size}}
        with translated("recording a completed upload"):
            self._uploads.update_one({"_id": found["_id"]}, {"$set": done})
        return source

    def _assemble(self, upload: Upload) -> None:
        """Have S3 make the object from the parts. Raises NotFound if S3 no longer knows the upload, Conflict if the
        parts do not make up the file."""
        parts = self.parts(upload)
        _check_parts(upload, parts)
        with s3_translated(f"completing the upload of {upload.key}"), _known(upload.id):
            self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=upload.key,
                UploadId=upload.s3_id,
                MultipartUpload={"Parts": [{"PartNumber": part.number, "ETag": part.etag} for part in parts]},
            )

    @contextmanager
    def recorded(self, key: str, upload_id: str) -> Iterator[None]:
        """Record a multipart upload through the API while it is under way: if the process dies, `sweep` aborts it."""
        name = f"through {upload_id}"
        self._record(name, {"key": key, "uploadId": upload_id, "size": None, "partBytes": self._part_bytes})
        yield
        with suppress(HeadraceError):  # the object exists: a record left behind is swept
            self._forget(name)

    def abort(self, upload_id: str) -> None:
        """Abort an upload; S3 frees its parts.

        Raises:
            NotFound: there is no such upload.
            Conflict: S3 has completed it already, which is now recorded.
        """
        found = self._find(upload_id)
        self._free(found)
        # Some servers answer the same for a completed upload as for an aborted one.
        with suppress(NotFound):
            key = self._completed(found).key
            raise Conflict(f"upload {upload_id} was completed: its object is {key}")
        self._forget(upload_id)

    def sweep(self, goes_on: Callable[[], bool] = lambda: True) -> int:
        """Abort uploads that have been unfinished for a day; returns how many. One that S3 refuses to abort is left for
        the next day. Records of completed uploads are deleted after a day as well.

        Args:
            goes_on: called before each upload; if it returns False, the rest are left for the next sweep.

        Raises:
            Transient: S3 or the database does not answer; the rest are left for the next sweep.
        """
        old = {"$subtract": ["$$NOW", UNFINISHED_HOURS * 3_600_000]}
        due = {"$expr": {"$and": [{"$lt": ["$createdAt", old]}, {"$lt": ["$keptAt", old]}]}}  # a missing time is less
        with translated("looking for unfinished uploads"):
            # In one command: there may be tens of thousands of completed ones a day.
            self._uploads.delete_many({"done": {"$ne": None}} | due)
            found = list(self._uploads.find({"done": None} | due).sort("createdAt", 1).limit(SWEEP_UPLOADS))
        swept = 0
        for document in found:
            if not goes_on():
                break
            try:
                self._free(document)
                self._forget(document["_id"])
                swept += 1
            except Transient:
                raise
            except HeadraceError:
                with translated("recording an unfinished upload"):
                    self._uploads.update_one({"_id": document["_id"]}, [{"$set": {"keptAt": "$$NOW"}}])
        return swept

    def _free(self, found: Document) -> None:
        """Have S3 free the parts of an upload."""
        with s3_translated(f"aborting the upload of {found['key']}"), suppress(NotFound), _known(found["_id"]):
            # The sweep also finds uploads to a bucket that AWS_BUCKET_NAME named earlier.
            bucket = found.get("bucket", self._bucket)
            self._client.abort_multipart_upload(Bucket=bucket, Key=found["key"], UploadId=found["uploadId"])

    def _find(self, upload_id: str) -> Document:
        with translated("looking up an upload"):
            found = self._uploads.find_one({"_id": upload_id, "done": None, **self._here})
        if found is None:
            raise _gone(upload_id)
        return found

    def _forget(self, upload_id: str) -> None:
        with translated("deleting an upload's record"):
            self._uploads.delete_one({"_id": upload_id})


@contextmanager
def _known(upload_id: str) -> Iterator[None]:
    """Raises NotFound if S3 answers that it does not know the upload."""
    try:
        yield
    except ClientError as error:
        if code_of(error) in ("NoSuchUpload", "NoSuchBucket"):
            raise _gone(upload_id) from None
        raise


def _check_parts(upload: Upload, parts: Sequence[Part]) -> None:
    """Raises Conflict if parts are missing, not of the announced size, or too small for S3."""
    last = upload.parts if upload.size is not None else parts[-1].number if parts else 1
    if missing := sorted(set(range(1, last + 1)) - {part.number for part in parts}):
        raise Conflict(f"parts are missing: {_shown(missing)}; send them, then complete the upload again")
    if wrong := [part for part in parts if upload.size_of(part.number) not in (None, part.size)]:
        raise Conflict(
            f"parts are not as large as announced ({upload.part_bytes} bytes each, {upload.size} in all): "
            f"{_shown([f'{part.number} of {part.size}' for part in wrong])}; send them again, then complete the upload again"
        )
    if small := [part.number for part in parts[:-1] if part.size < MIN_PART_BYTES]:
        raise Conflict(
            f"parts are smaller than the {MIN_PART_BYTES} bytes that all but the last must have: {_shown(small)}; send "
            "larger ones"
        )


def _shown(items: Sequence[object]) -> str:
    """The first ten items, for a message."""
    return ", ".join(map(str, items[:10])) + (" …" if len(items) > 10 else "")


def _gone(upload_id: str) -> NotFound:
    return NotFound(
        f"there is no upload {upload_id[:64]!r} under way: it was completed or aborted, or never started here"
    )


def _upload(found: Document) -> Upload:
    return Upload(found["_id"], found["uploadId"], found["key"], found["partBytes"], found["size"], found["createdAt"])
