"""How many cores and how much memory a process may use, in containers with either version of control groups."""

import os

import pytest

from engine.machine import cores, memory


@pytest.mark.parametrize(
    ("group", "limits", "found"),
    [
        ("0::/", {"": "max 100000"}, 64),
        ("0::/", {"": "200000 100000"}, 2),
        ("0::/", {"": "150000 100000"}, 2),
        ("0::/", {"": "10000 100000"}, 1),
        ("0::/a/b", {"": "max 100000", "a": "300000 100000", "a/b": "800000 100000"}, 3),
        ("0::/a/b", {"": "max 100000", "a": "800000 100000", "a/b": "300000 100000"}, 3),
        ("0::/a/b", {"a": "300000 100000"}, 3),
        ("0::/a/b", {"a/b": "800000 100000"}, 8),
        ("0::/", {"": "9900000 100000"}, 64),
        ("0::/", {"": "more than this knows"}, 64),
        ("0::/", {}, 64),
        ("3:cpu:/a", {"a": "200000 100000"}, 64),
    ],
)
def test_a_container_has_as_many_cores_as_its_quota_allows(monkeypatch, tmp_path, group, limits, found):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:name=systemd:/\n{group}\n")
    for folder, limit in limits.items():
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / folder / "cpu.max").write_text(f"{limit}\n")
    assert cores(tmp_path) == found


@pytest.mark.parametrize(("quota", "found"), [(-1, 64), (150_000, 2), (100_000, 1), (9_900_000, 64)])
def test_a_container_of_an_older_host_has_as_many_cores_as_its_quota_allows(monkeypatch, tmp_path, quota, found):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/docker/a\n0::/docker/a\n")
    (tmp_path / "sys/fs/cgroup/cpu").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cores(tmp_path) == found


def test_without_control_groups_all_cores_are_there(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    assert cores(tmp_path) == 4


GIB = 2**30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """The root folder of a machine with 16 GiB of memory, whose process is in the control group /a/b."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 * GIB // 4096}.__getitem__)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "found"),
    [({}, 16), ({"a/b": "max"}, 16), ({"a/b": 2 * GIB}, 2), ({"a": 3 * GIB, "a/b": "max"}, 3), ({"a": 99 * GIB}, 16)],
)
def test_a_container_has_as_much_memory_as_its_limit_or_one_above_it_allows(machine, limits, found):
    for folder, limit in limits.items():
        (machine / "sys/fs/cgroup" / folder / "memory.max").write_text(f"{limit}\n")
    assert memory(machine) == found * GIB


@pytest.mark.parametrize(("limit", "found"), [(2 * GIB, 2), (2**63 - 4096, 16)])
def test_a_container_of_an_older_host_has_as_much_memory_as_its_limit_allows(machine, limit, found):
    (machine / "sys/fs/cgroup/memory").mkdir()
    (machine / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text(f"{limit}\n")
    assert memory(machine) == found * GIB
