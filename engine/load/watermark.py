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
        confirmed: where the lease starts, bytes.
        tally: what earlier holders counted up to there.
    """

    __slots__ = ("_slots", "confirmed", "tally")

    def __init__(self, confirmed: int, tally: Tally) -> None:
        self.confirmed = confirmed
        self.tally = tally
        self._slots: deque[_Slot] = deque()

    def open(self, end: int) -> _Slot:
        """A batch that ends at offset `end` is under way; batches open in the order of the file."""
        slot = _Slot(end)
        self._slots.append(slot)
        return slot

    def close(self, slot: _Slot, tally: Tally) -> None:
        """The batch is acknowledged: the mark rises over it as soon as all before it are, too."""
        slot.tally = tally
        while self._slots and self._slots[0].tally is not None:
            first = self._slots.popleft()
            assert first.tally is not None
            self.confirmed = first.end
            self.tally += first.tally
