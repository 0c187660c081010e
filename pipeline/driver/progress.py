"""Progress of the stages on standard error: bars on a terminal, plain lines elsewhere, nothing in tests.

It shows the progress of each stage and its remaining time. It prints no results and never writes to standard output.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from threading import Lock
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

LINE_SECONDS = 10.0
LINE_FRACTION = 0.1


class StageProgress(Protocol):
    """The running stage's counter."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more finished tasks. Any thread may call this."""


class Progress(Protocol):
    """Shows the progress of a run."""

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[StageProgress]:
        """Show a stage of `total` tasks while the context is open; an earlier run finished `done` of them."""


def make_progress(console: Console | None = None) -> Progress:
    """Return a progress display for standard error: bars if it is a terminal, lines if it is not."""
    console = console or Console(stderr=True)
    return TerminalProgress(console) if console.is_terminal else LineProgress(console)


def seconds_left(elapsed: float, initial: int, done: int, total: int) -> float | None:
    """Return the time for the remaining tasks at the mean pace of this session; None before its first task has ended.

    Args:
        elapsed: seconds since the stage began in this session.
        initial: tasks finished before this session; they do not count for the pace.
        done: all tasks finished so far, including `initial`.
        total: all tasks.
    """
    return elapsed * (total - done) / (done - initial) if done > initial else None


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[StageProgress]:
        """See `Progress.stage`."""
        yield _SilentStage()


class TerminalProgress:
    """One bar per stage with count, percentage, elapsed time and remaining time."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[StageProgress]:
        """See `Progress.stage`."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            _TimesColumn(),
        )
        with Bars(*columns, console=self._console, get_time=self._clock) as bars:
            yield _TerminalStage(bars, name, total, done)


class LineProgress:
    """A line at the start and the end of a stage, and after every tenth of its tasks or every ten seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[StageProgress]:
        """See `Progress.stage`."""
        stage = _LineStage(self._console, self._clock, name, total, done)
        stage.say("started")
        try:
            yield stage
        except BaseException:
            stage.say("stopped")
            raise
        stage.say("finished")


class _SilentStage:
    def advance(self, n: int = 1) -> None:
        pass


class _TerminalStage:
    def __init__(self, bars: Bars, name: str, total: int, done: int) -> None:
        self._bars = bars
        self._task = bars.add_task(name, total=total, completed=done, initial=done)

    def advance(self, n: int = 1) -> None:
        self._bars.advance(self._task, n)


class _LineStage:
    def __init__(self, console: Console, clock: Callable[[], float], name: str, total: int, done: int) -> None:
        self._console, self._clock = console, clock
        self._name, self._total, self._initial, self._done = name, total, done, done
        self._began = self._said_at = clock()
        self._said_done = done
        self._lock = Lock()

    def advance(self, n: int = 1) -> None:
        with self._lock:
            self._done += n
            enough_tasks = self._done - self._said_done >= LINE_FRACTION * self._total
            enough_time = self._clock() - self._said_at >= LINE_SECONDS
            if self._done < self._total and (enough_tasks or enough_time):
                self.say("running")

    def say(self, state: str) -> None:
        now = self._clock()
        percent = 100 * self._done / self._total if self._total else 100.0
        times = _times(now - self._began, self._initial, self._done, self._total)
        text = f"{self._name}: {state}, {self._done}/{self._total} ({percent:.0f} %), {times}"
        # Plain text: no wrapping, markup or colours, because the output may be a log file.
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)
        self._said_at, self._said_done = now, self._done


class _TimesColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        # rich's own estimate uses the last 30 seconds only, so it fails for tasks that take longer.
        return Text(_times(task.elapsed or 0.0, task.fields["initial"], int(task.completed), int(task.total or 0)))


def _times(elapsed: float, initial: int, done: int, total: int) -> str:
    left = seconds_left(elapsed, initial, done, total)
    shown = f"{_clock_time(elapsed)} elapsed"
    if done >= total:
        return shown
    return f"{shown}, {'?' if left is None else _clock_time(left)} left"


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
