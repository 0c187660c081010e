"""How many CPUs there are for a process: files of control groups as Linux writes them, in a folder of their own."""

import os

import pytest

from pipeline.runtime.cpus import available_cpus


@pytest.fixture
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def system(root, groups, files):
    """The files of a system with these control groups and limits."""
    for path, text in {"proc/self/cgroup": groups, **files}.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, 8),
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ("0::/", {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ("0::/", {"sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        ("0::/", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ("0::/", {"sys/fs/cgroup/cpu.max": "9900000 100000"}, 8),
        # the group itself, one around it, and a container that sees its own at the mount point
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "200000 100000", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 2),
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 4),
        ("0::/docker/1234", {"sys/fs/cgroup/cpu.max": "500000 100000"}, 5),
        # version 1, alone and beside an empty version 2
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n0::/x",
            {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "600000", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"},
            6,
        ),
        ("1:cpu:/", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
        ("5:cpuset:/", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000"}, 8),
    ],
)
def test_the_least_of_affinity_and_quotas(tmp_path, eight_cpus, groups, files, expected):
    assert available_cpus(system(tmp_path, groups, files)) == expected


def test_a_system_without_control_groups(tmp_path, eight_cpus):
    assert available_cpus(tmp_path) == 8


def test_a_system_without_affinity(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_cpus(tmp_path) == 3
