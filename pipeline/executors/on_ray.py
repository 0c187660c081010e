"""The Ray executor: model-holding actors, a bounded number of tasks in flight, lost actors replaced.

Data and model state are put into the object store once. A task is lost only with its actor: it is then given to
another, up to a limit, because a task that kills its worker (out of memory) would do so for ever. An error inside a
task is not repeated: tasks are deterministic.
"""

import logging
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from torch import Tensor

from nntk_dist.errors import NNTKError
from pipeline.data import Dataset
from pipeline.job import Job, Outcome, Task
from pipeline.worker import Worker

_TASKS_PER_ACTOR = 2  # one running, one waiting: an actor never idles between tasks
_ATTEMPTS = 4
_POLL_SECONDS = 1.0
# What Ray reports for the tasks of a dead actor, also where its node's memory ran out or the node itself is gone.
_LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)

WorkerActor = ray.remote(Worker)


def connect(address: str | None, num_cpus: int) -> bool:
    """Join the cluster at `address`, or start Ray here where there is none, with room for actors of `num_cpus` in all.

    Returns whether there is now a connection to close: False where this process had one already.

    Raises: NNTKError where neither is possible.
    """
    if ray.is_initialized():
        return False
    # As many CPUs as are asked for, also beyond this machine's: an actor without a place would wait for ever.
    options: dict[str, Any] = {} if address else {"include_dashboard": False, "num_cpus": num_cpus}
    on_termination = signal.getsignal(signal.SIGTERM)  # Ray puts its own in place, which ends the driver at once
    try:
        # "local", since without an address Ray would look for a cluster that somebody has started on this machine
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        place = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started here"
        raise NNTKError(
            f"{place} ({str(error).splitlines()[0]}); check the address (and RAY_AUTH_MODE=token for a cluster "
            "that asks for a token), or set compute.executor=serial"
        ) from error
    if on_termination is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)
    return True


@dataclass(frozen=True)
class _Running:
    """A task in flight."""

    task: Task
    attempt: int
    actor: Any


def _finished(running: list[Any]) -> list[Any]:
    """All that is finished once something is, or nothing after a second.

    One wait for one result is not enough: where several are ready it may pass the same one over for seconds, and a
    driver that is killed then has to do again what was long on disk.
    """
    done, _ = ray.wait(running, num_returns=1, timeout=_POLL_SECONDS, fetch_local=False)
    if done:
        done, _ = ray.wait(running, num_returns=len(running), timeout=0, fetch_local=False)
    return done


class RayExecutor:
    """`num_workers` actors of `threads` CPUs each, and a share of a GPU where the job's device is one."""

    def __init__(
        self,
        job: Job,
        dataset: Dataset,
        state: Mapping[str, Tensor],
        *,
        num_workers: int,
        grow: bool = False,
        address: str | None = None,
    ) -> None:
        """`grow`: on a cluster, take as many workers as it has places for, instead of `num_workers`."""
        self._connected = connect(address, num_workers * job.layout.threads)
        self._arguments = (ray.put(job), ray.put(dataset), ray.put(dict(state)))
        self._options: dict[str, Any] = {
            "num_cpus": job.layout.threads,
            "num_gpus": 1 if job.layout.device.startswith("cuda") else 0,
            "max_restarts": 0,
        }
        places = self._places()
        if places < (1 if grow else num_workers):
            raise NNTKError(
                f"Ray has room for {places} worker(s) of {self._options['num_cpus']} CPU(s) and "
                f"{self._options['num_gpus']} GPU(s), {num_workers} are asked for; set compute.workers=auto, or give "
                "the cluster more nodes"
            )
        self._num_workers = places if grow and address else num_workers
        self._actors: list[Any] = []

    def _start(self) -> Any:
        return WorkerActor.options(**self._options).remote(*self._arguments)

    def _places(self) -> int:
        """Workers that the cluster's living nodes have room for, each wholly on one node."""
        needed = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"]}
        return sum(
            min(int(node["Resources"].get(name, 0) // count) for name, count in needed.items() if count)
            for node in ray.nodes()
            if node["Alive"]
        )

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome | None]:
        """Outcomes as tasks finish, None where a second passes without one."""
        waiting = iter(tasks)
        lost: deque[tuple[Task, int]] = deque()
        running: dict[Any, _Running] = {}
        while True:
            self._submit(waiting, lost, running)
            if not running:
                return
            done = _finished(list(running))
            if not done:
                yield None
            for reference in done:
                entry = running.pop(reference)
                try:
                    outcome = ray.get(reference)
                except _LOST as error:
                    self._replace(entry.actor)
                    lost.append((entry.task, self._next_attempt(entry, error)))
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, NNTKError) else error) from None
                else:
                    yield outcome

    def _submit(self, waiting: Iterator[Task], lost: "deque[tuple[Task, int]]", running: "dict[Any, _Running]") -> None:
        """Fill every actor's queue, lost tasks first; actors are started as they are needed."""
        while True:
            loads = Counter(entry.actor for entry in running.values())
            actor = min(self._actors, key=lambda each: loads[each], default=None)
            grow = len(self._actors) < self._num_workers and (actor is None or loads[actor] > 0)
            if not grow and loads[actor] >= _TASKS_PER_ACTOR:
                return
            task, attempt = lost.popleft() if lost else (next(waiting, None), 1)
            if task is None:
                return
            if grow:
                actor = self._start()
                self._actors.append(actor)
            assert actor is not None
            running[actor.execute.remote(task)] = _Running(task, attempt, actor)

    def _next_attempt(self, entry: "_Running", error: Exception) -> int:
        """The number of the next attempt, or an error where there have been enough."""
        if entry.attempt >= _ATTEMPTS:
            raise NNTKError(
                f"task {entry.task.stage} {entry.task.tile} lost its worker {entry.attempt} times, most likely for "
                "want of memory; make compute.tile or compute.workers smaller"
            ) from error
        return entry.attempt + 1

    def _replace(self, dead: Any) -> None:
        """A new actor for a dead one, once: every task that it held reports the same death."""
        if dead in self._actors:
            self._actors[self._actors.index(dead)] = self._start()

    def stop_workers(self) -> None:
        """Stop the actors."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []

    def close(self) -> None:
        """Stop the actors, and Ray where this executor has started or joined it."""
        self.stop_workers()
        if self._connected:
            ray.shutdown()
