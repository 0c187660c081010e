"""Progress: bars, lines, silence, and the time left."""

import io
import re
from threading import Thread

import pytest
from rich.console import Console

from pipeline.driver.progress import LineProgress, SilentProgress, TerminalProgress, make_progress, seconds_left


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=40)


def lines(console):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).rstrip("\n").splitlines()


def test_time_left_is_that_of_the_pace_of_this_session():
    assert seconds_left(elapsed=10.0, initial=0, done=4, total=10) == 15.0
    assert seconds_left(elapsed=10.0, initial=3, done=4, total=10) == 60.0
    assert seconds_left(elapsed=10.0, initial=3, done=3, total=10) is None
    assert seconds_left(elapsed=10.0, initial=0, done=10, total=10) == 0.0


def test_lines_come_after_every_tenth_of_the_tasks(console, clock):
    with LineProgress(console, clock).stage("gram", total=40) as stage:
        for _ in range(40):
            clock.now += 1
            stage.advance()
    assert lines(console)[0] == "gram: started, 0/40 (0 %), 0:00:00 elapsed, ? left"
    assert lines(console)[1] == "gram: running, 4/40 (10 %), 0:00:04 elapsed, 0:00:36 left"
    assert lines(console)[-1] == "gram: finished, 40/40 (100 %), 0:00:40 elapsed"
    assert len(lines(console)) == 1 + 9 + 1


def test_lines_come_after_every_ten_seconds_where_tasks_are_slow(console, clock):
    with LineProgress(console, clock).stage("gram", total=1000, done=500) as stage:
        for _ in range(20):
            clock.now += 2.5
            stage.advance()
    assert lines(console)[0] == "gram: started, 500/1000 (50 %), 0:00:00 elapsed, ? left"
    assert lines(console)[1] == "gram: running, 504/1000 (50 %), 0:00:10 elapsed, 0:20:40 left"
    assert len(lines(console)) == 1 + 5 + 1


def test_an_interrupted_stage_says_where_it_stopped(console, clock):
    def interrupted():
        with LineProgress(console, clock).stage("gram", total=100) as stage:
            stage.advance(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert lines(console)[-1].startswith("gram: stopped, 3/100 (3 %)")


def test_a_stage_without_tasks_and_names_with_brackets(console, clock):
    with LineProgress(console, clock).stage("[red]x", total=0):
        pass
    assert lines(console)[-1] == "[red]x: finished, 0/0 (100 %), 0:00:00 elapsed"


@pytest.mark.parametrize("kind", [LineProgress, TerminalProgress])
def test_advances_of_many_threads_add_up(kind):
    console = Console(file=io.StringIO(), force_terminal=kind is TerminalProgress, width=100)
    with kind(console).stage("gram", total=4000) as stage:
        threads = [Thread(target=lambda: [stage.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "4000/4000" in lines(console)[-1]


def test_bars_show_count_percent_elapsed_and_time_left(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with TerminalProgress(console, clock).stage("gram", total=8, done=2) as stage:
        clock.now += 3
        stage.advance()
    assert re.search(r"gram .* 3/8 +38% 0:00:03 elapsed, 0:00:15 left", lines(console)[-1])


def test_a_resumed_bar_does_not_take_earlier_tasks_for_its_own_pace():
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    with TerminalProgress(console).stage("gram", total=8, done=2):
        pass
    assert "? left" in written.getvalue()


def test_standard_error_decides_between_bars_and_lines(capsys):
    progress = make_progress()
    assert isinstance(progress, LineProgress)
    assert isinstance(make_progress(Console(force_terminal=True)), TerminalProgress)
    with progress.stage("gram", total=1) as stage:
        stage.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 2


def test_silence(capsys):
    with SilentProgress().stage("gram", total=2) as stage:
        stage.advance(2)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
