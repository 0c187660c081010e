"""A worker's threads: for ordinary tasks, for tasks that use the whole node, and restored afterwards; and two tasks at
a time.
"""

import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

import pipeline.work.worker
from nntk_dist.errors import NNTKError
from pipeline.decisions.layout import overlaps_writing, writing_threads
from pipeline.job.task import Task
from pipeline.runtime.cpus import Threads
from pipeline.work.context import Written
from pipeline.work.worker import Worker

THREADS = Threads(own=2, whole_node=3)


def threads_seen():
    """The threads of torch, BLAS and OpenMP: the largest number of each kind."""
    pools = threadpool_info()
    seen = {kind: {pool["num_threads"] for pool in pools if pool["user_api"] == kind} for kind in ("blas", "openmp")}
    assert all(seen.values())
    return {"torch": torch.get_num_threads(), **{kind: max(found) for kind, found in seen.items()}}


def shares(one, other):
    """Whether two tensors share memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.fixture
def worker(monkeypatch):
    """A worker of two threads on a node of three, whose stages only record the threads."""

    def execute(context, task):
        if task.tile == "fails":
            raise ValueError("no such tile")
        return Written(numbers=threads_seen())

    stages = {name: SimpleNamespace(uses_all_threads=name == "solve", execute=execute) for name in ("tiles", "solve")}
    monkeypatch.setattr(pipeline.work.worker, "stage_named", lambda name, job: stages[name])
    job = SimpleNamespace(layout=SimpleNamespace(batch=8, threads=2), run_dir="here")
    made = Worker(job, None, None, THREADS)
    write_all, forget = Mock(side_effect=lambda pieces, threads: [(0, 0) for _ in pieces]), Mock()
    monkeypatch.setattr(made.context, "store", SimpleNamespace(write_all=write_all, forget=forget))
    return made


def test_tasks_have_the_threads_that_their_stage_may_use(worker):
    before = threads_seen()
    for stage, expected in (("tiles", 2), ("solve", 3), ("tiles", 2), ("tiles", 2)):
        assert worker.execute(Task(stage, "0")).numbers == dict.fromkeys(before, expected)
        assert threads_seen() == before


def test_what_is_kept_for_tiles_is_given_back_to_a_task_of_the_whole_kernel(worker):
    worker.context._cache["rows"] = {"dense": torch.zeros(3)}, False
    worker.context.results.give_back([memory := torch.zeros(3)])
    worker.execute(Task("tiles", "0"))
    assert worker.context._cache
    assert shares(worker.context.results.empty((3,), dtype=memory.dtype, device=memory.device), memory)
    worker.context.results.give_back([memory])
    assert not worker.context.store.forget.called
    worker.execute(Task("solve", "0"))
    assert worker.context.store.forget.called
    assert not worker.context._cache
    assert not shares(worker.context.results.empty((3,), dtype=memory.dtype, device=memory.device), memory)


_FAULTS = """
import resource, torch
from pipeline.runtime.allocator import keep_freed_memory
print(keep_freed_memory())
def window():
    return torch.ones(8, 512, 512, dtype=torch.float64).sqrt()
for _ in range(3):
    window()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    window()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
@pytest.mark.parametrize("variables", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(variables):
    """Two arrays of 16 MiB are 8,192 pages."""
    run = [sys.executable, "-c", _FAULTS]
    kept, faults = subprocess.run(run, env=os.environ | variables, capture_output=True, check=True).stdout.split()
    assert kept.decode() == str(not variables)
    assert (float(faults) < 4000) == (not variables)


def test_memory_of_results_is_free_once_they_are_written(worker, monkeypatch):
    made, free = [], []

    def execute(context, task):
        memory = context.results.empty((2, 3), dtype=torch.float32, device=torch.device("cpu"))
        made.append(memory.fill_(float(task.tile)))
        written = Written(results=[memory])
        context.write_later(written, "array", (0, 0), memory)
        free.append(len(context.results))
        return written

    def write_all(pieces, threads):
        assert len(worker.context.results) == 0
        assert (pieces[0][2] == len(made) - 1).all()
        return [(24, 1)]

    stage = SimpleNamespace(uses_all_threads=False, execute=execute)
    monkeypatch.setattr(pipeline.work.worker, "stage_named", lambda name, job: stage)
    worker.context.store = SimpleNamespace(write_all=write_all)
    for tile in range(3):
        worker.execute(Task("tiles", str(tile)))
    assert free == [0, 0, 0]
    assert shares(made[0], made[1])
    assert shares(made[0], made[2])


def test_memory_is_given_back_once_though_a_task_writes_in_two_steps(worker):
    memory = torch.zeros(2, 3)
    written = Written(results=[memory])
    worker.context.write(written, "array", (0, 0), memory)
    worker.context.finish(written)
    assert len(worker.context.results) == 1


@pytest.mark.parametrize(("run_dir", "expected"), [("runs/digits", 2), ("s3://bucket/run", 3)])
def test_threads_that_write(run_dir, expected):
    assert writing_threads(SimpleNamespace(layout=SimpleNamespace(threads=2), run_dir=run_dir)) == expected


def test_threads_are_as_before_after_a_task_that_fails(worker):
    before = threads_seen()
    with pytest.raises(ValueError, match="no such tile"):
        worker.execute(Task("solve", "fails"))
    assert threads_seen() == before


def test_a_task_computes_while_the_one_before_it_is_written_and_never_beside_another(worker, monkeypatch):
    """Neither task could finish if the second had to wait for the first to be written."""
    computing, second_computes, seen = [], threading.Event(), []

    def execute(context, task):
        computing.append(task.tile)
        seen.append(len(computing))
        if task.tile == "1":
            second_computes.set()
        time.sleep(0.05)  # gives another task the chance to start
        computing.remove(task.tile)
        written = Written()
        context.write_later(written, "array", (0,), np.zeros(1))
        return written

    def write_all(pieces, threads):
        assert second_computes.wait(60)
        return [(8, 1)]

    stage = SimpleNamespace(uses_all_threads=False, execute=execute)
    monkeypatch.setattr(pipeline.work.worker, "stage_named", lambda name, job: stage)
    worker.context.store = SimpleNamespace(write_all=write_all)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(worker.execute, [Task("tiles", "0"), Task("tiles", "1")]))
    assert [outcome.tile for outcome in outcomes] == ["0", "1"]
    assert [outcome.bytes for outcome in outcomes] == [8, 8]
    assert seen == [1, 1]


def test_waiting_for_a_turn_is_not_time_of_the_task(worker, monkeypatch):
    """A task takes one second of the clock, and only after the other has requested its turn."""
    now, second_asks = 0.0, threading.Event()

    class Turn:
        """A lock that signals when somebody waits for it."""

        def __init__(self):
            self.lock = threading.Lock()

        def __enter__(self):
            if not self.lock.acquire(blocking=False):
                second_asks.set()
                self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()

    def execute(context, task):
        nonlocal now
        assert second_asks.wait(60)
        now += 1.0
        return Written()

    stage = SimpleNamespace(uses_all_threads=False, execute=execute)
    monkeypatch.setattr(pipeline.work.worker, "stage_named", lambda name, job: stage)
    monkeypatch.setattr(pipeline.work.worker, "time", SimpleNamespace(time=lambda: now, perf_counter=lambda: now))
    worker._turn = Turn()
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(worker.execute, [Task("tiles", "0"), Task("tiles", "1")]))
    last = max(outcomes, key=lambda outcome: outcome.started)
    assert (last.started, last.seconds) == (1.0, 1.0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), MemoryError()])
def test_memory_that_runs_out_in_a_tile_is_told_with_its_name(worker, monkeypatch, error):
    stages = {"gram": SimpleNamespace(uses_all_threads=False, execute=Mock(side_effect=error))}
    monkeypatch.setattr(pipeline.work.worker, "stage_named", lambda name, job: stages[name])
    reason = r"CUDA out of memory\. Tried" if str(error) else "MemoryError"
    for _ in range(2):  # the turn was released
        with pytest.raises(NNTKError, match=rf"^gram train/3/4 does not fit into memory \({reason}\); use .*--resume$"):
            worker.execute(Task("gram", "train/3/4"))
    stages["gram"].execute.side_effect = RuntimeError("something else")
    with pytest.raises(RuntimeError, match=r"^something else$"):
        worker.execute(Task("gram", "train/3/4"))


def test_a_worker_writes_beside_its_computing_where_one_of_the_two_waits():
    def overlaps(device, run_dir):
        return overlaps_writing(SimpleNamespace(layout=SimpleNamespace(device=device), run_dir=run_dir))

    assert overlaps("cuda", "/runs/digits")
    assert overlaps("cpu", "s3://bucket/runs/digits")
    assert not overlaps("cpu", "/runs/digits")
