"""The Ray actor around a worker: it finds out how many threads it may use, and carries out calls.

It imports neither torch nor the stages; the worker's class brings them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray

from pipeline.executors.calls import carry_out
from pipeline.job.task import Outcome, Task
from pipeline.runtime.cpus import Threads, available_cpus


class Executes(Protocol):
    """A worker, as far as an actor knows it."""

    def execute(self, task: Task) -> Outcome:
        """Carry out a task."""


class WorkerActor:
    """One worker in its own process. `start` makes it, so that an exception there arrives like any other.

    The worker's own threads are the CPUs that Ray has given to the actor. A task that runs while all other workers are
    idle may use all CPUs of the node.

    Args:
        make_worker: called as `make_worker(*arguments, threads)`.
        node_cpus: CPUs of this node for such a task; None for as many as Ray may use. Never more than this process may.
        *arguments: of `make_worker`.
    """

    def __init__(self, make_worker: Callable[..., Executes], node_cpus: int | None, *arguments: Any) -> None:
        own = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        whole_node = max(own, min(available_cpus(), _node_cpus() if node_cpus is None else node_cpus))
        self._make = lambda: make_worker(*arguments, Threads(own, whole_node))

    def start(self) -> None:
        """Make the worker; called once, before any `carry_out`."""
        self._worker = self._make()

    def carry_out(self, tasks: Sequence[Task], limit_seconds: float) -> list[Outcome]:
        """Carry out the first tasks of a call; see `pipeline.executors.calls.carry_out`."""
        return carry_out(self._worker.execute, tasks, limit_seconds)


def _node_cpus() -> int:
    """Return the CPUs that Ray may use on this node."""
    here = ray.get_runtime_context().get_node_id()
    return next(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["NodeID"] == here)
