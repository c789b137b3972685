"""Reads a range: fetches its bytes, cuts them into lines, and gathers these into batches."""

import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from engine.control.stats import Stats
from engine.errors import Transient
from engine.load.retries import TRIES, back_off
from engine.load.run import Run
from engine.s3.objects import Objects, RangeReader
from engine.steps import Step, reach
from engine.text.batches import Batch, Batcher
from engine.text.lines import Splitter, first_byte

__all__ = ["Reading"]

BEYOND_BYTES: Final = 64 * 1024
"""Bytes past the end of its range that the first request covers, so that the last line rarely needs a second one."""


class Reading:
    """Reads ranges of objects, `read_bytes` at a time."""

    def __init__(self, objects: Objects, stats: Stats, read_bytes: int) -> None:
        self._objects = objects
        self._stats = stats
        self._read_bytes = read_bytes
        self._requests = ThreadPoolExecutor(1, thread_name_prefix="request")
        self._requested: tuple[Run, Future[RangeReader]] | None = None

    def close(self) -> None:
        """Let the thread end, without waiting for it."""
        self._requests.shutdown(wait=False, cancel_futures=True)

    def request(self, run: Run) -> None:
        """Ask S3 for the bytes of the next run before it begins, so that it does not wait for the first of them.

        `batches` of this run takes the answer, and sends the request again if it was in vain. If the run does not get
        that far, `forget` must be called.
        """
        source, lease = run.job.source, run.lease
        if lease.confirmed < lease.range.end:
            start, stop = first_byte(lease.confirmed), _stop(source.size, lease.range.end)
            self._requested = run, self._requests.submit(self._objects.open, source, start, stop)

    def forget(self, run: Run) -> None:
        """Drop the answer for a run that was asked for ahead, if it has not been used; does not wait for it."""
        if (answer := self._take(run)) is not None and not answer.cancel():
            answer.add_done_callback(_drop)

    def _take(self, run: Run) -> Future[RangeReader] | None:
        if self._requested is None or self._requested[0] is not run:
            return None
        answer, self._requested = self._requested[1], None
        return answer

    def _open(self, run: Run, start: int, stop: int) -> RangeReader:
        # If an earlier request hangs, and the thread with it, this one has not been sent and can be cancelled.
        if (answer := self._take(run)) is not None and not answer.cancel():
            with suppress(Transient):
                return answer.result()
        return self._objects.open(run.job.source, start, stop)

    def batches(self, run: Run, splitter: Splitter, batcher: Batcher) -> Generator[Batch, None, None]:
        """The batches of a run in file order, up to the end of its range or until it is told to end.

        Raises:
            Transient: a read failed `TRIES` times without a byte of progress.
            Permanent: the object is gone, was overwritten, or may not be read.
        """
        for chunk in self._chunks(run, splitter):
            began = time.perf_counter()
            blocks = splitter.feed(chunk)
            self._stats.add(seconds_split=time.perf_counter() - began)
            for block in blocks:
                yield from batcher.add(block)
        if splitter.position >= run.job.source.size:
            for block in splitter.finish():
                yield from batcher.add(block)
        elif not splitter.done:
            return  # told to end: the splitter may hold half a line
        yield from batcher.flush()

    def _chunks(self, run: Run, splitter: Splitter) -> Generator[bytes, None, None]:
        """The object's bytes from where the splitter starts until it is done, the object ends or the run is to end."""
        source, end = run.job.source, run.lease.range.end
        at = splitter.read_from
        stop = _stop(source.size, end)
        tries = 0
        if at == 0 and run.head:
            at = len(run.head)
            yield run.head
        while not splitter.done and at < source.size:
            if at >= stop:
                # The last line is longer: request ever more, so that a line of gigabytes takes few requests.
                stop = min(source.size, at + max(2 * (stop - end), BEYOND_BYTES))
            try:
                run.move()
                began = time.perf_counter()
                with self._open(run, at, stop) as reader:
                    self._stats.add(seconds_read=time.perf_counter() - began)
                    while not splitter.done and not run.told_to_end():
                        began = time.perf_counter()
                        chunk = reader.read(self._read_bytes, run.move)
                        self._stats.add(seconds_read=time.perf_counter() - began)
                        if not chunk:
                            break
                        at += len(chunk)
                        tries = 0
                        run.move()
                        reach(Step.READ)
                        yield chunk
            except Transient:
                tries += 1
                self._stats.add(retries=1)
                if tries >= TRIES:
                    raise
                self._stats.add(seconds_backoff=back_off(run, tries))
            if run.told_to_end():
                return


def _drop(answer: Future[RangeReader]) -> None:
    if not answer.exception():
        answer.result().drop()


def _stop(size: int, end: int) -> int:
    """Where the first request for a range that ends at `end` stops, in an object of `size` bytes."""
    return min(size, end + BEYOND_BYTES)
