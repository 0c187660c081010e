"""Who gets which tasks: all of them once, neighbours together, and balanced at the end."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.executors.neighbours import RUN_TASKS, Runs
from pipeline.job.task import Task


def stream(count):
    return (Task("gram", f"train/0/{number}") for number in range(count))


def number(task):
    return int(task.tile.rpartition("/")[2])


@given(
    count=st.one_of(st.integers(0, 3 * RUN_TASKS), st.integers(0, 1000)),
    workers=st.integers(1, 7),
    most=st.integers(1, 64),
    seed=st.integers(0, 1 << 16),
)
@example(count=0, workers=1, most=1, seed=0)
@example(count=RUN_TASKS, workers=2, most=64, seed=0)
@example(count=1000, workers=7, most=3, seed=0)
def test_every_task_is_taken_once(count, workers, most, seed):
    runs, taken = Runs(stream(count)), []
    random = np.random.default_rng(seed)
    idle = 0
    while idle < 20:  # twenty random workers in a row get nothing: there is nothing left
        worker = int(random.integers(workers))
        tasks = runs.take(worker, most)
        assert len(tasks) <= most
        if random.random() < 0.2:
            runs.give_back(worker, tasks[1:])
            tasks = tasks[:1]
        taken += tasks
        idle = 0 if tasks else idle + 1
    assert sorted(map(number, taken)) == list(range(count))


def test_a_worker_gets_neighbours_in_their_order_and_is_no_further_ahead_than_its_run():
    pulled = 0

    def counted():
        nonlocal pulled
        for task in stream(10**9):
            pulled += 1
            yield task

    runs = Runs(counted())
    tasks = {worker: [] for worker in "ab"}
    for _ in range(RUN_TASKS):
        for worker, mine in tasks.items():
            mine += runs.take(worker, 1)
    assert [number(task) for task in tasks["a"]] == list(range(RUN_TASKS))
    assert [number(task) for task in tasks["b"]] == list(range(RUN_TASKS, 2 * RUN_TASKS))
    assert pulled == 2 * RUN_TASKS


def test_what_is_given_back_comes_first_again():
    runs = Runs(stream(100))
    first = runs.take("a", 10)
    runs.give_back("a", first[4:])
    assert [number(task) for task in runs.take("a", 8)] == list(range(4, 12))


def test_the_last_tasks_are_shared_by_halves():
    runs = Runs(stream(40))
    sizes = []
    while tasks := runs.take(f"worker {len(sizes)}", 64):
        sizes.append(len(tasks))
    assert sizes[0] == 20  # its run is all forty tasks, and the iterator has ended
    assert sum(sizes) == 40
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 4


def test_how_many_are_left_is_known_without_reading_more_than_is_asked_for():
    pulled = []
    runs = Runs(task for task in stream(20) if pulled.append(task) is None)
    assert runs.holds(3)
    assert len(pulled) == 3
    taken = runs.take("a", 2)
    assert runs.holds(18)
    assert not runs.holds(19)
    runs.give_back("a", taken)
    assert runs.holds(20)
    assert not runs.holds(21)
    assert [number(task) for task in runs.take("a", 2)] == [0, 1]
