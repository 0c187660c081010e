"""How many tasks go to a worker in one call, and how a worker carries out a call. Knows nothing of Ray.

A call costs driver and worker about a millisecond, whatever is in it. So short tasks go together, as many as take a
fraction of a second; a task that takes longer goes alone. What a lost worker or a killed driver costs stays small:
a call that takes longer than was thought is cut short, and its other tasks go back.

Units: seconds.
"""

from collections.abc import Callable, Sequence

from pipeline.job.task import Outcome, Task

MOST_TASKS = 64
CALL_SECONDS = 0.25
CALLS_A_SECOND = 250.0  # of all workers together: a quarter of what a driver can do
LONGEST_CALL_SECONDS = 4.0


class Pace:
    """The length of calls, from the time that tasks have taken so far; for one stage.

    A call is to take a quarter of a second, longer only where so many workers would keep the driver busy. Its length at
    most doubles from one to the next, so that few are wrong by much.
    """

    def __init__(self, num_workers: int) -> None:
        self.call_seconds = min(LONGEST_CALL_SECONDS, max(CALL_SECONDS, num_workers / CALLS_A_SECOND))
        self._task_seconds = 0.0
        self._longest = 0

    @property
    def limit_seconds(self) -> float:
        """After which a worker begins no further task of a call."""
        return 2.0 * self.call_seconds

    def num_tasks(self) -> int:
        """How many tasks the next call takes; one, as long as nothing is known."""
        fitting = self.call_seconds / max(self._task_seconds, self.call_seconds / MOST_TASKS)
        return max(1, min(int(fitting), 2 * self._longest))

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """What a call took; each counts for half of what is known."""
        mean = sum(outcome.seconds for outcome in outcomes) / len(outcomes)
        self._task_seconds = (self._task_seconds + mean) / 2 if self._longest else mean
        self._longest = max(self._longest, len(outcomes))


def carry_out(execute: Callable[[Task], Outcome], tasks: Sequence[Task], limit_seconds: float) -> list[Outcome]:
    """The outcomes of the first tasks of a call, one at least: up to the time limit, or to a task that fails.

    A task that fails is only let through as the first of a call: so what was finished before it is not lost.
    """
    outcomes: list[Outcome] = []
    for task in tasks:
        try:
            outcomes.append(execute(task))
        except Exception:
            if not outcomes:
                raise
            break
        if sum(outcome.seconds for outcome in outcomes) >= limit_seconds:  # not the time that another call had
            break
    return outcomes
