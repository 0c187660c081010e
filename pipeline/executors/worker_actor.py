"""The Ray actor around a worker: it finds out how many threads it may use, and carries out calls.

Imports neither torch nor the stages: what a worker is made of comes with its class.
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
        ...


class WorkerActor:
    """One worker in a process of its own, made of `arguments` and its threads.

    Its own threads are the CPUs that Ray has given it. A task that runs while other workers idle may have `node_cpus`,
    or, where that is None, as many as Ray has been given of the node; in any case what this process may use.
    """

    def __init__(self, make_worker: Callable[..., Executes], node_cpus: int | None, *arguments: Any) -> None:
        own = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        whole_node = max(own, min(available_cpus(), _node_cpus() if node_cpus is None else node_cpus))
        self._worker = make_worker(*arguments, Threads(own, whole_node))

    def carry_out(self, tasks: Sequence[Task], limit_seconds: float) -> list[Outcome]:
        """See `pipeline.executors.calls`."""
        return carry_out(self._worker.execute, tasks, limit_seconds)


def _node_cpus() -> int:
    """CPUs that this node has for Ray."""
    here = ray.get_runtime_context().get_node_id()
    return next(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["NodeID"] == here)
