"""How many cores this process may use: of the machine, or of its container."""

import math
import os
from pathlib import Path, PurePath

__all__ = ["cores"]


def cores(root: Path = Path("/")) -> int:
    """Cores' worth of time that this process may take: the cores that it may run on, or less by the quota of its control group
    or (version 2) of one above it, which is how containers are limited; rounded up. `root` is where proc and sys are."""
    found = float(len(os.sched_getaffinity(0)))
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        group = PurePath(*(line.removeprefix("0::/") for line in groups if line.startswith("0::/")))
        for folder in (group, *group.parents):
            limit = root / "sys/fs/cgroup" / folder / "cpu.max"
            quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
            if quota != "max":
                found = min(found, int(quota) / int(period))
        first = root / "sys/fs/cgroup/cpu"  # version 1, which shows a container its own group only
        if (first / "cpu.cfs_quota_us").exists():
            quota, period = ((first / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
            if int(quota) > 0:
                found = min(found, int(quota) / int(period))
    except (OSError, ValueError):
        pass  # what cannot be read limits nothing
    return max(1, math.ceil(found))
