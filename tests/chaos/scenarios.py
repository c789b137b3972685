"""All scenarios of `make chaos`, by name. Each injects its faults, counts them, and has the checker verify the loads.

`short` selects the version for `make test`: the same faults, fewer of them, on smaller files.
"""

from tests.chaos.fuzz import fuzz
from tests.chaos.inputs import lines, lines_of_all_kinds, poison
from tests.chaos.processes import clocks, hosts, hung, hups, kills, ranges, steps, supervisors, terms, zombies
from tests.chaos.servers import databases, failpoints, replica, slow, storage

__all__ = ["SCENARIOS"]

SCENARIOS = {
    "kills": kills,
    "steps": steps,
    "ranges": ranges,
    "zombies": zombies,
    "supervisors": supervisors,
    "terms": terms,
    "hups": hups,
    "hung": hung,
    "hosts": hosts,
    "poison": poison,
    "slow": slow,
    "failpoints": failpoints,
    "databases": databases,
    "replica": replica,
    "storage": storage,
    "clocks": clocks,
    "lines": lines,
    "corpus": lines_of_all_kinds,
    "fuzz": fuzz,
}
