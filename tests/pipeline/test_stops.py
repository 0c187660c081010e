"""Runs that are stopped: a killed driver, Ctrl-C, a killed worker. All with real processes, and compared with one run
that nothing happened to.

A stop may cost what was in flight and what the ledger had not flushed, by default its last five seconds; never a bit.
"""

import os
import signal
import time

import psutil
import pytest

from tests.pipeline.tools import arguments, assert_same_bits, finished, ledger, nntk, start

FLUSH_SECONDS = 0.5
# A driver whose ledger waits for half a second instead of five, so that a short stage has several flushes.
OFTEN_FLUSHED = f"""
import functools, pipeline.run
pipeline.run.Ledger = functools.partial(pipeline.run.Ledger, flush_seconds={FLUSH_SECONDS})
"""
SLACK_SECONDS = 1.5  # a poll of the driver, and a busy machine
SETS = ("data.train=301", "data.test=41", "compute.tile=8", "compute.stderr=sample", "compute.workers=2")
NUM_TILES = 38 * 39 // 2
ENOUGH = 60  # tiles
WAIT_SECONDS = 90.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that nothing happened to."""
    return finished(tmp_path_factory.mktemp("undisturbed") / "run", *SETS)


def wait_until(condition, process):
    """Wait for something that a driver does; the test fails where it ends or takes too long."""
    limit = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.02)


def gram_tiles(run_dir):
    """Tiles (i ≤ j) of the train kernel that lie on disk, with the time of their writing."""
    files = run_dir.glob("kernel.zarr/train/gram_unbiased/c/*/*")
    stamps = {(int(file.parent.name), int(file.name)): file.stat().st_mtime for file in files if file.name.isdecimal()}
    return {f"train/{i}/{j}": stamp for (i, j), stamp in stamps.items() if i <= j}


def gram_rows(run_dir):
    """Rows of the gram stage that lie in the ledger."""
    return {tile: row for (stage, tile), row in ledger(run_dir).items() if stage == "gram"}


def in_the_middle(run_dir):
    """A part of the gram stage is in the ledger; on a machine too fast for that, most of it is on disk."""
    return len(gram_rows(run_dir)) > 0.3 * NUM_TILES or len(gram_tiles(run_dir)) > 0.8 * NUM_TILES


def children_of(process):
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes):
    """None of these is left, apart from Ray's agents, which notice the death of their parent within a minute."""
    _, alive = psutil.wait_procs([process for process in processes if not named_agent(process)], timeout=20)
    assert alive == []


def named_agent(process):
    try:
        return "Agent" in process.name()
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_a_killed_driver_costs_what_was_in_flight(executor, undisturbed, tmp_path):
    run_dir, sets = tmp_path / "run", (*SETS, f"compute.executor={executor}")
    driver = start(*arguments("run", run_dir, *sets), prelude=OFTEN_FLUSHED)
    wait_until(lambda: in_the_middle(run_dir), driver)
    descendants = children_of(driver)
    driver.kill()
    killed_at = time.time()
    driver.communicate()
    assert_gone(descendants)

    before, on_disk = ledger(run_dir), gram_tiles(run_dir)
    assert len(on_disk) > ENOUGH
    assert len(gram_rows(run_dir)) < NUM_TILES
    state = nntk("status", run_dir)
    assert "stopped" in state.out
    long_since = {tile for tile, stamp in on_disk.items() if stamp < killed_at - FLUSH_SECONDS - SLACK_SECONDS}
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
    sets = ("kernel.estimator=weight", "kernel.draws=1024", "compute.batch=16")
    run_dir = tmp_path / "run"
    driver = start(*arguments("run", run_dir, *sets))
    files = run_dir / "kernel.zarr/train/features/c/0"
    wait_until(lambda: files.is_dir() and len(list(files.iterdir())) > 5, driver)
    driver.kill()
    driver.communicate()
    assert ("features", "test/0/63") not in ledger(run_dir)
    (run_dir / "kernel.zarr/train/features/c/0/5.0123456789abcdef.partial").write_bytes(b"half")

    finished(run_dir, *sets, resume=True)
    assert list(run_dir.rglob("*.partial")) == []
    assert_same_bits(finished(tmp_path / "undisturbed", *sets), run_dir)


@pytest.mark.parametrize(("stop", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_stopped_serial_run_says_how_to_go_on(stop, to_group, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    driver = start(*arguments("run", run_dir, *SETS))
    wait_until(lambda: len(gram_tiles(run_dir)) > ENOUGH, driver)
    (os.killpg if to_group else os.kill)(driver.pid, stop)
    _, err = driver.communicate(timeout=20)
    assert driver.returncode == 130
    assert "Traceback" not in err
    command = f"nntk {' '.join(arguments('run', run_dir, *SETS, resume=True))}"
    assert f"continue with: {command}" in err
    # at most the tile whose writing was interrupted is not in the ledger
    assert len(gram_tiles(run_dir)) - len(gram_rows(run_dir)) <= 1
    finished(run_dir, *SETS, resume=True)
    assert_same_bits(undisturbed, run_dir)


def test_ctrl_c_on_ray_and_a_worker_killed_after_it(undisturbed, tmp_path):
    run_dir, sets = tmp_path / "run", (*SETS, "compute.executor=ray")
    driver = start(*arguments("run", run_dir, *sets))
    wait_until(lambda: len(gram_tiles(run_dir)) > ENOUGH, driver)
    descendants = children_of(driver)
    os.killpg(driver.pid, signal.SIGINT)  # what a terminal does: everyone in the group
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert_gone(descendants)
    stopped_at = gram_rows(run_dir)
    assert len(gram_tiles(run_dir)) - len(stopped_at) <= 4  # two workers with two tiles each

    driver = start(*arguments("run", run_dir, *sets, resume=True))
    wait_until(lambda: len(gram_tiles(run_dir)) > len(stopped_at) + ENOUGH, driver)
    worker = next(process for process in children_of(driver) if process.name().startswith("ray::Worker"))
    worker.kill()
    out, err = driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == 0, out + err
    assert_same_bits(undisturbed, run_dir)
    after = gram_rows(run_dir)
    assert {tile: row["started"] for tile, row in stopped_at.items()} == {t: after[t]["started"] for t in stopped_at}
    pids = {int(row["worker"].rpartition(":")[2]) for tile, row in after.items() if tile not in stopped_at}
    assert len(pids) == 3  # two, and the one that took the killed one's place
    assert worker.pid in pids


def test_two_drivers_on_one_run_directory(tmp_path):
    run_dir = tmp_path / "run"
    driver = start(*arguments("run", run_dir, *SETS))
    wait_until(lambda: gram_tiles(run_dir), driver)
    state = nntk("status", run_dir)
    assert f"running (process {driver.pid}" in state.out
    second = nntk(*arguments("run", run_dir, *SETS, resume=True))
    assert second.code == 2
    assert f"is in use by process {driver.pid}" in second.err
    driver.kill()
    driver.communicate()
