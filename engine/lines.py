"""Chunks of bytes in, whole lines out: the one place that knows which range owns which line.

The rule: a range owns the lines whose first byte lies in it. A line ends at a newline byte, or at the end of the
object. So a range that starts at `start > 0` is read from `start - 1`, everything through the first newline is
dropped, and reading goes on past `end` until the last owned line is whole. For any bytes and any cut into ranges, the
ranges together yield exactly the lines of the object, each once.

This is a machine without I/O: it is fed chunks of any size, in order, and never asks for one. It holds no more than
one unfinished line, and of a line over the limit no more than a head.
"""

from dataclasses import dataclass

__all__ = ["HEAD_BYTES", "Block", "Oversized", "Splitter"]

HEAD_BYTES = 64 * 1024
"""How much of an oversized line is kept, for its reject."""


@dataclass(frozen=True, slots=True)
class Block:
    """Lines that follow each other.

    `offset` is that of the first line's first byte, `end` the one after the last terminator. The lines carry no
    newline, but a carriage return before it is still there. Each is followed by one newline byte, except the last one
    when `terminated` is false (the object ends there).
    """

    offset: int
    end: int
    lines: list[bytes]
    terminated: bool = True


@dataclass(frozen=True, slots=True)
class Oversized:
    """A line over the limit, which was skipped. `length` excludes the terminator; `end` is the offset after it."""

    offset: int
    length: int
    head: bytes
    end: int


class Splitter:
    """Splits the bytes of one range into the lines that it owns.

    Args:
        start, end: the range, bytes; `end` exclusive. To resume, `start` is any line's first byte.
        max_line_bytes: a longer line, its terminator not counted, comes out as `Oversized`.

    Feed it the object's bytes from `read_from` on until `done` turns true, or call `finish()` where the object ends.
    """

    __slots__ = ("_carried", "_carry", "_dropping", "_end", "_last", "_line", "_max", "done", "position", "read_from")

    def __init__(self, start: int, end: int, max_line_bytes: int) -> None:
        self.read_from = max(start - 1, 0)
        """Offset of the first byte to feed."""
        self.done = start >= end
        """Every owned line has been handed out; further bytes are of no use."""
        self._end = end
        self._max = max_line_bytes
        self.position = self.read_from
        """Offset of the next byte to feed."""
        self._dropping = start > 0
        self._line = start  # first byte of the line under way
        self._carry: list[bytes] = []  # what of it has been fed; a head, once over the limit
        self._carried = 0  # bytes of it that have been fed, whether kept or not
        self._last = b""  # the last byte of it

    def feed(self, data: bytes) -> list[Block | Oversized]:
        """Take the next bytes of the object; returns what they complete, in order. Ignored once `done`."""
        if self.done or not data:
            return []
        base = self.position
        self.position += len(data)
        if self._dropping:
            newline = data.find(b"\n")
            if newline < 0:
                # A newline at `end - 1` or later starts a line that the next range owns.
                self.done = self.position >= self._end - 1
                return []
            self._dropping = False
            self._line = base = base + newline + 1
            if self._line >= self._end:
                self.done = True
                return []
            data = data[newline + 1 :]
        return self._split(data, base)

    def _split(self, data: bytes, base: int) -> list[Block | Oversized]:
        # The last owned line is the one that holds byte end - 1: it ends at the first newline from there on.
        newline = data.find(b"\n", max(self._end - 1 - base, 0)) if self._end - 1 < base + len(data) else -1
        if newline >= 0:
            self.done = True
            data = data[: newline + 1]
        if b"\n" not in data:
            self._keep(data)
            return []
        lines = data.split(b"\n")
        tail = lines.pop()
        out: list[Block | Oversized] = []
        if self._carried:
            self._keep(lines[0])
            first = self._take(terminated=True)
            if isinstance(first, Oversized):
                out.append(first)
                del lines[0]
                self._line = first.end
            else:
                lines[0] = first
        if lines:
            out.extend(self._blocks(lines, base + len(data) - len(tail)))
        if tail:
            self._keep(tail)
        return out

    def _blocks(self, lines: list[bytes], end: int) -> list[Block | Oversized]:
        """Terminated lines from `self._line` to `end` as one block, or more where oversized ones stand between them."""
        # No line is longer than all of them together, which mostly saves a look at each.
        if end - self._line <= self._max or max(map(len, lines)) <= self._max:
            block = Block(self._line, end, lines)
            self._line = end
            return [block]
        out: list[Block | Oversized] = []
        run: list[bytes] = []
        at = self._line
        for line in lines:
            length = len(line) - line.endswith(b"\r")
            after = self._line + len(line) + 1
            if length <= self._max:
                run.append(line)
            else:
                if run:
                    out.append(Block(at, self._line, run))
                    run = []
                out.append(Oversized(self._line, length, line[: min(length, HEAD_BYTES)], after))
                at = after
            self._line = after
        if run:
            out.append(Block(at, end, run))
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

    def _take(self, *, terminated: bool) -> bytes | Oversized:
        """The line under way, now whole."""
        line, carried = b"".join(self._carry), self._carried
        length = carried - (terminated and self._last == b"\r")
        self._carry, self._carried, self._last = [], 0, b""
        if length <= self._max:
            return line
        return Oversized(self._line, length, line[: min(length, HEAD_BYTES)], self._line + carried + terminated)

    def finish(self) -> list[Block | Oversized]:
        """The object ends here: returns its last line where that has no newline. `done` is true afterwards."""
        if self.done:
            return []
        self.done = True
        if self._dropping or not self._carried:
            return []
        last = self._take(terminated=False)
        return (
            [last]
            if isinstance(last, Oversized)
            else [Block(self._line, self._line + len(last), [last], terminated=False)]
        )
