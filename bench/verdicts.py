"""The report's conclusions, in sentences: what a load waited for, whether memory is flat, whether a setting is faster.

Only the figures decide. If they are too few, or this machine was busy with something else, the sentence says so.
"""

from typing import Final

from bench import measure
from bench.figures import Spent, Spread

__all__ = ["MAX_MEMORY_MB", "UNKNOWN", "bottleneck", "fastest", "flat", "scaling", "shown"]

BUSY: Final = 0.9
"""Share of the cores' time from which on only fewer instructions make a load faster."""

MAX_MEMORY_MB: Final = 200
FLAT: Final = 1.15
"""Memory is flat if the highest peak is at most this many times the lowest."""

NOT_FREE: Final = 0.1
"""Share of the cores from which on other programs affect the figures."""

ROUNDS: Final = 3
"""Minimum for a verdict: in fewer rounds, one of several settings is faster in every round by chance."""

NOISY: Final = 0.1
"""If two runs with the defaults differ by more than this share, the rounds do not show which setting is faster."""


UNKNOWN: Final = "what else ran on this machine cannot be told under a CPU quota"


def flat(peaks: dict[int, int | None]) -> tuple[str, bool | None]:
    """The peaks (MB, by file size in bytes) in words, and whether they are low and flat; None if one is missing."""
    text = ", ".join(
        f"not measured at {size / 1e9:g} GB: needs {measure.room_for(size) / 1e9:.0f} GB free"
        if peak is None
        else f"{peak} at {size / 1e9:g} GB"
        for size, peak in peaks.items()
    )
    known = [peak for peak in peaks.values() if peak is not None]
    if known and max(known) >= MAX_MEMORY_MB:
        return text, False
    return text, max(known) <= FLAT * min(known) if len(known) == len(peaks) else None


def bottleneck(spent: Spent) -> str:
    """What a load waited for, with the figures that show it; and whether other programs affected them."""
    told = _waited_for(spent)
    if "everything else" not in spent.cpu:
        return f"{told}; {UNKNOWN}"
    others = spent.share(spent.cpu["everything else"])
    if others < NOT_FREE:
        return told
    return f"{told}; {100 * others:.0f} % went to what else ran: this machine was not idle, so this is inconclusive"


def _waited_for(spent: Spent) -> str:
    busy = spent.share(sum(spent.cpu.values()))
    if busy >= BUSY:
        shares = ", ".join(f"{name} {100 * spent.share(seconds):.0f}" for name, seconds in spent.cpu.items())
        return f"the cores, {100 * busy:.0f} % of whose time is taken: {shares}"
    detail = f"the cores are taken for {100 * busy:.0f} % of the time"
    stages = spent.stages
    read, stall, drain = stages["read"], stages["stall"], stages["drain"]
    if read > stall + drain:
        return (
            f"S3: for each line the reader waits {read:.1f} µs for it, and {stall + drain:.1f} µs until its lines are taken on "
            f"or written; {detail}"
        )
    if drain > stall:
        return (
            f"the ends of ranges: for each line the reader waits {drain:.1f} µs until all of a range is written, and "
            f"{stall:.1f} µs within it; {detail}"
        )
    # A worker's writers wait in parallel, but take turns at everything else: its interpreter runs one thread at a time.
    wait, work = stages["wait"] / spent.writers, stages["split"] + stages["decode"] + stages["encode"]
    detail = f"{wait:.1f} µs of a worker's time for each line beside {work:.1f} µs of its own work; {detail}"
    return (
        f"MongoDB: its answers take {detail}" if wait > work else f"the workers' CPU: MongoDB's answers take {detail}"
    )


def scaling(found: dict[str, tuple[float, Spent]]) -> list[str]:
    """What more processes gain over one, and what limits it; `found` has wall seconds and `Spent`, keyed as `SIZES`."""
    (one, _), *others = (found[name] for name in measure.SIZES)
    told = []
    for name, (wall, spent) in zip(list(measure.SIZES)[1:], others, strict=True):
        straight = 1 / sum(measure.SIZES[name])
        gained = f"{name}: {wall / one:.2f} of the time of one process, where a straight line has {straight:.2f}"
        told.append(f"{gained}." if wall / one <= 1.1 * straight else f"{gained}. What stops it: {bottleneck(spent)}.")
    return told


def fastest(ratios: dict[tuple[str, int], Spread], noise: float, others: float | None) -> str:
    """Whether any setting that was tried is faster than the defaults in every round, by more than the noise. Medians
    would not do: of several settings that are no faster, one has a better median every other time.

    `noise` is the largest difference between two runs with the defaults, `others` the share of the cores that anything
    else took, None if that is not known. With too few rounds, or on a machine that was not idle, there is no verdict.
    """
    rounds = min(len(spread.values) for spread in ratios.values())
    if rounds < ROUNDS:
        return f"No verdict: it takes {ROUNDS} rounds, and there {'was 1' if rounds == 1 else f'were {rounds}'}."
    if others is not None and others >= NOT_FREE:
        return f"No verdict: this machine was not idle, and {100 * others:.0f} % of its cores went to what else ran."
    better = [
        f"{shown(name, value)} ({spread.median:.2f})"
        for (name, value), spread in ratios.items()
        if max(spread.values) < 1 - noise
    ]
    detail = f"two runs with the defaults in one round differed by {100 * noise:.0f} % at most"
    if others is None:
        detail += f"; {UNKNOWN}"
    if noise > NOISY:
        return f"No verdict: {detail}."
    if better:
        return f"Faster here than the defaults in every round, by more than the noise: {', '.join(better)}; {detail}."
    return f"Nothing that was tried is faster than the defaults in every round by more than the noise: {detail}."


def shown(name: str, value: int) -> str:
    """A setting, as it is written in the environment."""
    if not name.endswith("_bytes"):
        return f"{name.upper()}={value}"
    return f"{name.upper()}={value // 1024**2}MiB" if value % 1024**2 == 0 else f"{name.upper()}={value // 1024}KiB"
