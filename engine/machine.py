"""The cores and the memory that this process may use of its machine or container."""

import math
import os
from contextlib import suppress
from pathlib import Path, PurePath

__all__ = ["cores", "memory"]

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """How many cores this process may use, rounded up: those that it may run on, or fewer if the CPU quota of its
    control group, or (version 2) of one above it, is lower, which is how containers are limited. `root` is the folder
    of proc and sys."""
    found = float(len(os.sched_getaffinity(0)))
    for limit in _limits(root, "cpu.max"):
        with suppress(ValueError):  # "max 100000"
            quota, period = map(int, limit.split())
            found = min(found, quota / period)
    first = root / "sys/fs/cgroup/cpu"  # version 1: a container sees its own group only
    with suppress(OSError, ValueError):
        quota, period = (int((first / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
        if quota > 0:
            found = min(found, quota / period)
    return max(1, math.ceil(found))


def memory(root: Path = ROOT) -> int:
    """Bytes of memory that this process and its children may use: the machine's, or the container's limit if lower."""
    limits = _limits(root, "memory.max")
    with suppress(OSError):
        limits.append((root / "sys/fs/cgroup/memory/memory.limit_in_bytes").read_text())  # version 1
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([there, *(int(limit) for limit in limits if limit.strip().isdigit())])


def _limits(root: Path, name: str) -> list[str]:
    """The limits of this process's version 2 control group and of those above it, except any that cannot be read."""
    limits = []
    with suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        group = PurePath(*(line.removeprefix("0::/") for line in groups if line.startswith("0::/")))
        for folder in (group, *group.parents):
            with suppress(FileNotFoundError):  # the root group has none
                limits.append((root / "sys/fs/cgroup" / folder / name).read_text())
    return limits
