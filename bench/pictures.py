"""The report's pictures, as SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt

from bench.figures import Spread

__all__ = ["ladder", "scale", "stages"]

COLOURS: Final = {"ceiling": "#8a8f98", "headrace": "#1f6f8b", "import": "#c2703d"}

# Text stays text in the SVG, and the same figures give the same file.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "headrace", "font.size": 9, "axes.spines.top": False})
mpl.rcParams["axes.spines.right"] = False


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _whiskers(spread: Spread) -> list[list[float]]:
    """The distances from the median to the minimum and to the maximum."""
    return [[spread.median - min(spread.values)], [max(spread.values) - spread.median]]


def _label(axes: Any, x: float, row: int, text: str) -> None:
    """Put a text to the right of a bar or its whisker, clear of the cap."""
    axes.annotate(text, (x, row), (7, 0), textcoords="offset points", va="center")


def ladder(found: Mapping[str, Any], path: Path) -> None:
    """Wall seconds of the ceiling, Headrace and the import tool."""
    names = [name for name in COLOURS if isinstance(found.get(name), Spread)]
    figure, axes = plt.subplots(figsize=(7, 0.6 * len(names) + 0.9))
    for row, name in enumerate(reversed(names)):
        spread = found[name]
        axes.barh(row, spread.median, xerr=_whiskers(spread), color=COLOURS[name], height=0.6, capsize=3)
        _label(axes, max(spread.values), row, f"{spread.median:.1f} s")
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("seconds for the same records (less is better); whiskers: least and most")
    axes.margins(x=0.15)
    _save(figure, path)


def scale(found: Mapping[str, Spread], path: Path, cores: int) -> None:
    """Speed-up over one process, with linear scaling and the number of cores for comparison."""
    counts = [int(name) for name in found if name.isdigit()]
    alone = found["1"].median
    # The rate of each round, over the median rate of one process.
    times = {name: Spread(tuple(alone / wall for wall in spread.values)) for name, spread in found.items()}
    figure, axes = plt.subplots(figsize=(5, 3.2))
    axes.plot(counts, counts, "--", color="#8a8f98", label="straight line")
    axes.axvline(cores, color="#8a8f98", linewidth=0.8, linestyle=":", label=f"{cores} cores")

    def points(at: Sequence[float], names: list[str], style: str, colour: str, label: str) -> None:
        spreads = [times[name] for name in names]
        low, high = ([_whiskers(spread)[side][0] for spread in spreads] for side in (0, 1))
        medians = [spread.median for spread in spreads]
        axes.errorbar(at, medians, yerr=[low, high], fmt=style, color=colour, capsize=3, label=label)

    points(counts, [str(n) for n in counts], "o-", "#1f6f8b", "one engine")
    if "two engines of 1" in found:
        # Next to the point of one engine of two, so that both whiskers can be seen.
        points([2.1], ["two engines of 1"], "s", "#c2703d", "two engines of one")
    axes.set_xticks(counts)
    axes.set_xlabel("worker processes; whiskers: least and most")
    axes.set_ylabel("times the rate of one")
    axes.legend(edgecolor="none", framealpha=1)
    _save(figure, path)


def stages(found: Mapping[str, float], path: Path, writers: int) -> None:
    """Where a worker's threads spend their time; hatched: `wait` / `writers`, since its batches wait in parallel."""
    names = list(found)
    figure, axes = plt.subplots(figsize=(7, 2.9))
    axes.barh(list(reversed(names)), [found[name] for name in reversed(names)], color="#1f6f8b", height=0.6)
    axes.barh(["wait"], [found["wait"] / writers], color="#1f6f8b", edgecolor="white", hatch="////", height=0.6)
    for row, name in enumerate(reversed(names)):
        shared = f" (/ {writers}: {found[name] / writers:.2f})" if name == "wait" else ""
        _label(axes, found[name], row, f"{found[name]:.2f}{shared}")
    axes.set_xlabel(
        f"microseconds of a thread for each line; hatched: `wait` / {writers}, since so many wait at a time"
    )
    axes.margins(x=0.2)
    _save(figure, path)
