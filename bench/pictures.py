"""The report's pictures, as SVG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt

from bench.measure import Spread

__all__ = ["ladder", "scale", "stages"]

COLOURS: Final = {"ceiling": "#8a8f98", "headrace": "#1f6f8b", "import": "#c2703d"}

# Text stays text, and the same figures give the same file.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "headrace", "font.size": 9, "axes.spines.top": False})
mpl.rcParams["axes.spines.right"] = False


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def ladder(found: Mapping[str, Any], path: Path) -> None:
    """Wall seconds from the ceiling up."""
    names = [name for name in COLOURS if isinstance(found.get(name), Spread)]
    figure, axes = plt.subplots(figsize=(7, 0.6 * len(names) + 0.9))
    for row, name in enumerate(reversed(names)):
        spread = found[name]
        low, high = spread.median - min(spread.values), max(spread.values) - spread.median
        axes.barh(row, spread.median, xerr=[[low], [high]], color=COLOURS[name], height=0.6, capsize=3)
        axes.text(max(spread.values), row, f"  {spread.median:.1f} s", va="center")
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("seconds for the same records (less is better); whiskers: least and most")
    axes.margins(x=0.15)
    _save(figure, path)


def scale(found: Mapping[str, Spread], path: Path) -> None:
    """Speed-up against the straight line."""
    counts = [int(name) for name in found if name.isdigit()]
    alone = found["1"].median
    figure, axes = plt.subplots(figsize=(5, 3.2))
    axes.plot(counts, counts, "--", color="#8a8f98", label="straight line")
    axes.plot(counts, [alone / found[str(n)].median for n in counts], "o-", color="#1f6f8b", label="one engine")
    if "two engines of 1" in found:
        axes.plot([2], [alone / found["two engines of 1"].median], "s", color="#c2703d", label="two engines of one")
    axes.set_xticks(counts)
    axes.set_xlabel("worker processes")
    axes.set_ylabel("times the rate of one")
    axes.legend(frameon=False)
    _save(figure, path)


def stages(found: Mapping[str, float], path: Path) -> None:
    """Where a worker's threads spend their time."""
    names = [name for name in found if name != "stall"]
    figure, axes = plt.subplots(figsize=(7, 2.6))
    axes.barh(list(reversed(names)), [found[name] for name in reversed(names)], color="#1f6f8b", height=0.6)
    for row, name in enumerate(reversed(names)):
        axes.text(found[name], row, f"  {found[name]:.2f}", va="center")
    axes.set_xlabel("microseconds of a thread for each line")
    axes.margins(x=0.12)
    _save(figure, path)
