"""A stage carried out: its tasks to an executor, their outcomes to the ledger, a record of it for the manifest.

The driver's side of every stage. What is in the ledger is not done again; which stages there are is not known here.

Units: seconds, bytes.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import ModuleType

from pipeline.executors import Executor
from pipeline.job import Job, Outcome, Task
from pipeline.ledger import Ledger, LedgerRow
from pipeline.lock import RunLock
from pipeline.manifest import StageRecord
from pipeline.progress import Progress


@dataclass(frozen=True)
class StageRunner:
    """Where outcomes go and who is told of them."""

    ledger: Ledger
    executor: Executor
    progress: Progress
    lock: RunLock

    def run(self, stage: ModuleType, job: Job, earlier: StageRecord | None) -> StageRecord:
        """Carry out a stage's remaining tasks; the record of it, `earlier` attempts included."""
        total = sum(1 for _ in stage.tasks(job))
        done = total - pending(stage, job, self.ledger)
        return self.carry_out(stage.NAME, _tasks_left(stage, job, self.ledger), total, done, earlier)

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
            for outcome in self.executor.run(tasks):
                self.ledger.tick()
                if outcome is not None:
                    self.ledger.append(_row(outcome))
                    done += 1
                    bar.advance()
                    self.lock.update(name, done, total)
        self.ledger.flush()
        rows = list(self.ledger.rows(name))
        return StageRecord(
            started=started if earlier is None else earlier.started,
            finished=datetime.now(UTC),
            seconds=time.perf_counter() - clock + (0.0 if earlier is None else earlier.seconds),
            results={
                "tasks": len(rows),
                "seconds": sum(row.seconds for row in rows),
                "bytes": sum(row.bytes for row in rows),
                "peak_bytes": max(row.peak_bytes for row in rows),
            },
        )


def pending(stage: ModuleType, job: Job, ledger: Ledger) -> int:
    """How many tasks of a stage are left."""
    done = ledger.done(stage.NAME)
    return sum(1 for task in stage.tasks(job) if task.tile not in done)


def _tasks_left(stage: ModuleType, job: Job, ledger: Ledger) -> Iterator[Task]:
    """The tasks that are not in the ledger, with the calibration that theirs need."""
    levels = {row.tile: row.numbers["level"] for row in ledger.rows("calibration")}
    done = set(ledger.done(stage.NAME))
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
