"""How many CPUs a process may use: by its affinity and by the limits of its container; and how a worker divides them.

`os.cpu_count()` counts what the machine has, also where a container or a scheduler gives a part of it.

Axes: none.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Threads:
    """Threads of a worker: for its own tasks, and for a task that runs while all other workers of its node are idle."""

    own: int
    whole_node: int


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use, at least 1: the least of its affinity and of its control groups' quotas, of which
    a part of a CPU counts as one. `root` is where the system's files are looked for.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([affinity, *(max(1.0, quota) for quota in _quotas(root))])))


def _quotas(root: Path) -> list[float]:
    """CPUs that the control groups of this process, and the groups around these, are limited to; versions 1 and 2."""
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        group = mounted / place.strip("/")
        # A container sees its own group at the mount point, whatever the path says.
        for folder in {mounted, *(path for path in (group, *group.parents) if path.is_relative_to(mounted))}:
            quotas.append(_version_1(folder) if controllers else _version_2(folder))
    return [quota for quota in quotas if quota is not None]


def _version_2(folder: Path) -> float | None:
    limit = _read(folder / "cpu.max").split()
    return int(limit[0]) / int(limit[1]) if len(limit) == 2 and limit[0] != "max" else None


def _version_1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
