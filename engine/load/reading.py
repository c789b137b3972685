"""Reads a range: fetches its bytes, cuts them into lines, and gathers these into batches."""

import time
from collections.abc import Generator
from typing import Final

from engine.control.stats import Stats
from engine.errors import Transient
from engine.load.retries import TRIES, back_off
from engine.load.run import Run
from engine.s3.objects import Objects
from engine.steps import Step, reach
from engine.text.batches import Batch, Batcher
from engine.text.lines import Splitter

__all__ = ["Reading"]

BEYOND_BYTES: Final = 64 * 1024
"""Bytes past the end of its range that the first request covers, so that the last line rarely needs a second one."""


class Reading:
    """Reads ranges of objects, `read_bytes` at a time."""

    def __init__(self, objects: Objects, stats: Stats, read_bytes: int) -> None:
        self._objects = objects
        self._stats = stats
        self._read_bytes = read_bytes

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
        stop = min(source.size, end + BEYOND_BYTES)
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
                with self._objects.open(source, at, stop) as reader:
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
