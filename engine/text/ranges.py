"""Cut an object into byte ranges. Pure arithmetic: no I/O, no state."""

from engine.model import ByteRange

__all__ = ["count", "cut"]


def count(size: int, range_bytes: int) -> int:
    """How many ranges an object of `size` bytes is cut into, none larger than `range_bytes`; 0 for an empty one."""
    if size < 0 or range_bytes < 1:
        raise ValueError(f"size {size} must not be negative and range_bytes {range_bytes} must be positive")
    return -(-size // range_bytes)


def cut(size: int, of: int, index: int) -> ByteRange:
    """Range `index` when `size` bytes are cut into `of` ranges.

    Their sizes differ by at most one byte: with a short last range, workers that have full ones would finish after it.
    """
    return ByteRange(index, size * index // of, size * (index + 1) // of)
