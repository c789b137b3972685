"""Chunks of bytes in, whole lines out: the one place that knows which range owns which line.

The rule: a range owns the lines whose first byte lies in it. A line ends at a newline byte, or at the end of the
object. So a range that starts at `start > 0` is read from `start - 1`, everything through the first newline is
dropped, and reading continues past `end` until the last owned line is complete. For any bytes and any cut into ranges,
the ranges together yield exactly the lines of the object, each once.

The splitter is a state machine without I/O: it is fed chunks of any size, in order. It holds at most one unfinished
line, and only the head of a line over the limit. Lines are not copied: a block refers to its chunk and lists where each
line ends. A `bytes` object per line would cost as much as all the rest.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["HEAD_BYTES", "LONG_LINE_BYTES", "Block", "Ends", "Oversized", "Splitter", "first_byte"]

HEAD_BYTES = 64 * 1024
"""How much of an oversized line is kept, for its reject."""

LONG_LINE_BYTES = 2048
"""From this average length on, lines are handled one by one; shorter ones many at a time."""

FEW_LINES = 16
"""Up to this many lines, newlines are searched for one by one, however short the lines are."""

NEWLINE = ord("\n")

Ends = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Consecutive lines.

    `data` holds them from position `start` on, and `ends` the position of each line's newline in it, or for a last line
    of the object without one the position after its last byte. A carriage return before a newline is still there.
    `offset` is the offset in the object of the first line's first byte.
    """

    offset: int
    data: bytes
    start: int
    ends: Ends


@dataclass(frozen=True, slots=True)
class Oversized:
    """A line over the limit, which was skipped. `length` excludes the terminator; `end` is the offset after it."""

    offset: int
    length: int
    head: bytes
    end: int


def _newlines(data: bytes, start: int, stop: int) -> Ends:
    """The positions of all newlines in `data[start:stop]`."""
    found: list[int] = []
    at = data.find(b"\n", start, stop)
    while at >= 0:
        found.append(at)
        if at - start < LONG_LINE_BYTES * (len(found) - FEW_LINES):
            # A search for each newline would cost more than a scan of every byte.
            return np.flatnonzero(np.frombuffer(data, np.uint8, stop - start, start) == NEWLINE) + start
        at = data.find(b"\n", at + 1, stop)
    return np.array(found, np.intp)


def first_byte(start: int) -> int:
    """The offset from which a range that starts at `start` is read."""
    return max(start - 1, 0)


class Splitter:
    """Splits the bytes of one range into the lines that it owns.

    Args:
        start, end: the range in bytes, `end` exclusive. To resume, `start` may be the first byte of any line.
        max_line_bytes: a longer line, its terminator not counted, comes out as `Oversized`.

    Feed it the object's bytes from `read_from` on until `done` turns true, or call `finish()` when the object ends.
    """

    __slots__ = ("_carried", "_carry", "_dropping", "_end", "_last", "_line", "_max", "done", "position", "read_from")

    def __init__(self, start: int, end: int, max_line_bytes: int) -> None:
        self.read_from = first_byte(start)
        """Offset of the first byte to feed."""
        self.done = start >= end
        """Whether every owned line has been returned; further bytes are ignored."""
        self._end = end
        self._max = max_line_bytes
        self.position = self.read_from
        """Offset of the next byte to feed."""
        self._dropping = start > 0
        self._line = start  # offset of the first byte of the unfinished line
        self._carry: list[bytes] = []  # its bytes so far; only its head, once over the limit
        self._carried = 0  # the number of its bytes so far, whether kept or not
        self._last = b""  # its last byte so far

    def feed(self, data: bytes) -> list[Block | Oversized]:
        """Take the next bytes of the object; returns what they complete, in order. Ignored once `done`."""
        if self.done or not data:
            return []
        base = self.position
        self.position += len(data)
        start = 0
        if self._dropping:
            newline = data.find(b"\n")
            if newline < 0:
                # A line after a newline at `end - 1` or later belongs to another range.
                self.done = self.position >= self._end - 1
                return []
            self._dropping = False
            start = newline + 1
            self._line = base + start
            if self._line >= self._end:
                self.done = True
                return []
        return self._split(data, start, base)

    def _split(self, data: bytes, start: int, base: int) -> list[Block | Oversized]:
        """The lines that end in `data` from position `start` on; `base` is the offset of its position 0."""
        # The last owned line is the one that holds byte end - 1: it ends at the first newline from there on.
        last = self._end - 1 - base
        newline = data.find(b"\n", max(last, start)) if last < len(data) else -1
        self.done = newline >= 0
        stop = (newline if self.done else data.rfind(b"\n", start)) + 1
        out: list[Block | Oversized] = []
        if stop > start:
            ends = _newlines(data, start, stop)
            if self._carried:
                first = int(ends[0])
                self._keep(data[start:first])
                out.append(self._take(terminated=True))
                start, ends = first + 1, ends[1:]
                self._line = base + start
            if len(ends):
                out += self._blocks(data, start, ends)
                self._line = base + stop
        if not self.done and max(stop, start) < len(data):
            self._keep(data[max(stop, start) :])
        return out

    def _blocks(self, data: bytes, start: int, ends: Ends) -> list[Block | Oversized]:
        """Terminated lines, the first at offset `self._line`, as one block, or as several around oversized lines."""
        # No line is longer than all of them together, which mostly saves checking each.
        if int(ends[-1]) - start <= self._max:
            return [Block(self._line, data, start, ends)]
        out: list[Block | Oversized] = []
        base = self._line - start
        done = 0  # lines that are in `out`
        for index in np.flatnonzero(np.diff(ends, prepend=start - 1) - 1 > self._max).tolist():
            begin, end = int(ends[index - 1]) + 1 if index else start, int(ends[index])
            length = end - begin - (data[end - 1 : end] == b"\r")
            if length <= self._max:
                continue
            if index > done:
                out.append(Block(base + start, data, start, ends[done:index]))
            out.append(Oversized(base + begin, length, data[begin : begin + min(length, HEAD_BYTES)], base + end + 1))
            done, start = index + 1, end + 1
        if done < len(ends):
            out.append(Block(base + start, data, start, ends[done:]))
        return out

    def _keep(self, piece: bytes) -> None:
        # A carriage return may still turn out to belong to the terminator, hence one byte over the limit.
        if self._carried <= self._max + 1 or self._carried < HEAD_BYTES:
            self._carry.append(piece)
            if self._carried + len(piece) > max(self._max + 1, HEAD_BYTES):
                self._carry = [b"".join(self._carry)[:HEAD_BYTES]]
        self._carried += len(piece)
        if piece:
            self._last = piece[-1:]

    def _take(self, *, terminated: bool) -> Block | Oversized:
        """The unfinished line, which is now complete."""
        line, carried = b"".join(self._carry), self._carried
        length = carried - (terminated and self._last == b"\r")
        self._carry, self._carried, self._last = [], 0, b""
        if length > self._max:
            return Oversized(self._line, length, line[: min(length, HEAD_BYTES)], self._line + carried + terminated)
        return Block(self._line, line + b"\n" if terminated else line, 0, np.array([len(line)], np.intp))

    def finish(self) -> list[Block | Oversized]:
        """The object ends here: returns its last line if that has no newline. `done` is true afterwards."""
        if self.done:
            return []
        self.done = True
        return [] if self._dropping or not self._carried else [self._take(terminated=False)]
