"""What this process may use, of the machine or of its container: cores and memory."""

import math
import os
from contextlib import suppress
from pathlib import Path, PurePath

__all__ = ["cores", "memory"]

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Cores' worth of time that this process may take: the cores that it may run on, or less by the quota of its control group
    or (version 2) of one above it, which is how containers are limited; rounded up. `root` is where proc and sys are."""
    found = float(len(os.sched_getaffinity(0)))
    for limit in _limits(root, "cpu.max"):
        with suppress(ValueError):  # "max 100000"
            quota, period = map(int, limit.split())
            found = min(found, quota / period)
    first = root / "sys/fs/cgroup/cpu"  # version 1, which shows a container its own group only
    with suppress(OSError, ValueError):
        quota, period = (int((first / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
        if quota > 0:
            found = min(found, quota / period)
    return max(1, math.ceil(found))


def memory(root: Path = ROOT) -> int:
    """Bytes of memory that this process and what it starts may take: the machine's, or less by the limit of its container."""
    limits = _limits(root, "memory.max")
    with suppress(OSError):
        limits.append((root / "sys/fs/cgroup/memory/memory.limit_in_bytes").read_text())  # version 1
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([there, *(int(limit) for limit in limits if limit.strip().isdigit())])


def _limits(root: Path, name: str) -> list[str]:
    """The limits of this process's control group of version 2, and of those above it. What cannot be read limits nothing."""
    limits = []
    with suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        group = PurePath(*(line.removeprefix("0::/") for line in groups if line.startswith("0::/")))
        for folder in (group, *group.parents):
            with suppress(FileNotFoundError):  # the root has none
                limits.append((root / "sys/fs/cgroup" / folder / name).read_text())
    return limits
