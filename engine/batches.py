"""Lines into batches, capped by count and by bytes. Pure.

A batch is what one worker thread decodes and one unordered bulk write carries. The cap on bytes keeps a command, and
a reply in which every document is an error that quotes it, within what the server takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.lines import Block, Oversized

__all__ = ["Batch", "Batcher"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Lines of one range that follow each other.

    `offset` is that of the first line's first byte, `end` the one after the last terminator; `ordinal` is the first
    line's 0-based number within the range. An oversized line travels alone, with `lines` empty.
    """

    offset: int
    end: int
    ordinal: int
    lines: list[bytes]
    oversized: Oversized | None = None

    @property
    def terminated(self) -> bool:
        """Whether the last line ends in a newline."""
        return self.end == self.offset + sum(map(len, self.lines)) + len(self.lines)


class Batcher:
    """Gathers lines until a batch is full.

    Args:
        max_lines: lines in a batch.
        max_bytes: bytes of lines in a batch; a single longer line makes a batch of its own.
        ordinal: the number, within the range, of the first line to come.
    """

    __slots__ = ("_bytes", "_lines", "_max_bytes", "_offset", "_ordinal", "max_lines")

    def __init__(self, max_lines: int, max_bytes: int, ordinal: int = 0) -> None:
        self.max_lines = max_lines
        """Lines in a batch; may be changed between calls."""
        self._max_bytes = max_bytes
        self._ordinal = ordinal
        self._offset = 0
        self._lines: list[bytes] = []
        self._bytes = 0  # of the lines that wait, with their newlines

    def add(self, block: Block | Oversized) -> Iterator[Batch]:
        """Take what the splitter handed out; yields the batches that it fills. Exhaust the iterator."""
        if isinstance(block, Oversized):
            yield from self.flush()
            yield Batch(block.offset, block.end, self._ordinal, [], block)
            self._ordinal += 1
            return
        if not self._lines:
            self._offset = block.offset
        self._lines += block.lines
        self._bytes += block.end - block.offset
        if not block.terminated:
            yield from self.flush(terminated=False)
        while len(self._lines) >= self.max_lines or self._bytes >= self._max_bytes:
            yield self._cut()

    def flush(self, *, terminated: bool = True) -> Iterator[Batch]:
        """What is left, as batches. `terminated` false: the very last line has no newline."""
        while self._lines:
            batch = self._cut()
            if not self._lines and not terminated:
                batch = Batch(batch.offset, batch.end - 1, batch.ordinal, batch.lines)
            yield batch

    def _cut(self) -> Batch:
        lines = self._lines[: self.max_lines]
        size = sum(map(len, lines)) + len(lines)
        if size > self._max_bytes and len(lines) > 1:
            size = taken = 0
            for line in lines:
                if taken and size + len(line) + 1 > self._max_bytes:
                    break
                size += len(line) + 1
                taken += 1
            del lines[taken:]
        del self._lines[: len(lines)]
        self._bytes -= size
        batch = Batch(self._offset, self._offset + size, self._ordinal, lines)
        self._offset = batch.end
        self._ordinal += len(lines)
        return batch
