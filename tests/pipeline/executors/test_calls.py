"""The length of calls, and how a worker runs one."""

import pytest

from pipeline.executors.calls import CALL_SECONDS, MOST_TASKS, Pace, carry_out
from pipeline.job.task import Outcome, Task

TASKS = [Task("gram", str(number)) for number in range(5)]


def outcome(task, seconds=0.0):
    return Outcome(task.stage, task.tile, "worker", 0.0, seconds, 0, 0, None, 0)


def lengths(seconds, calls, num_workers=2):
    """The lengths of `calls` calls when every task takes `seconds`."""
    pace, found = Pace(num_workers), []
    for _ in range(calls):
        found.append(pace.num_tasks())
        pace.note([outcome(TASKS[0], seconds)] * found[-1])
    return found


def test_short_tasks_go_together_and_long_ones_alone():
    assert lengths(1e-6, 9) == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert lengths(0.011, 7) == [1, 2, 4, 8, 16, 22, 22]
    assert lengths(1.0, 4) == [1, 1, 1, 1]
    assert max(lengths(0.0, 20)) == MOST_TASKS


def test_many_workers_have_longer_calls_up_to_a_limit():
    assert Pace(2).call_seconds == CALL_SECONDS
    assert Pace(500).call_seconds == 2.0
    assert Pace(10**6).call_seconds == 4.0
    assert lengths(0.5, 6, num_workers=500) == [1, 2, 4, 4, 4, 4]


def test_tasks_that_become_long_go_alone_again_within_a_few_calls():
    pace = Pace(2)
    for _ in range(10):
        pace.note([outcome(TASKS[0], 1e-4)] * pace.num_tasks())
    found = []
    for _ in range(4):
        pace.note([outcome(TASKS[0], 1.0)])
        found.append(pace.num_tasks())
    assert found == [1, 1, 1, 1]


def test_a_call_ends_at_its_limit_but_not_before_its_first_task():
    def slow(task):
        return outcome(task, 0.02)

    assert [found.tile for found in carry_out(slow, TASKS, 0.0)] == ["0"]
    assert [found.tile for found in carry_out(slow, TASKS, 0.03)] == ["0", "1"]
    assert [found.tile for found in carry_out(slow, TASKS, 100.0)] == ["0", "1", "2", "3", "4"]


def test_a_task_that_fails_ends_a_call_and_is_let_through_as_the_first_of_one():
    def failing(task):
        if task.tile == "2":
            raise ValueError("no such tile")
        return outcome(task)

    assert [found.tile for found in carry_out(failing, TASKS, 100.0)] == ["0", "1"]
    with pytest.raises(ValueError, match="no such tile"):
        carry_out(failing, TASKS[2:], 100.0)
