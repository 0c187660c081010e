"""The serial executor: tasks one after the other in the driver's own process, without Ray."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from pipeline.data import Dataset
from pipeline.job import Job, Outcome, Task
from pipeline.worker import Worker


class SerialExecutor:
    """Runs every task here."""

    def __init__(self, job: Job, dataset: Dataset, state: Mapping[str, Tensor]) -> None:
        self.worker = Worker(job, dataset, state)

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome | None]:
        """Outcomes in the order of the tasks."""
        for task in tasks:
            yield self.worker.execute(task)

    def stop_workers(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to give back."""
