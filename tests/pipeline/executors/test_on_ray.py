"""The Ray executor with test workers: killed workers and nodes, failing tasks, and the requests to Ray.

Legend: a task's tile is a number; `folder` holds a file per tile with a line per attempt.
"""

import os
import signal
import threading
import time
from collections import Counter, deque
from itertools import takewhile

import psutil
import pytest
from ray.cluster_utils import Cluster

from nntk_dist.errors import ArgumentError, NNTKError
from pipeline.executors.calls import MOST_TASKS
from pipeline.executors.on_ray import RayExecutor, actor_options, connect, places_on
from pipeline.job.task import Outcome, Task

DEADLY, FAILING = "250", "270"


class Worker:
    """Records every attempt at a tile; one tile kills it for the first `deaths` attempts, another fails."""

    def __init__(self, folder, deaths, failures, seconds, threads):
        self.folder, self.deaths, self.failures, self.seconds = folder, deaths, failures, seconds
        self.threads = threads

    def execute(self, task):
        with (self.folder / task.tile).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if task.tile == DEADLY and attempts(self.folder)[DEADLY] <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        if task.tile == FAILING and self.failures:
            raise NNTKError("tile 270 cannot be had; leave it out")
        time.sleep(self.seconds)
        numbers = {"own": self.threads.own, "whole_node": self.threads.whole_node}
        return Outcome(task.stage, task.tile, str(os.getpid()), 0.0, self.seconds, 0, 0, None, 0, numbers)


def attempts(folder):
    return {path.name: len(path.read_text().splitlines()) for path in folder.iterdir()}


def tasks(count):
    return (Task("numbers", str(number)) for number in range(count))


@pytest.fixture
def executor(tmp_path):
    """A function that makes an executor of two workers, closed after the test."""
    made = []

    def make(deaths=0, failures=0, seconds=0.0, **options):
        made.append(RayExecutor(Worker, tmp_path, deaths, failures, seconds, **{"num_workers": 2} | options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.process
def test_a_task_that_kills_its_workers_is_found_and_its_companions_are_done(executor, tmp_path):
    """Tasks are so short that calls hold many; one of them kills three workers, and the fourth completes it."""
    sizes, found = [], []
    for outcomes in executor(deaths=3, num_cpus=1).run(tasks(400)):
        sizes.append(len(outcomes))
        found += [outcome.tile for outcome in outcomes]
    assert max(sizes) > 8  # calls did hold many tasks
    assert Counter(found) == Counter(str(number) for number in range(400))
    tried = attempts(tmp_path)
    assert tried.pop(DEADLY) == 4
    assert max(tried.values()) == 2  # a companion was blamed at most once, while the culprit was unknown
    assert sum(count - 1 for count in tried.values()) <= 2 * MOST_TASKS


@pytest.mark.process
def test_a_task_that_kills_every_worker_ends_the_run(executor, tmp_path):
    with pytest.raises(NNTKError, match=f"task numbers {DEADLY} lost its worker 4 times, most likely for want of memo"):
        list(executor(deaths=99).run(tasks(400)))
    assert attempts(tmp_path)[DEADLY] == 4


@pytest.mark.process
def test_a_task_that_fails_costs_none_of_those_before_it(executor, tmp_path):
    found = []
    with pytest.raises(NNTKError, match="tile 270 cannot be had; leave it out"):  # noqa: PT012 (what came before counts)
        for outcomes in executor(failures=1).run(tasks(400)):
            found += [outcome.tile for outcome in outcomes]
    assert len(found) == len(set(found))
    # all tasks that its worker finished before it
    mine = (tmp_path / FAILING).read_text().split()[0]
    before = {tile for tile, count in attempts(tmp_path).items() if mine in (tmp_path / tile).read_text().split()}
    before = {tile for tile in before if int(tile) < int(FAILING)}
    assert before  # how many depends on the pace of the machine
    assert before <= set(found)


class Pair:
    """Each of its tasks waits for another one to run at the same time."""

    def __init__(self, threads):
        self.barrier = threading.Barrier(2)

    def execute(self, task):
        self.barrier.wait(60)
        return Outcome(task.stage, task.tile, str(os.getpid()), 0.0, 0.0, 0, 0, None, 0)


@pytest.mark.process
def test_a_worker_may_be_given_two_calls_at_once():
    executor = RayExecutor(Pair, num_workers=1, calls_at_once=2)
    try:
        found = [outcome for outcomes in executor.run(tasks(2)) for outcome in outcomes]
    finally:
        executor.close()
    assert sorted(outcome.tile for outcome in found) == ["0", "1"]
    assert len({outcome.worker for outcome in found}) == 1


@pytest.mark.process
def test_workers_are_stopped_but_for_those_that_are_to_go_on(executor):
    one = executor(seconds=0.05)

    def who(enough):
        """The workers of a stage that runs until it has this many."""
        found: set[int] = set()
        unfinished = takewhile(lambda task: len(found) < enough, tasks(20_000))
        for outcomes in one.run(unfinished):
            found.update(int(outcome.worker) for outcome in outcomes)
        return found

    first = who(2)
    assert len(first) == 2
    one.stop_workers(keep=1)
    (left,) = {int(outcome.worker) for outcomes in one.run(tasks(1)) for outcome in outcomes}
    assert left in first
    psutil.wait_procs([psutil.Process(pid) for pid in first - {left} if psutil.pid_exists(pid)], timeout=60)
    assert [pid for pid in first if psutil.pid_exists(pid)] == [left]
    again = who(2)
    assert left in again
    assert len(again) == 2


class Unborn:
    """Dies, or raises a user's error, in its constructor."""

    def __init__(self, folder, dies, threads):
        with (folder / "starts").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise NNTKError("there is no such device; leave it out")


@pytest.mark.process
@pytest.mark.parametrize(
    ("dies", "message", "starts"),
    [(True, "a worker died 4 times while it started, most likely for want of memory", 4), (False, "no such device", 1)],
)
def test_a_worker_that_cannot_start_ends_the_run(dies, message, starts, tmp_path):
    executor = RayExecutor(Unborn, tmp_path, dies, num_workers=1)
    try:
        with pytest.raises(NNTKError, match=message):
            list(executor.run(tasks(10)))
    finally:
        executor.close()
    assert attempts(tmp_path) == {"starts": starts}


@pytest.fixture
def cluster():
    """A head without CPUs, and two nodes with one CPU each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=80 << 20)
    yield made
    made.shutdown()


@pytest.mark.process
def test_a_lost_node_costs_what_was_in_flight(cluster, executor, tmp_path):
    """Without a replacement the remaining node goes on alone; once there is one, both work."""
    found, numbers, alone, since = [], {}, [], 0
    steps = deque([(100, lambda: cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False))])
    steps.append((600, lambda: cluster.add_node(num_cpus=1, object_store_memory=80 << 20)))
    enough = takewhile(lambda task: int(task.tile) < 1000 or len(numbers) < 3, tasks(20_000))
    for outcomes in executor(seconds=0.02, address=cluster.address).run(enough):
        found += [outcome.tile for outcome in outcomes]
        numbers |= {outcome.worker: outcome.numbers for outcome in outcomes}
        since += len(outcomes)
        if len(steps) == 1 and since > 500:  # seconds after Ray declares the lost node dead
            alone += [outcome.worker for outcome in outcomes]
        if steps and since > steps[0][0] and len(numbers) == 2:
            steps.popleft()[1]()
            since = 0
    assert not steps
    assert len(set(alone)) == 1
    assert Counter(found) == Counter(str(number) for number in range(len(found)))
    assert len(numbers) == 3  # two, and the one on the new node
    assert all(each == {"own": 1, "whole_node": 1} for each in numbers.values())
    assert max(attempts(tmp_path).values()) <= 2


@pytest.mark.process
def test_a_long_first_call_is_left_alone_when_an_idle_node_is_lost(cluster, executor, tmp_path):
    one, lost, found = executor(seconds=10.0, address=cluster.address), [], []
    for outcomes in one.run(tasks(1)):
        found += [outcome.tile for outcome in outcomes]
        if not lost and attempts(tmp_path) == {"0": 1}:
            raylet = psutil.Process(int((tmp_path / "0").read_text())).ppid()
            others = cluster.list_all_nodes()[1:]  # the first is the head
            idle = [node for node in others if raylet not in [p.process.pid for p in node.all_processes["raylet"]]]
            lost += idle
            cluster.remove_node(*idle, allow_graceful=False)
    assert len(lost) == 1
    assert found == ["0"]
    assert attempts(tmp_path) == {"0": 1}


@pytest.mark.process
def test_a_lone_worker_waits_for_another_node(cluster, executor, tmp_path):
    """It waits longer than a task that has lost its worker as often as allowed would take to fail."""
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    one, found, steps = executor(num_workers=1, seconds=0.05, address=cluster.address), [], iter(range(100))
    lost_at = None
    for outcomes in one.run(tasks(60)):
        found += [outcome.tile for outcome in outcomes]
        if len(found) > 10 and lost_at is None:
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
            lost_at = len(found)
        elif lost_at is not None and not outcomes and next(steps) == 15:  # one second per step
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    assert lost_at is not None
    assert lost_at < 60
    assert next(steps) > 15
    assert Counter(found) == Counter(str(number) for number in range(60))
    assert max(attempts(tmp_path).values()) <= 2


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (
            "10.0.0.1:6379",
            ConnectionError("no GCS\nmore"),
            r"the Ray cluster at 10.0.0.1:6379 cannot be joined \(no GCS\)",
        ),
        (None, Exception("The current node timed out"), r"Ray cannot be started here \(The current node timed out\)"),
    ],
)
def test_ray_that_cannot_be_reached_is_named_with_a_way_out(address, error, message, monkeypatch):
    def fail(**options):
        raise error

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(ArgumentError, match=message + r"; check the address .* or set compute.executor=serial"):
        connect(address, 2)


def test_what_ray_is_told_of_a_worker():
    told = {"num_cpus": 3, "num_gpus": 0, "max_concurrency": 1, "max_restarts": 0, "enable_task_events": False}
    assert actor_options(3, 0) == told
    assert actor_options(3, 0, 2) == told | {"max_concurrency": 2}
    assert actor_options(1, 1)["num_gpus"] == 1
    assert actor_options(1, 4)["num_gpus"] == 0.25
    for workers in range(1, 100):  # as Ray counts them, in ten-thousandths to the nearest
        assert round(1e4 * actor_options(1, workers)["num_gpus"]) * workers <= 10_000


def test_places_are_counted_on_living_nodes_by_cpus_and_shares_of_gpus():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 5.0}},
        {"Alive": False, "Resources": {"CPU": 100.0, "GPU": 8.0}},
    ]
    assert places_on(nodes, 1, 0) == 13
    assert places_on(nodes, 3, 0) == 3
    assert places_on(nodes, 1, 1) == 2
    assert places_on(nodes, 1, 3) == 6
    assert places_on(nodes, 2, 3) == 4
    assert places_on([{"Alive": True, "Resources": {"CPU": 64.0, "GPU": 1.0}}], 1, 10) == 10
