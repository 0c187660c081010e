"""The Ray executor: one actor a worker, a bounded number of calls in flight, lost actors replaced.

Ray starts actors, places them, and waits for a node if there is none. A worker gets tasks once its actor runs, so no
task waits for an actor without a place. Data and model state are put into the object store once. Short tasks share a
call (`pipeline.executors.calls`), neighbours go to the same worker (`pipeline.executors.neighbours`).

Three things are not left to Ray. Actors are replaced here, not by `max_restarts`: without a limit, Ray endlessly
restarts an actor that dies while it starts, and its calls never fail; with a limit, Ray counts lost nodes as deaths.
Tasks are repeated here, not by `max_task_retries`: Ray repeats whole calls beside others on the same actor, so a task
that kills its worker takes its companions down each time. Here each of them runs again alone, up to a limit. An
exception inside a task is never retried, because tasks are deterministic.

Units: seconds.
"""

import logging
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from nntk_dist.errors import ArgumentError, NNTKError
from pipeline.executors.calls import Pace
from pipeline.executors.neighbours import Runs
from pipeline.executors.worker_actor import WorkerActor
from pipeline.job.task import Outcome, Task
from pipeline.runtime.allocator import give_back_freed_memory
from pipeline.runtime.cpus import available_cpus

_CALLS_PER_WORKER = 2  # one that runs, and one that waits or writes its results: no worker idles between calls
_ATTEMPTS = 4
_POLL_SECONDS = 1.0
# What Ray reports for the calls of a dead actor, also if its node ran out of memory or is gone.
_LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)

_RemoteWorker = ray.remote(WorkerActor)


def connect(address: str | None, num_cpus: int) -> bool:
    """Join a Ray cluster, or start Ray on this machine.

    Args:
        address: of the cluster; None starts Ray here.
        num_cpus: CPUs that Ray started here may give to actors, also more than this machine has.

    Returns:
        Whether there is now a connection to close: False if this process had one already.

    Raises:
        ArgumentError: the cluster cannot be joined, or Ray cannot be started.
    """
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {} if address else {"include_dashboard": False, "num_cpus": num_cpus}
    on_termination = signal.getsignal(signal.SIGTERM)  # Ray installs its own handler, which ends the driver at once
    try:
        # "local": without an address Ray would look for a cluster that somebody else has started on this machine
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # a node that is too slow to start is a bare Exception
        place = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started here"
        raise ArgumentError(
            f"{place} ({str(error).splitlines()[0]}); check the address (and RAY_AUTH_MODE=token for a cluster "
            "that asks for a token), or set compute.executor=serial"
        ) from error
    if on_termination is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)
    return True


def actor_options(num_cpus: int, workers_per_gpu: int, calls_at_once: int = 1) -> dict[str, Any]:
    """Return the options of a worker's actor.

    Args:
        num_cpus: CPUs of the worker.
        workers_per_gpu: how many workers share a GPU; 0 asks for no GPU.
        calls_at_once: calls that the actor carries out side by side.
    """
    return {
        "num_cpus": num_cpus,
        # Ray rounds to ten-thousandths: six times 0.1667 would be more than one GPU
        "num_gpus": math.floor(1e4 / workers_per_gpu) / 1e4 if workers_per_gpu else 0,
        "max_concurrency": calls_at_once,
        "max_restarts": 0,
        "enable_task_events": False,  # the ledger is the record, and a flood of calls would fill Ray's
    }


def places_on(nodes: Iterable[Mapping[str, Any]], num_cpus: int, workers_per_gpu: int) -> int:
    """Count the workers that fit on the living nodes, each as a whole on one node.

    Args:
        nodes: as `ray.nodes()` lists them.
        num_cpus: CPUs of a worker.
        workers_per_gpu: how many workers share a GPU; 0 asks for no GPU.
    """
    places = 0
    for node in nodes:
        if node["Alive"]:
            on_node = int(node["Resources"].get("CPU", 0) // num_cpus)
            if workers_per_gpu:  # by multiplication: 1 // 0.1 is 9
                on_node = min(on_node, int(node["Resources"].get("GPU", 0)) * workers_per_gpu)
            places += on_node
    return places


@dataclass(eq=False)
class _Worker:
    """A worker and its present actor, which is started when there is work for it.

    Attributes:
        actor: None before it is started, and after its death.
        starting: becomes available once the actor runs; None before it is started, and afterwards.
        calls: how many calls the actor has.
        alone: whether it has a task that may have killed its last worker, and must get nothing else.
        failed_starts: how many actors in a row died before they were running.
    """

    actor: Any = None
    starting: Any = None
    calls: int = 0
    alone: bool = False
    failed_starts: int = 0

    @property
    def ready(self) -> bool:
        return self.actor is not None and self.starting is None

    def drop(self) -> None:
        """Forget the actor, which is dead."""
        self.actor = self.starting = None


@dataclass(frozen=True)
class _Call:
    """A call in flight: its tasks, how often these have been tried, and who has it."""

    tasks: list[Task]
    attempt: int
    worker: _Worker
    actor: Any  # `worker` may have another one by now


@dataclass
class _Stage:
    """The tasks of one `run`: those to come, those to be tried again alone with their attempt, and those in flight."""

    runs: Runs
    pace: Pace
    lost: "deque[tuple[Task, int]]" = field(default_factory=deque)
    calls: dict[Any, _Call] = field(default_factory=dict)

    def holds(self, count: int) -> bool:
        """Whether at least `count` tasks have not been given to anybody."""
        return self.runs.holds(count - len(self.lost))


def _finished(references: list[Any]) -> list[Any]:
    """Return all that is finished once something is, or nothing after a second.

    One wait for one result is not enough: if several are ready, Ray may pass over the same one for seconds, and a
    driver that is killed then has to repeat what was long on disk.
    """
    done, _ = ray.wait(references, num_returns=1, timeout=_POLL_SECONDS, fetch_local=False)
    if done:
        done, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
    return done


def _result(reference: Any) -> Any:
    """Return what a call returned; an `NNTKError` that it raised is raised as it was."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, NNTKError):
            raise error.cause from error
        raise


class RayExecutor:
    """Run tasks on Ray actors; see `pipeline.executors.Executor`.

    Args:
        make_worker: called as `make_worker(*arguments, threads)` in each actor's process.
        *arguments: put into the object store once; they arrive as one copy for each node.
        num_workers: how many actors.
        num_cpus: CPUs of each.
        workers_per_gpu: how many workers share a GPU; 0 asks for no GPU.
        calls_at_once: calls that a worker carries out side by side, in threads; it has to be made for that.
        grow: on a cluster, use as many workers as fit instead of `num_workers`.
        address: of the cluster; None starts Ray here.

    Raises:
        ArgumentError: Ray cannot be reached, or not all requested workers fit.
    """

    def __init__(
        self,
        make_worker: Callable[..., Any],
        *arguments: object,
        num_workers: int,
        num_cpus: int = 1,
        workers_per_gpu: int = 0,
        calls_at_once: int = 1,
        grow: bool = False,
        address: str | None = None,
    ) -> None:
        self._connected = connect(address, num_workers * num_cpus)
        node_cpus = None if address else available_cpus()
        self._arguments = (make_worker, node_cpus, *(ray.put(argument) for argument in arguments))
        give_back_freed_memory()  # of the copies that writing a large model to Ray's memory took
        self._options = actor_options(num_cpus, workers_per_gpu, calls_at_once)
        places = places_on(ray.nodes(), num_cpus, workers_per_gpu)
        if places < (1 if grow else num_workers):
            raise ArgumentError(
                f"{places} worker(s) of {num_cpus} CPU(s) and {self._options['num_gpus']:g} GPU(s) fit on the nodes of "
                f"Ray, but {num_workers} are requested; set compute.workers=auto, or give the cluster more nodes"
            )
        self._workers = [_Worker() for _ in range(places if grow and address else num_workers)]

    def run(self, tasks: Iterable[Task]) -> Iterator[list[Outcome]]:
        """Yield outcomes as calls finish, and an empty list for every second without one.

        Args:
            tasks: independent tasks; a few more of them are read than are under way.

        Raises:
            NNTKError: a task has lost its worker four times, or raised such an error itself.
            ray.exceptions.RayTaskError: a task raised any other exception.
        """
        stage = _Stage(Runs(tasks), Pace(len(self._workers)))
        for worker in self._workers:
            worker.calls, worker.alone = 0, False  # nobody waits for the calls of an interrupted stage
        while True:
            self._hand_out(stage)
            starting = {worker.starting: worker for worker in self._workers if worker.starting is not None}
            if not stage.calls and not stage.holds(1):
                return
            outcomes: list[Outcome] = []
            failure: Exception | None = None
            for reference in _finished([*stage.calls, *starting]):
                try:
                    if reference in starting:
                        self._note_start(starting[reference], reference)
                    else:
                        outcomes += self._receive(stage, reference)
                except (NNTKError, ray.exceptions.RayTaskError) as error:
                    failure = error
            yield outcomes
            if failure is not None:
                raise failure

    def _hand_out(self, stage: _Stage) -> None:
        """Give one call to each worker that has none; start workers for the tasks that are left; then second calls."""
        for worker in self._workers:
            if worker.ready and worker.calls == 0:
                self._give(stage, worker)
        num_starting = sum(worker.starting is not None for worker in self._workers)
        for worker in self._workers:
            if worker.actor is None and stage.holds(num_starting + 1):
                worker.actor = _RemoteWorker.options(**self._options).remote(*self._arguments)
                worker.starting = worker.actor.start.remote()
                num_starting += 1
        for worker in self._workers:
            if worker.ready and 0 < worker.calls < _CALLS_PER_WORKER and stage.holds(num_starting + 1):
                self._give(stage, worker)

    def _give(self, stage: _Stage, worker: _Worker) -> None:
        """Give a worker a lost task or the next ones of its run; nothing if it has, or ought to have, one alone."""
        if worker.alone or (stage.lost and worker.calls):
            return
        if stage.lost:
            task, attempt = stage.lost.popleft()
            tasks, worker.alone = [task], True
        else:
            tasks, attempt = stage.runs.take(worker, stage.pace.num_tasks()), 1
        if tasks:
            reference = worker.actor.carry_out.remote(tasks, stage.pace.limit_seconds)
            stage.calls[reference] = _Call(tasks, attempt, worker, worker.actor)
            worker.calls += 1

    def _note_start(self, worker: _Worker, reference: Any) -> None:
        """Note that a worker is made, or that its actor has died meanwhile."""
        try:
            _result(reference)
        except _LOST as error:
            worker.drop()
            worker.failed_starts += 1
            if worker.failed_starts >= _ATTEMPTS:
                raise ArgumentError(
                    f"a worker died {worker.failed_starts} times while it started, most likely for want of memory; "
                    "make compute.workers smaller"
                ) from error
        else:
            worker.starting, worker.failed_starts = None, 0

    def _receive(self, stage: _Stage, reference: Any) -> list[Outcome]:
        """Return the outcomes of a finished call; what it left undone is given to others."""
        call = stage.calls.pop(reference)
        if call.worker.actor is call.actor:
            call.worker.calls -= 1
            call.worker.alone = False
        try:
            outcomes: list[Outcome] = _result(reference)
        except _LOST as error:
            self._lose(stage, call, error)
            return []
        stage.pace.note(outcomes)
        stage.runs.give_back(call.worker, call.tasks[len(outcomes) :])
        return outcomes

    def _lose(self, stage: _Stage, call: _Call, error: Exception) -> None:
        """Let the tasks of a call whose actor has died run again, each alone; raise after the last attempt."""
        if call.worker.actor is call.actor:  # each call of an actor reports the same death
            call.worker.drop()
            call.worker.calls, call.worker.alone = 0, False
        if call.attempt >= _ATTEMPTS:
            raise ArgumentError(
                f"task {call.tasks[0].stage} {call.tasks[0].tile} lost its worker {call.attempt} times, most likely "
                "for want of memory; make compute.tile or compute.workers smaller"
            ) from error
        stage.lost.extend((task, call.attempt + 1) for task in call.tasks)

    def stop_workers(self, keep: int = 0) -> None:
        """Stop all actors but the first `keep`, which get the next tasks; others are started when they are needed."""
        for worker in [worker for worker in self._workers if worker.actor is not None][keep:]:
            ray.kill(worker.actor, no_restart=True)
            worker.drop()
        self._workers.sort(key=lambda worker: worker.actor is None)

    def close(self) -> None:
        """Stop all actors, and Ray if this executor has started or joined it."""
        self.stop_workers()
        if self._connected:
            ray.shutdown()
