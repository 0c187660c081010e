"""A worker's threads: for its own tasks, for tasks that have the node to themselves, and afterwards as before."""

from types import SimpleNamespace

import pytest
import torch
from threadpoolctl import threadpool_info

import pipeline.worker
from pipeline.context import Written
from pipeline.cpus import Threads
from pipeline.task import Task
from pipeline.worker import Worker


def threads_seen():
    """Of torch, of BLAS and of OpenMP; one number for each where all libraries of a kind agree."""
    pools = threadpool_info()
    seen = {kind: {pool["num_threads"] for pool in pools if pool["user_api"] == kind} for kind in ("blas", "openmp")}
    assert all(seen.values())
    return {"torch": torch.get_num_threads(), **{kind: max(found) for kind, found in seen.items()}}


@pytest.fixture
def worker(monkeypatch):
    """A worker of two threads on a node of three, whose stages do nothing but look."""

    def execute(context, task):
        if task.tile == "fails":
            raise ValueError("no such tile")
        return Written(numbers=threads_seen())

    stages = {name: SimpleNamespace(USES_ALL_THREADS=name == "solve", execute=execute) for name in ("tiles", "solve")}
    monkeypatch.setattr(pipeline.worker, "STAGES", stages)
    job = SimpleNamespace(layout=SimpleNamespace(batch=8))
    return Worker(job, None, None, Threads(own=2, whole_node=3))


def test_tasks_have_the_threads_that_their_stage_may_use(worker):
    before = threads_seen()
    for stage, expected in (("tiles", 2), ("solve", 3), ("tiles", 2), ("tiles", 2)):
        assert worker.execute(Task(stage, "0")).numbers == dict.fromkeys(before, expected)
        assert threads_seen() == before


def test_threads_are_as_before_after_a_task_that_fails(worker):
    before = threads_seen()
    with pytest.raises(ValueError, match="no such tile"):
        worker.execute(Task("solve", "fails"))
    assert threads_seen() == before
