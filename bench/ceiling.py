"""The ceiling: documents already in BSON, sent over raw connections by a program that does nothing else.

What the database can take: the same documents with `_id`s of the same form, 1000 per command, unordered, `w: majority`.
`python -m bench.ceiling FILE [CONNECTIONS]` runs it alone, against MONGO_URI.
"""

import argparse
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import bson
import orjson
from bson import ObjectId
from pymongo import MongoClient
from pymongo.errors import PyMongoError

__all__ = ["BATCH_RECORDS", "batches", "send"]

_HEADER: Final = struct.Struct("<iiii")
_OP_MSG: Final = 2013

BATCH_RECORDS: Final = 1000
MAX_BATCH_BYTES: Final = 40_000_000
"""Below the 48 million bytes that MongoDB accepts in one message."""

TAG: Final = b"\0\0\0\0\0\1"
"""The first six bytes of every `_id`; the offset is the other six."""


def batches(lines: Iterable[bytes]) -> list[bytes]:
    """The lines as BSON documents with an `_id` made from their offset, concatenated batch by batch."""
    found: list[bytes] = []
    batch: list[bytes] = []
    offset = size = 0
    for line in lines:
        document = bson.encode({"_id": ObjectId(TAG + offset.to_bytes(6, "big")), **orjson.loads(line)})
        if len(batch) == BATCH_RECORDS or size + len(document) > MAX_BATCH_BYTES:
            found.append(b"".join(batch))
            batch, size = [], 0
        batch.append(document)
        size += len(document)
        offset += len(line)
    return [*found, b"".join(batch)] if batch else found


def send(host: str, port: int, database: str, collection: str, work: list[bytes], connections: int) -> float:
    """Send the batches over `connections` parallel connections; returns the wall time in seconds."""
    body = bson.encode({"insert": collection, "ordered": False, "writeConcern": {"w": "majority"}, "$db": database})
    todo = iter(work)
    lock = threading.Lock()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with socket.create_connection((host, port)) as line:
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while True:
                    with lock:
                        batch = next(todo, None)
                    if batch is None:
                        return
                    _insert(line, body, batch)
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(connections)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return time.perf_counter() - began


def _insert(line: socket.socket, body: bytes, batch: bytes) -> None:
    section = b"\1" + struct.pack("<i", 4 + 10 + len(batch)) + b"documents\0"
    size = 16 + 4 + 1 + len(body) + len(section) + len(batch)
    line.sendall(b"".join((_HEADER.pack(size, 1, 0, _OP_MSG), b"\0\0\0\0\0", body, section, batch)))
    (length,) = struct.unpack("<i", _exactly(line, 4))
    reply = bson.decode(_exactly(line, length - 4)[12 + 4 + 1 :])
    if reply.get("ok") != 1 or "writeErrors" in reply or "writeConcernError" in reply:
        raise RuntimeError(f"the database refused a batch: {str(reply)[:300]}")


def _exactly(line: socket.socket, size: int) -> bytes:
    pieces: list[bytes] = []
    while size:
        piece = line.recv(size)
        if not piece:
            raise ConnectionError("the database closed the connection")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def main() -> None:
    """Fill the collection `ceiling` and print the rate."""
    parser = argparse.ArgumentParser(prog="python -m bench.ceiling", description=__doc__)
    parser.add_argument("file", type=Path, help="lines of JSON objects")
    parser.add_argument("connections", type=int, nargs="?", default=3, choices=range(1, 65), metavar="connections")
    given = parser.parse_args()
    uri = os.environ.get("MONGO_URI")
    if not uri:
        parser.error("MONGO_URI is not set: let it name the replica set to fill")
    try:
        with given.file.open("rb") as file:
            lines = list(file)
        work = batches(lines)
    except OSError as error:
        parser.error(f"{given.file}: {error.strerror}")
    except (TypeError, ValueError) as error:
        parser.error(f"{given.file} has a line that is no JSON object: {error}")
    try:
        client: MongoClient[dict[str, Any]] = MongoClient(uri)
        client.drop_database("headrace_ceiling")
        primary = client.primary
    except PyMongoError as error:
        parser.error(f"MONGO_URI: {str(error)[:300]}")
    if primary is None:
        parser.error("MONGO_URI names no replica set")
    seconds = send(*primary, "headrace_ceiling", "ceiling", work, given.connections)
    print(f"{len(lines):,} documents in {seconds:.2f} s: {len(lines) / seconds:,.0f} a second")


if __name__ == "__main__":
    main()
