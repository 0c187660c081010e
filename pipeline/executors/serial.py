"""The serial executor: tasks one after the other in the driver's own process, without Ray."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from pipeline.data import Dataset
from pipeline.job.job import Job
from pipeline.job.task import Outcome, Task
from pipeline.runtime.cpus import Threads, available_cpus
from pipeline.work.worker import Worker


class SerialExecutor:
    """Runs every task here."""

    def __init__(self, job: Job, dataset: Dataset, state: Mapping[str, Tensor]) -> None:
        self.worker = Worker(job, dataset, state, Threads(job.layout.threads, available_cpus()))

    def run(self, tasks: Iterable[Task]) -> Iterator[list[Outcome]]:
        """Outcomes in the order of the tasks."""
        for task in tasks:
            yield [self.worker.execute(task)]

    def stop_workers(self, keep: int = 0) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to give back."""
