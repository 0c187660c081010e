"""The Ray executor: model-holding actors, a bounded number of calls in flight, lost actors replaced.

What workers are made of (data, model state) is put into the object store once. Short tasks go in one call
(`pipeline.executors.calls`), neighbours to the same worker (`pipeline.executors.neighbours`). A task is lost only with
its actor: it is then given to another, up to a limit, because a task that kills its worker (out of memory) would do so
for ever; and alone, with nothing beside it or behind it, so that no other is blamed. An error inside a task is not
repeated: tasks are deterministic.
"""

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from nntk_dist.errors import NNTKError
from pipeline.executors.calls import Pace
from pipeline.executors.neighbours import Runs
from pipeline.executors.worker_actor import WorkerActor
from pipeline.job.task import Outcome, Task
from pipeline.runtime.cpus import available_cpus

_CALLS_PER_WORKER = 2  # one running, one waiting or writing what it has: a worker never idles between calls
_ATTEMPTS = 4
_POLL_SECONDS = 1.0
REGROW_SECONDS = 10.0  # a lost node is replaced in minutes
# What Ray reports for the tasks of a dead actor, also where its node's memory ran out or the node itself is gone.
_LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)

_RemoteWorker = ray.remote(WorkerActor)


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


def actor_options(num_cpus: int, workers_per_gpu: int, calls_at_once: int = 1) -> dict[str, Any]:
    """What Ray is told of a worker; `workers_per_gpu` 0 asks for no GPU."""
    return {
        "num_cpus": num_cpus,
        # Ray counts ten-thousandths, to the nearest: six times 0.1667 is more than there is
        "num_gpus": math.floor(1e4 / workers_per_gpu) / 1e4 if workers_per_gpu else 0,
        "max_concurrency": calls_at_once,
        "max_restarts": 0,
        "enable_task_events": False,  # the ledger is the record, and a flood of calls would fill Ray's
    }


def places_on(nodes: Iterable[Mapping[str, Any]], num_cpus: int, workers_per_gpu: int) -> int:
    """Workers that the living ones of these nodes have room for, each wholly on one node."""
    places = 0
    for node in nodes:
        if node["Alive"]:
            room = int(node["Resources"].get("CPU", 0) // num_cpus)
            if workers_per_gpu:  # by multiplication: 1 // 0.1 is 9
                room = min(room, int(node["Resources"].get("GPU", 0)) * workers_per_gpu)
            places += room
    return places


@dataclass(eq=False)
class _Worker:
    """A place for an actor, which is started for its first call; `ready` is there once it runs, `calls` is how many
    calls it has.
    """

    actor: Any = None
    ready: Any = None
    calls: int = 0
    alone: bool = False  # it has a task that may have killed another
    given_up: Any = None  # the last actor that was stopped since there was no place for it


@dataclass(frozen=True)
class _Call:
    """A call in flight. `actor` is that which it was given to, `worker` the place where another may be by now."""

    tasks: list[Task]
    attempt: int
    worker: _Worker
    actor: Any


@dataclass
class _Stage:
    """What is under way of the tasks of one `run`.

    `room` holds every worker that has room for a call; some may be in it twice, or have none by now.
    """

    runs: Runs
    pace: Pace
    room: "deque[_Worker]"
    lost: "deque[tuple[Task, int]]" = field(default_factory=deque)
    running: dict[Any, _Call] = field(default_factory=dict)
    retired: set[_Worker] = field(default_factory=set)


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
    """`num_workers` actors of `num_cpus` CPUs each and, with `workers_per_gpu`, of that share of a GPU."""

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
        """Workers are `make_worker(*arguments, threads)`, each in its own process, where the arguments arrive as one
        copy for a node.

        `workers_per_gpu` 0 asks for no GPU. `calls_at_once`: in threads of a worker's process, which has to know how to
        share itself. `grow`: on a cluster, take as many workers as it has places for, instead of
        `num_workers`.
        """
        self._connected = connect(address, num_workers * num_cpus)
        node_cpus = None if address else available_cpus()
        self._arguments = (make_worker, node_cpus, *(ray.put(argument) for argument in arguments))
        self._num_cpus, self._workers_per_gpu = num_cpus, workers_per_gpu
        self._options = actor_options(num_cpus, workers_per_gpu, calls_at_once)
        places = self._places()
        if places < (1 if grow else num_workers):
            raise NNTKError(
                f"Ray has room for {places} worker(s) of {num_cpus} CPU(s) and "
                f"{self._options['num_gpus']:g} GPU(s), {num_workers} are asked for; set compute.workers=auto, or give "
                "the cluster more nodes"
            )
        self._workers = [_Worker() for _ in range(places if grow and address else num_workers)]
        self._wanted = len(self._workers)
        self._looked_at, self._was_short = time.monotonic(), False

    def run(self, tasks: Iterable[Task]) -> Iterator[list[Outcome]]:
        """Outcomes as calls finish, none where a second passes without one."""
        stage = _Stage(Runs(tasks), Pace(len(self._workers)), deque(self._workers))
        for worker in self._workers:
            worker.calls, worker.alone = 0, False  # nobody waits for what an interrupted stage has left under way
        while True:
            self._look_at_places(stage)
            self._fill(stage)
            if not stage.running:
                return
            outcomes: list[Outcome] = []
            failure: Exception | None = None
            for reference in _finished(list(stage.running)):
                call = stage.running.pop(reference)
                call.worker.calls -= 1
                call.worker.alone = False
                stage.room.append(call.worker)
                try:
                    finished = ray.get(reference)
                except _LOST as error:
                    failure = self._lose(stage, call, error) or failure
                except ray.exceptions.RayTaskError as error:
                    failure = error.cause if isinstance(error.cause, NNTKError) else error
                else:
                    outcomes += finished
                    stage.pace.note(finished)
                    if len(finished) < len(call.tasks):
                        stage.runs.give_back(call.worker, call.tasks[len(finished) :])
                        stage.room.extend(worker for worker in self._workers if worker.calls == 0)
            yield outcomes
            if failure is not None:
                raise failure

    def _fill(self, stage: _Stage) -> None:
        """Give calls to all workers that have room, one to each before any has two."""
        while stage.room:
            worker = stage.room.popleft()
            if worker.alone or worker.calls >= _CALLS_PER_WORKER or worker in stage.retired:
                continue
            if stage.lost:
                if worker.calls == 0:  # otherwise it waits until it has nothing else
                    task, attempt = stage.lost.popleft()
                    worker.alone = True
                    self._submit(stage, worker, [task], attempt)
            elif tasks := stage.runs.take(worker, stage.pace.num_tasks()):
                self._submit(stage, worker, tasks, 1)
                stage.room.append(worker)

    def _submit(self, stage: _Stage, worker: _Worker, tasks: list[Task], attempt: int) -> None:
        if worker.actor is None:
            worker.actor = _RemoteWorker.options(**self._options).remote(*self._arguments)
            worker.ready = worker.actor.__ray_ready__.remote()
        reference = worker.actor.carry_out.remote(tasks, stage.pace.limit_seconds)
        stage.running[reference] = _Call(tasks, attempt, worker, worker.actor)
        worker.calls += 1

    def _lose(self, stage: _Stage, call: _Call, error: Exception) -> NNTKError | None:
        """Let the tasks of a call whose actor has died be done again, each alone; an error after the last attempt."""
        if call.worker.actor is call.actor:  # every call that an actor had reports the same death
            call.worker.actor = None
            if len(self._workers) > 1 and self._places() < len(self._workers):
                # Its node is gone, and there is no other: a new actor would wait for a place, and tasks for the actor.
                self._workers.remove(call.worker)
                stage.retired.add(call.worker)
        if call.attempt >= _ATTEMPTS and call.worker.given_up is not call.actor:
            failure = NNTKError(
                f"task {call.tasks[0].stage} {call.tasks[0].tile} lost its worker {call.attempt} times, most likely "
                "for want of memory; make compute.tile or compute.workers smaller"
            )
            failure.__cause__ = error
            return failure
        attempt = call.attempt + (call.worker.given_up is not call.actor)  # which tried nothing
        stage.lost.extend((task, attempt) for task in call.tasks)
        stage.room.extend(worker for worker in self._workers if worker.calls == 0)
        return None

    def _places(self) -> int:
        return places_on(ray.nodes(), self._num_cpus, self._workers_per_gpu)

    def _look_at_places(self, stage: _Stage) -> None:
        """Now and then: new workers for those that had lost their places, once there are places again; and an end for
        actors that wait for places that are gone, as where a lost node still counted as alive when its actor died.
        """
        if time.monotonic() - self._looked_at < REGROW_SECONDS:
            return
        self._looked_at = time.monotonic()
        places, actors = self._places(), [worker for worker in self._workers if worker.actor is not None]
        missing = len(actors) - places
        if missing > 0 and self._was_short:  # twice in a row: by now the actors of a dead node have said so
            waiting = [worker for worker in actors if not ray.wait([worker.ready], timeout=0)[0]]
            for worker in waiting[: min(missing, len(self._workers) - 1)]:  # the last one waits for another node
                worker.given_up = worker.actor
                ray.kill(worker.actor, no_restart=True)  # its calls fail, and are given to others
        self._was_short = missing > 0
        new = [_Worker() for _ in range(min(places, self._wanted) - len(self._workers))]
        self._workers += new
        stage.room.extend(new)

    def stop_workers(self, keep: int = 0) -> None:
        """Stop the actors but for the first `keep`, which have the next tasks; places stay, for new actors."""
        stopped = [worker for worker in self._workers if worker.actor is not None][keep:]
        for worker in stopped:
            ray.kill(worker.actor, no_restart=True)
            worker.actor = None
        self._workers.sort(key=lambda worker: worker.actor is None)

    def close(self) -> None:
        """Stop the actors, and Ray where this executor has started or joined it."""
        self.stop_workers()
        if self._connected:
            ray.shutdown()
