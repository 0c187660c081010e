"""Calls of workers: how many tasks a call holds, and how a worker carries it out. Ray does not belong here.

A call costs driver and worker about a millisecond, for any number of tasks. So short tasks share a call, for a fraction
of a second in total; a longer task is a call by itself. A lost worker or a killed driver then costs little: a call that
takes longer than expected is cut short, and its other tasks are handed out again.

Units: seconds.
"""

from collections.abc import Callable, Sequence

from pipeline.job.task import Outcome, Task

MOST_TASKS = 64
CALL_SECONDS = 0.25
CALLS_A_SECOND = 250.0  # of all workers together: a quarter of what a driver can do
LONGEST_CALL_SECONDS = 4.0


class Pace:
    """The length of calls in one stage, from the time that its tasks have taken so far.

    A call should take a quarter of a second, or longer if the number of workers would overload the driver. From one
    call to the next the length at most doubles, so that few calls are wrong by much.

    Args:
        num_workers: workers that the driver serves.
    """

    def __init__(self, num_workers: int) -> None:
        self.call_seconds = min(LONGEST_CALL_SECONDS, max(CALL_SECONDS, num_workers / CALLS_A_SECOND))
        self._task_seconds = 0.0
        self._longest = 0

    @property
    def limit_seconds(self) -> float:
        """The time after which a worker begins no further task of a call."""
        return 2.0 * self.call_seconds

    def num_tasks(self) -> int:
        """Return how many tasks the next call takes; one while nothing is known."""
        fitting = self.call_seconds / max(self._task_seconds, self.call_seconds / MOST_TASKS)
        return max(1, min(int(fitting), 2 * self._longest))

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """Take a finished call into account; it weighs as much as all calls before it."""
        mean = sum(outcome.seconds for outcome in outcomes) / len(outcomes)
        self._task_seconds = (self._task_seconds + mean) / 2 if self._longest else mean
        self._longest = max(self._longest, len(outcomes))


def carry_out(execute: Callable[[Task], Outcome], tasks: Sequence[Task], limit_seconds: float) -> list[Outcome]:
    """Carry out the first tasks of a call, at least one, up to the time limit or to a task that fails.

    A failure is raised only by the first task of a call, so that what was finished before it is not lost.

    Args:
        execute: carries out one task.
        tasks: of the call.
        limit_seconds: no further task begins once the finished ones have taken this long.

    Returns:
        The outcomes, in order.

    Raises:
        Exception: the first task raises it.
    """
    outcomes: list[Outcome] = []
    for task in tasks:
        try:
            outcomes.append(execute(task))
        except Exception:
            if not outcomes:
                raise
            break
        if sum(outcome.seconds for outcome in outcomes) >= limit_seconds:  # not wall time: another call may run beside
            break
    return outcomes
