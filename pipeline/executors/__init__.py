"""Ways to carry out the tasks of a stage: in this process (`serial`) or on Ray actors (`on_ray`).

An executor knows tasks and outcomes, neither stages nor the ledger.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from pipeline.job.task import Outcome, Task


class Executor(Protocol):
    """Carries out independent tasks and yields their outcomes in the order in which they finish."""

    def run(self, tasks: Iterable[Task]) -> Iterator[Sequence[Outcome]]:
        """Yield outcomes as they come, in portions; an empty portion at least once a second, for the ledger's flush."""

    def stop_workers(self, keep: int = 0) -> None:
        """Stop the processes of all workers but `keep`, and free what they hold; the next tasks start new ones."""

    def close(self) -> None:
        """Stop all processes and close connections; further calls do nothing."""
