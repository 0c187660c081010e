"""A stage run by an executor that records its calls."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from pipeline.driver.stage_runner import StageRunner
from pipeline.job.task import Outcome, Task
from pipeline.records.ledger import Ledger
from pipeline.records.lock import RunLock
from pipeline.storage.run_storage import RunStorage


class Noting:
    """Runs every task immediately."""

    def __init__(self):
        self.asked = []

    def run(self, tasks):
        for task in tasks:
            self.asked.append(task.tile)
            yield [Outcome(task.stage, task.tile, "worker", 0.0, 0.0, 0, 0, None, 0)]

    def stop_workers(self, keep=0):
        self.asked.append(("stop", keep))


class Silent:
    @contextmanager
    def stage(self, name, total, done):
        yield SimpleNamespace(advance=lambda count: None)


@pytest.mark.parametrize("alone", [True, False])
def test_a_stage_of_all_threads_has_the_machine_to_itself(alone, tmp_path):
    storage, executor = RunStorage(str(tmp_path)), Noting()
    stage = SimpleNamespace(name="spectrum", uses_all_threads=alone, tasks=lambda job: [Task("spectrum", "all")])
    with RunLock(storage) as lock:
        StageRunner(Ledger(storage), executor, Silent(), lock).run(stage, None, None)
    assert executor.asked == ([("stop", 1), "all"] if alone else ["all"])
