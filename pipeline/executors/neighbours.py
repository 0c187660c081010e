"""Who gets which tasks: every worker a run of neighbours, so that what one task has read serves the next.

Stages order their tasks so that neighbours share rows. Workers that took turns would each read every row; a worker that
takes sixteen neighbours reads a row once for all of them. When there are no more, whoever is idle takes half of what
the longest run still holds. Knows nothing of Ray.

Axes: none.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from itertools import islice

from pipeline.job.task import Task

RUN_TASKS = 16  # what a run saves is a sixteenth short of what any could; held back from others it is soon taken over


class Runs:
    """Tasks of one stage, taken from their iterator as they are needed: at most a run for each worker is held."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._stream = iter(tasks)
        self._ended = False
        self._runs: dict[Hashable, deque[Task]] = {}

    def take(self, owner: Hashable, most: int) -> list[Task]:
        """Up to `most` tasks for a worker, the next of its run; none if there are none left.

        Once the iterator has ended, no more than half of the run: the last calls are small ones, and balance.
        """
        run = self._runs.setdefault(owner, deque())
        if not run and not self._ended:
            length = max(RUN_TASKS, 2 * most)
            run.extend(islice(self._stream, length))
            self._ended = len(run) < length
        if not run:
            longest = max(self._runs.values(), key=len)
            run.extendleft(longest.pop() for _ in range(_half(longest)))
        count = min(most, _half(run)) if self._ended else min(most, len(run))
        return [run.popleft() for _ in range(count)]

    def give_back(self, owner: Hashable, tasks: list[Task]) -> None:
        """What a worker was given and has not begun: the first of its run again."""
        self._runs.setdefault(owner, deque()).extendleft(reversed(tasks))


def _half(run: "deque[Task]") -> int:
    """Half of a run's length, rounded up."""
    return -(-len(run) // 2)
