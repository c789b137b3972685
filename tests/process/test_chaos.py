"""Every scenario of `make chaos`, on real servers, in its short version.

No document may be lost, duplicate, unexpected or changed.
"""

import pytest

from tests.chaos.scenarios import SCENARIOS


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_and_nothing_is_there_twice(name, settings, tmp_path):
    report = SCENARIOS[name](settings, tmp_path / name, True)
    assert report.problems == []
    assert report.faults
    assert all(report.faults.values()), f"a fault was not injected: {report.faults}"
