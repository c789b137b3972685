"""How far a range is confirmed while its batches finish out of order. Pure; the caller holds the lock."""

from collections import deque
from dataclasses import dataclass

from engine.model import Tally

__all__ = ["Watermark"]


@dataclass(slots=True)
class _Slot:
    end: int
    tally: Tally | None = None


class Watermark:
    """The offset below which every line is acknowledged, and the tally up to there.

    Args:
        confirmed: the offset in bytes at which the lease starts.
        tally: what earlier holders counted up to there.
    """

    __slots__ = ("_slots", "confirmed", "tally")

    def __init__(self, confirmed: int, tally: Tally) -> None:
        self.confirmed = confirmed
        self.tally = tally
        self._slots: deque[_Slot] = deque()

    def open(self, end: int) -> _Slot:
        """Record that a batch that ends at offset `end` is in flight; batches must be opened in file order."""
        slot = _Slot(end)
        self._slots.append(slot)
        return slot

    def close(self, slot: _Slot, tally: Tally) -> None:
        """Record that a batch is acknowledged; the mark advances past it once all batches before it are, too."""
        slot.tally = tally
        while self._slots and self._slots[0].tally is not None:
            first = self._slots.popleft()
            assert first.tally is not None
            self.confirmed = first.end
            self.tally += first.tally
