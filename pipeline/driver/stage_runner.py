"""Runs a stage: gives its tasks to an executor, writes their outcomes to the ledger, and makes the manifest's record.

This is the driver's side of every stage. Tasks that are in the ledger are not repeated. No stage is named here.

Units: seconds, bytes.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from pipeline.driver.progress import Progress
from pipeline.executors import Executor
from pipeline.job.job import Job
from pipeline.job.task import Task
from pipeline.records.ledger import Ledger, StageTotals
from pipeline.records.lock import RunLock
from pipeline.records.manifest import StageRecord
from pipeline.work.stage import Stage


@dataclass(frozen=True)
class StageRunner:
    """Runs stages; reports their outcomes to the ledger, the progress display and the lock's heartbeat."""

    ledger: Ledger
    executor: Executor
    progress: Progress
    lock: RunLock

    def run(self, stage: Stage, job: Job, earlier: StageRecord | None) -> StageRecord:
        """Carry out the remaining tasks of a stage and return its record, which includes `earlier` attempts."""
        done = self.ledger.done(stage.name)
        counts = Counter(task.tile in done for task in stage.tasks(job))
        tasks = _tasks_left(stage, job, self.ledger)
        if stage.uses_all_threads:  # in one worker, whose plan includes the memory of the others
            self.executor.stop_workers(keep=1)
        return self.carry_out(stage.name, tasks, counts.total(), counts[True], earlier)

    def carry_out(
        self,
        name: str,
        tasks: Iterable[Task],
        total: int,
        done: int,
        earlier: StageRecord | None,
        *,
        title: str | None = None,
    ) -> StageRecord:
        """Carry out tasks of a stage and return its record.

        Args:
            name: the name of the stage.
            tasks: the remaining tasks.
            total: the number of all tasks of the stage.
            done: how many of them are finished.
            earlier: the record of an interrupted attempt.
            title: the name to display, if not `name`.
        """
        started, clock = datetime.now(UTC), time.perf_counter()
        with self.progress.stage(title or name, total, done) as bar:
            for outcomes in self.executor.run(tasks):
                self.ledger.tick()
                for outcome in outcomes:
                    self.ledger.append(outcome)
                if outcomes:
                    done += len(outcomes)
                    bar.advance(len(outcomes))
                    self.lock.update(name, done, total)
        self.ledger.flush()
        return StageRecord(
            started=started if earlier is None else earlier.started,
            finished=datetime.now(UTC),
            seconds=time.perf_counter() - clock + (0.0 if earlier is None else earlier.seconds),
            results=asdict(self.ledger.totals().get(name, StageTotals())),
        )


def is_finished(stage: Stage, job: Job, ledger: Ledger) -> bool:
    """Return whether all tasks of a stage are in the ledger."""
    done = ledger.done(stage.name)
    return all(task.tile in done for task in stage.tasks(job))


def _tasks_left(stage: Stage, job: Job, ledger: Ledger) -> Iterator[Task]:
    """The tasks that are not in the ledger, with the calibration that they need."""
    levels = {row.tile: row.numbers["level"] for row in ledger.rows("calibration")}
    done = ledger.done(stage.name)
    for task in stage.tasks(job):
        if task.tile not in done:
            level = levels.get(task.tile.split("/")[0])
            yield task if level is None else replace(task, arguments={"level": level})
