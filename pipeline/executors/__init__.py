"""Ways to carry out the tasks of a stage: in this process (`serial`) or on Ray actors (`on_ray`).

An executor is thin: it knows tasks and outcomes, neither stages nor the ledger.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from pipeline.job.task import Outcome, Task


class Executor(Protocol):
    """Carries out independent tasks and yields their outcomes in the order in which they finish."""

    def run(self, tasks: Iterable[Task]) -> Iterator[Sequence[Outcome]]:
        """Outcomes as they come, several where they come together; none at least once a second, so that the caller can
        flush its ledger.
        """
        ...

    def stop_workers(self, keep: int = 0) -> None:
        """Give back the processes of all workers but `keep`, and what they hold; connections stay. Further tasks get
        new ones.
        """
        ...

    def close(self) -> None:
        """Give back processes and connections; further calls do nothing."""
        ...
