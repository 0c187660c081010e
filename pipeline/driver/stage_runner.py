"""A stage carried out: its tasks to an executor, their outcomes to the ledger, a record of it for the manifest.

The driver's side of every stage. What is in the ledger is not done again; which stages there are is not known here.

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
from pipeline.job.task import Outcome, Task
from pipeline.records.ledger import Ledger, LedgerRow, StageTotals
from pipeline.records.lock import RunLock
from pipeline.records.manifest import StageRecord
from pipeline.work.stage import Stage


@dataclass(frozen=True)
class StageRunner:
    """Carries stages out; outcomes go to the ledger, and to the progress display and the lock's heartbeat."""

    ledger: Ledger
    executor: Executor
    progress: Progress
    lock: RunLock

    def run(self, stage: Stage, job: Job, earlier: StageRecord | None) -> StageRecord:
        """Carry out a stage's remaining tasks; the record of it, `earlier` attempts included."""
        done = self.ledger.done(stage.name)
        counts = Counter(task.tile in done for task in stage.tasks(job))
        tasks = _tasks_left(stage, job, self.ledger)
        if stage.uses_all_threads:  # by one worker: the memory of the others is planned for it too
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
        """Carry out tasks of the stage called `name`, `done` of `total` being finished; `title` is what is shown."""
        started, clock = datetime.now(UTC), time.perf_counter()
        with self.progress.stage(title or name, total, done) as bar:
            for outcomes in self.executor.run(tasks):
                self.ledger.tick()
                for outcome in outcomes:
                    self.ledger.append(_row(outcome))
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
    """Whether all tasks of a stage are in the ledger."""
    done = ledger.done(stage.name)
    return all(task.tile in done for task in stage.tasks(job))


def _tasks_left(stage: Stage, job: Job, ledger: Ledger) -> Iterator[Task]:
    """The tasks that are not in the ledger, with the calibration that theirs need."""
    levels = {row.tile: row.numbers["level"] for row in ledger.rows("calibration")}
    done = ledger.done(stage.name)
    for task in stage.tasks(job):
        if task.tile not in done:
            level = levels.get(task.tile.split("/")[0])
            yield task if level is None else replace(task, arguments={"level": level})


def _row(outcome: Outcome) -> LedgerRow:
    """A task's outcome as the ledger keeps it."""
    return LedgerRow(
        stage=outcome.stage,
        tile=outcome.tile,
        worker=outcome.worker,
        started=outcome.started,
        seconds=outcome.seconds,
        bytes=outcome.written_bytes,
        checksum=outcome.checksum,
        error=outcome.numbers.get("relative_error"),
        peak_bytes=outcome.peak_bytes,
        numbers=outcome.numbers,
    )
