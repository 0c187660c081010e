"""The serial executor: tasks one after the other in the driver's own process, without Ray."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from pipeline.data import Dataset
from pipeline.job.job import Job
from pipeline.job.task import Outcome, Task
from pipeline.runtime.cpus import Threads, available_cpus
from pipeline.work.worker import Worker


class SerialExecutor:
    """Run every task in this process; see `pipeline.executors.Executor`.

    Args:
        job: what the run computes.
        dataset: its examples.
        state: parameters and buffers of the model.
    """

    def __init__(self, job: Job, dataset: Dataset, state: Mapping[str, Tensor]) -> None:
        self.worker = Worker(job, dataset, state, Threads(job.layout.threads, available_cpus()))

    def run(self, tasks: Iterable[Task]) -> Iterator[list[Outcome]]:
        """Yield one outcome after the other, in the order of the tasks."""
        for task in tasks:
            yield [self.worker.execute(task)]

    def stop_workers(self, keep: int = 0) -> None:
        """Do nothing: there are no other processes."""

    def close(self) -> None:
        """Do nothing: there are no other processes."""
