"""Runs that are stopped: a killed driver, Ctrl-C, a killed worker. All use real processes and are compared with an
undisturbed run.

A stop may cost the tasks in flight and those not yet flushed to the ledger (by default the last five seconds), but the
results stay the same bit for bit.
"""

import os
import re
import shutil
import signal
import time

import psutil
import pytest

from tests.pipeline.tools import NUM_TRAIN, arguments, assert_same_bits, finished, ledger, nntk, start

pytestmark = pytest.mark.process

FLUSH_SECONDS = 0.5
# A driver whose ledger waits for half a second instead of five, so that a short stage has several flushes, and that
# takes longer over each row than workers over a tile: if several are ready, none may be skipped.
SLOW_AND_OFTEN_FLUSHED = f"""
import functools, time
import pipeline.driver.run

class Ledger(pipeline.driver.run.Ledger):
    def append(self, row):
        super().append(row)
        time.sleep(0.03 * (row.stage == "gram"))

pipeline.driver.run.Ledger = functools.partial(Ledger, flush_seconds={FLUSH_SECONDS})
"""
# Calls of at most three tiles, and of two, to limit what a lost call costs.
CALLS_OF_THREE = "import pipeline.executors.calls; pipeline.executors.calls.MOST_TASKS = 3"
CALLS_OF_TWO = "import pipeline.executors.calls; pipeline.executors.calls.MOST_TASKS = 2"
SLACK_SECONDS = 1.5  # allows for a poll of the driver and a busy machine
SETS = ("data.test=23", "compute.tile=8", "compute.stderr=sample", "compute.workers=2", "kernel.blocks=4")
TILE_ROWS = -(-NUM_TRAIN // 8)
ENOUGH = 40  # tiles
WAIT_SECONDS = 180.0


def held_before(number, gate="/nowhere", *, stage="gram", part=1):
    """Code that makes a driver's workers wait for the file `gate` before the Gram tiles of this row and later ones, or
    before other tiles by another part of their name. The stage is then begun and not ended when a test stops it, on any
    machine.
    """
    return f"""
import os, pathlib, time
import pipeline.work.worker

class Worker(pipeline.work.worker.Worker):
    def execute(self, task):
        gate = pathlib.Path({str(gate)!r})
        held = task.stage == {stage!r} and int(task.tile.split("/")[{part}]) >= {number}
        if held and gate.parent.name:
            gate.with_name(f"held-{{os.getpid()}}").touch()
        while held and not gate.exists():
            time.sleep(0.01)
        return super().execute(task)

pipeline.work.worker.Worker = Worker
"""


def tiles_before(row):
    """How many Gram tiles come before this row of tiles."""
    return row * TILE_ROWS - row * (row - 1) // 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run without interruption."""
    return finished(tmp_path_factory.mktemp("undisturbed") / "run", *SETS)


def wait_until(condition, process):
    """Wait for something that a driver does; the test fails if the driver ends or takes too long."""
    limit = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.02)


def gram_tiles(run_dir):
    """Tiles (i ≤ j) of the train kernel on disk, with the time when they were written."""
    files = run_dir.glob("kernel.zarr/train/gram_unbiased/c/*/*")
    stamps = {(int(file.parent.name), int(file.name)): file.stat().st_mtime for file in files if file.name.isdecimal()}
    return {f"train/{i}/{j}": stamp for (i, j), stamp in stamps.items() if i <= j}


def gram_rows(run_dir):
    """Rows of the gram stage in the ledger."""
    return {tile: row for (stage, tile), row in ledger(run_dir).items() if stage == "gram"}


def makers_of(tiles, run_dir):
    """The processes that have made these Gram tiles."""
    rows = gram_rows(run_dir)
    return {int(rows[tile]["worker"].rpartition(":")[2]) for tile in tiles}


def children_of(process):
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes):
    """Check that these processes end, except Ray's agents, which notice their parent's death within a minute."""
    _, alive = psutil.wait_procs([process for process in processes if not named_agent(process)], timeout=WAIT_SECONDS)
    assert alive == []


def named_agent(process):
    try:
        return "Agent" in process.name()
    except psutil.NoSuchProcess:
        return False


def test_a_started_process_heeds_ctrl_c_although_its_starter_ignores_it():
    """Shells start background jobs with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        driver = start(
            "plan", prelude="import signal; print(signal.getsignal(signal.SIGINT).__name__); raise SystemExit"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = driver.communicate(timeout=WAIT_SECONDS)
    assert out.strip() == "default_int_handler", err


@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_a_killed_driver_costs_what_was_in_flight(executor, undisturbed, tmp_path):
    run_dir, sets = tmp_path / "run", (*SETS, f"compute.executor={executor}")
    driver = start(*arguments("run", run_dir, *sets), prelude=CALLS_OF_THREE + held_before(8) + SLOW_AND_OFTEN_FLUSHED)
    wait_until(lambda: len(gram_tiles(run_dir)) == tiles_before(8), driver)
    descendants = children_of(driver)
    driver.kill()
    killed_at = time.time()
    driver.communicate()
    assert_gone(descendants)

    before, on_disk = ledger(run_dir), gram_tiles(run_dir)
    assert len(on_disk) == tiles_before(8)
    state = nntk("status", run_dir)
    assert "stopped" in state.out
    # Counted from the last tile, not from the kill: a serial driver does not look at its ledger while a task runs.
    last = max(on_disk.values())
    long_since = {tile for tile, stamp in on_disk.items() if stamp < last - FLUSH_SECONDS - SLACK_SECONDS}
    assert len(long_since) > ENOUGH
    assert long_since <= {tile for stage, tile in before if stage == "gram"}

    resumed = start(*arguments("run", run_dir, *sets, resume=True))
    out, err = resumed.communicate(timeout=WAIT_SECONDS)
    assert resumed.returncode == 0, out + err
    assert_same_bits(undisturbed, run_dir)
    after = ledger(run_dir)
    assert after.keys() == ledger(undisturbed).keys()
    assert {key: row["started"] for key, row in before.items()} == {key: after[key]["started"] for key in before}
    assert min(row["started"] for key, row in after.items() if key not in before) > killed_at


def test_a_driver_killed_while_it_makes_features(tmp_path):
    """The undisturbed run begins with the killed one's manifest: whether models are stacked is measured when a run is
    planned, and two plans may differ in that.
    """
    sets = ("kernel.estimator=weight", "kernel.draws=1024", "compute.batch=16")
    run_dir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    driver = start(*arguments("run", run_dir, *sets), prelude=held_before(6, stage="features", part=2))
    files = run_dir / "kernel.zarr/train/features/c/0"
    wait_until(lambda: files.is_dir() and {file.name for file in files.iterdir()} == set("012345"), driver)
    driver.kill()
    driver.communicate()
    (files / "5.0123456789abcdef.partial").write_bytes(b"half")
    undisturbed.mkdir()
    shutil.copy(run_dir / "manifest.json", undisturbed)

    finished(run_dir, *sets, resume=True)
    assert list(run_dir.rglob("*.partial")) == []
    assert ("features", "train/0/7") in ledger(run_dir)  # the run was not finished
    assert_same_bits(finished(undisturbed, *sets, resume=True), run_dir)


@pytest.mark.parametrize(("stop", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_stopped_serial_run_says_how_to_go_on(stop, to_group, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    driver = start(*arguments("run", run_dir, *SETS), prelude=held_before(4))
    wait_until(lambda: len(gram_tiles(run_dir)) > ENOUGH, driver)
    (os.killpg if to_group else os.kill)(driver.pid, stop)
    _, err = driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == 130
    assert "Traceback" not in err
    command = " ".join(arguments("run", run_dir, *SETS, resume=True))
    assert re.search(rf"continue with: \S+( -m pipeline)? {re.escape(command)}", err)
    # at most the tile whose writing was interrupted is not in the ledger
    assert len(gram_tiles(run_dir)) - len(gram_rows(run_dir)) <= 1
    finished(run_dir, *SETS, resume=True)
    assert_same_bits(undisturbed, run_dir)


def test_ctrl_c_on_ray_and_a_worker_killed_after_it(undisturbed, tmp_path):
    run_dir, sets = tmp_path / "run", (*SETS, "compute.executor=ray")
    driver = start(*arguments("run", run_dir, *sets), prelude=CALLS_OF_TWO + held_before(4))
    wait_until(lambda: len(gram_tiles(run_dir)) > ENOUGH, driver)
    descendants = children_of(driver)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to everyone in the group
    _, err = driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert_gone(descendants)
    stopped_at = gram_rows(run_dir)
    # Two workers, each with two unfinished calls of two tiles.
    assert len(gram_tiles(run_dir)) - len(stopped_at) <= 8

    gate = tmp_path / "gate"
    prelude = CALLS_OF_TWO + held_before(10, gate)  # a call that reaches the held tiles reports nothing
    driver = start(*arguments("run", run_dir, *sets, resume=True), prelude=prelude)
    # Kill a worker that has made tiles according to the ledger once both are held; go on once its successor is held.
    wait_until(lambda: len(gram_rows(run_dir)) > len(stopped_at) + ENOUGH, driver)
    wait_until(lambda: len([*tmp_path.glob("held-*")]) == 2, driver)
    killed = min(makers_of(gram_rows(run_dir).keys() - stopped_at, run_dir))
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len([*tmp_path.glob("held-*")]) == 3, driver)
    gate.touch()
    out, err = driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == 0, out + err
    assert_same_bits(undisturbed, run_dir)
    after = gram_rows(run_dir)
    assert {tile: row["started"] for tile, row in stopped_at.items()} == {t: after[t]["started"] for t in stopped_at}
    pids = makers_of(after.keys() - stopped_at, run_dir)
    assert len(pids) == 3  # two, and the successor of the killed one
    assert killed in pids


def test_two_drivers_on_one_run_directory(tmp_path):
    run_dir = tmp_path / "run"
    driver = start(*arguments("run", run_dir, *SETS), prelude=held_before(1))
    wait_until(lambda: gram_tiles(run_dir), driver)
    state = nntk("status", run_dir)
    assert f"running (process {driver.pid}" in state.out
    second = nntk(*arguments("run", run_dir, *SETS, resume=True))
    assert second.code == 2
    assert f"is in use by process {driver.pid}" in second.err
    driver.kill()
    driver.communicate()
