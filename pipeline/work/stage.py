"""The interface of stages: a name, the stages it reads, its tasks, and the execution of a task.

To add a stage, subclass `Stage` in a new file: in this project with one line in `pipeline.work.stages`, from another
package as `stages: ["python:module:Name"]` in a configuration.

Axes: none.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from pipeline.job.job import Job, Task
from pipeline.work.context import Context, Written


class Stage(ABC):
    """One stage of a run. A stage keeps nothing between tasks.

    Attributes:
        name: its name in the ledger, the manifest and messages.
        reads: names of the stages whose results it reads. They run before it; if their results turn out to be damaged,
            it is done again.
        uses_all_threads: whether one task runs at a time, with all threads and memory of its machine.

    Example:
        >>> class Trace(Stage):
        ...     name = "trace"
        ...     reads = ("gram",)
        ...
        ...     def execute(self, context, task):
        ...         return Written(numbers={"trace": float(context.store.read("train/gram").trace())})
        >>> [task.tile for task in Trace().tasks(None)]
        ['trace']
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    uses_all_threads: ClassVar[bool] = False

    def tasks(self, job: Job) -> Iterator[Task]:
        """List the stage's tasks in order; by default one for the whole kernel.

        A task is named in the ledger by stage and tile, so that a resumed run does not repeat it.
        """
        yield Task(self.name, self.name)

    @abstractmethod
    def execute(self, context: Context, task: Task) -> Written:
        """Carry out one task: a pure function of job and task, which may be repeated.

        Args:
            context: job, data, model, features and store.
            task: one of `tasks`.

        Returns:
            What was written, with numbers for the ledger; the numbers of an additional stage become results of the run.
        """
