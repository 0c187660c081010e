"""How many CPUs a process may use, and how a worker divides them.

Axes: none.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Threads:
    """The threads of a worker.

    Attributes:
        own: for its own tasks.
        whole_node: for a task that runs while all other workers of its node are idle.
    """

    own: int
    whole_node: int


def available_cpus() -> int:
    """Return the CPUs that this process may use, at least 1: by affinity, container quota and LOKY_MAX_CPU_COUNT.

    `os.cpu_count()` counts all CPUs of the machine, even if a container or a scheduler gives only some of them. Quotas
    of control groups around a process that is in no container are not known; they cost time, nothing else.
    """
    import joblib  # here, since `nntk --help` needs none of it

    return int(joblib.cpu_count())
