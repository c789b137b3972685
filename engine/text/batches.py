"""Gathers lines into batches, capped by count and by bytes. Pure.

A batch is what one writer thread decodes and one unordered bulk write carries. The cap on bytes keeps the command, and
a reply in which an error quotes each document, within the server's limits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.text.lines import Block, Ends, Oversized

__all__ = ["Batch", "Batcher"]

NO_ENDS = np.empty(0, np.intp)

VALUE_BYTES: Final = 6
"""What a value, an array or an object counts in the weight of a batch, at least: its key, its type and its length in BSON. A
digit in an array has two bytes as text, and twelve as BSON."""

SAMPLED_BYTES: Final = 1021
"""One in so many bytes of a batch is looked at for its weight. A prime, since in `1,1,1` every second one is a comma."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Consecutive lines of one range.

    `offset` is the offset in the object of the first line's first byte, `end` that after the last terminator; `ordinal`
    is the first line's 0-based number within the range. `data` holds the lines with their newlines, and `ends` the
    position of each newline in it, or for a last line without one the position after its last byte. An oversized line
    is a batch of its own, with `data` and `ends` empty.
    """

    offset: int
    end: int
    ordinal: int
    data: bytes
    ends: Ends
    oversized: Oversized | None = None

    @property
    def count(self) -> int:
        """The number of lines."""
        return 1 if self.oversized is not None else len(self.ends)

    @property
    def terminated(self) -> bool:
        """Whether the last line ends in a newline."""
        return self.oversized is not None or int(self.ends[-1]) < len(self.data)

    @property
    def weight(self) -> int:
        """What the batch counts as, in bytes, among those in flight: its size, or more if its values are small, since they
        take many times their size once they are parsed, and as BSON."""
        sample = self.data[::SAMPLED_BYTES]
        values = SAMPLED_BYTES * (sample.count(b",") + sample.count(b"[") + sample.count(b"{"))
        return max(len(self.data), VALUE_BYTES * values)

    def start(self, position: int) -> int:
        """Where line `position` begins in `data`."""
        return int(self.ends[position - 1]) + 1 if position else 0

    def line(self, position: int) -> bytes:
        """Line `position` without its newline; a carriage return before that is still there."""
        return self.data[self.start(position) : int(self.ends[position])]


class Batcher:
    """Gathers lines until a batch is full.

    Args:
        max_lines: lines in a batch.
        max_bytes: bytes of lines in a batch, newlines included; a single longer line makes a batch of its own. After a
            batch that weighs more than its size, as many fewer are gathered.
        ordinal: the 0-based number, within the range, of the first line to come.
    """

    __slots__ = ("_bytes", "_ends", "_lines", "_max_bytes", "_offset", "_ordinal", "_pieces", "_room", "max_lines")

    def __init__(self, max_lines: int, max_bytes: int, ordinal: int = 0) -> None:
        self.max_lines = max_lines
        """Lines in a batch; may be changed between calls."""
        self._max_bytes = self._room = max_bytes
        self._ordinal = ordinal
        self._offset = 0
        self._pieces: list[memoryview] = []  # the lines gathered so far
        self._ends: list[Ends] = []  # their ends, counted from the first byte of the first piece
        self._lines = 0
        self._bytes = 0

    def add(self, block: Block | Oversized) -> Iterator[Batch]:
        """Take what the splitter returned; yields the batches that it fills. The iterator must be exhausted."""
        if isinstance(block, Oversized):
            yield from self.flush()
            yield Batch(block.offset, block.end, self._ordinal, b"", NO_ENDS, block)
            self._ordinal += 1
            return
        at, start = 0, block.start
        while at < len(block.ends):
            room = start + self._room - self._bytes  # the last newline must lie before this position
            fit = int(np.searchsorted(block.ends, room)) - at
            take = min(self.max_lines - self._lines, fit)
            if take <= 0 and not self._lines:
                take = 1  # longer than a batch may be: it goes alone
            if take > 0:
                if not self._lines:
                    self._offset = block.offset + start - block.start
                stop = min(int(block.ends[at + take - 1]) + 1, len(block.data))
                self._pieces.append(memoryview(block.data)[start:stop])
                self._ends.append(block.ends[at : at + take] + (self._bytes - start))
                self._lines += take
                self._bytes += stop - start
                at, start = at + take, stop
            if at < len(block.ends) or self._lines >= self.max_lines:
                yield from self.flush()

    def flush(self) -> Iterator[Batch]:
        """Yields the lines that are left as a batch, if there are any."""
        if not self._lines:
            return
        end = self._offset + self._bytes
        ends = self._ends[0] if len(self._ends) == 1 else np.concatenate(self._ends)
        batch = Batch(self._offset, end, self._ordinal, b"".join(self._pieces), ends)
        self._ordinal += self._lines
        self._room = self._max_bytes * len(batch.data) // batch.weight
        self._pieces, self._ends, self._lines, self._bytes = [], [], 0, 0
        yield batch
