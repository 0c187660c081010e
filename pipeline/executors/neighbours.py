"""Who gets which tasks: each worker a run of neighbours, so that what one task has read serves the next.

Stages order their tasks so that neighbours share rows. If workers took turns, each would read every row; a worker that
takes sixteen neighbours reads a row once for all of them. When no more tasks come, an idle worker takes half of the
longest run that is left. This module knows nothing of Ray.

Axes: none.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from itertools import islice

from pipeline.job.task import Task

RUN_TASKS = 16  # saves fifteen sixteenths of the reading, and is soon shared out when the tasks end


class Runs:
    """The tasks of one stage; at most a run for each worker is held, the others stay in their iterator.

    Args:
        tasks: in the order of the stage.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._stream = iter(tasks)
        self._next: deque[Task] = deque()  # read from the stream, and not yet in a run
        self._ended = False
        self._left = 0  # how many are in `_next` and in runs
        self._runs: dict[Hashable, deque[Task]] = {}

    def holds(self, count: int) -> bool:
        """Return whether at least `count` tasks are left to take; no more than these are read from the iterator."""
        self._read(count - self._left + len(self._next))
        return self._left >= count

    def take(self, owner: Hashable, most: int) -> list[Task]:
        """Return the next tasks of a worker's run, and remove them; none if no tasks are left.

        Once the iterator has ended, this is no more than half of the run, so that the last calls are small and balance.

        Args:
            owner: identifies the worker.
            most: how many tasks at most.
        """
        run = self._runs.setdefault(owner, deque())
        if not run:
            length = max(RUN_TASKS, 2 * most)
            self._read(length)
            run.extend(self._next.popleft() for _ in range(min(length, len(self._next))))
        if not run:
            longest = max(self._runs.values(), key=len)
            run.extendleft(longest.pop() for _ in range(_half(longest)))
        count = min(most, _half(run)) if self._ended else min(most, len(run))
        self._left -= count
        return [run.popleft() for _ in range(count)]

    def give_back(self, owner: Hashable, tasks: list[Task]) -> None:
        """Put tasks that a worker has taken and not begun back to the beginning of its run."""
        self._runs.setdefault(owner, deque()).extendleft(reversed(tasks))
        self._left += len(tasks)

    def _read(self, count: int) -> None:
        """Read ahead until `count` tasks are there, or the iterator ends."""
        missing = count - len(self._next)
        if missing > 0 and not self._ended:
            read = list(islice(self._stream, missing))
            self._next.extend(read)
            self._left += len(read)
            self._ended = len(read) < missing


def _half(run: "deque[Task]") -> int:
    """Return half of a run's length, rounded up."""
    return -(-len(run) // 2)
