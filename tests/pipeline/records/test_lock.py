"""One driver per run directory; the heartbeat; what counts as alive."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from obstore.store import LocalStore

from nntk_dist.errors import StoreError
from pipeline.records import lock as lock_module
from pipeline.records.lock import FRESH_SECONDS, HEARTBEAT_PATH, Heartbeat, RunLock, driver_alive, read_heartbeat
from pipeline.storage.run_storage import RunStorage

REPOSITORY = Path(__file__).parents[3]
HOLD = """
import sys, time
from pipeline.records.lock import RunLock
from pipeline.storage.run_storage import RunStorage
with RunLock(RunStorage(sys.argv[1]), beat_seconds=0.05) as lock:
    lock.update("gram", 3, 10)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A run directory that appears to the code to be in an object store."""
    monkeypatch.setattr("obstore.store.from_url", lambda url: LocalStore(tmp_path / "bucket", mkdir=True))
    return RunStorage("s3://bucket/run")


@pytest.fixture
def driver(tmp_path):
    """Another process that holds the run directory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def leave_heartbeat(storage, **changes):
    heartbeat = replace(Heartbeat(pid=os.getpid(), host=socket.gethostname(), time=time.time()), **changes)
    storage.write_bytes(HEARTBEAT_PATH, json.dumps(asdict(heartbeat)).encode())
    return heartbeat


def dead_process():
    return subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)


def wait_for(condition):
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.process
def test_a_second_driver_is_refused_with_the_name_of_the_first(tmp_path, driver):
    storage = RunStorage(tmp_path / "run")
    message = (
        f"run_dir '{storage.url}' is in use by process {driver.pid} on {socket.gethostname()}; wait for it, stop it"
    )
    with pytest.raises(StoreError, match=message):
        RunLock(storage).__enter__()
    assert driver_alive(storage)
    wait_for(lambda: read_heartbeat(storage).stage == "gram")
    assert (read_heartbeat(storage).done, read_heartbeat(storage).total) == (3, 10)


@pytest.mark.process
def test_a_killed_driver_frees_the_directory_at_once(tmp_path, driver):
    storage = RunStorage(tmp_path / "run")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert read_heartbeat(storage).pid == driver.pid
    assert not driver_alive(storage)
    with RunLock(storage):
        assert read_heartbeat(storage).pid == os.getpid()


def test_the_heartbeat_goes_on_and_ends_with_the_driver(tmp_path):
    storage = RunStorage(tmp_path / "new" / "run")
    assert not driver_alive(storage)
    with RunLock(storage, beat_seconds=0.02) as lock:
        first = read_heartbeat(storage)
        assert (first.pid, first.host, first.stage) == (os.getpid(), socket.gethostname(), None)
        lock.update("features", 1, 4)
        wait_for(lambda: read_heartbeat(storage).stage == "features")
        with pytest.raises(StoreError, match=rf"run_dir '{storage.url}' is in use by process {os.getpid()} on"):
            RunLock(storage).__enter__()
        seen = read_heartbeat(storage).time
        wait_for(lambda: read_heartbeat(storage).time > seen > first.time)
        assert driver_alive(storage)
    assert read_heartbeat(storage) is None
    assert not driver_alive(storage)
    with RunLock(storage):
        pass


def test_an_error_inside_frees_the_directory(tmp_path):
    storage = RunStorage(tmp_path)
    with pytest.raises(ZeroDivisionError), RunLock(storage):
        raise ZeroDivisionError
    with RunLock(storage):
        assert driver_alive(storage)


@pytest.mark.process
def test_a_look_at_the_lock_does_not_turn_a_driver_away(tmp_path):
    looks = "import sys\nfrom pipeline.records.lock import driver_alive\n"
    looks += "from pipeline.storage.run_storage import RunStorage\n"
    looks += "print('looking', flush=True)\nwhile True: driver_alive(RunStorage(sys.argv[1]))"
    storage = RunStorage(tmp_path)
    command = [sys.executable, "-c", looks, storage.url]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            for _ in range(20):
                with RunLock(storage):
                    assert driver_alive(storage)
        finally:
            process.kill()


def test_a_fresh_heartbeat_of_another_host_is_respected_even_with_the_lock_in_hand(tmp_path):
    storage = RunStorage(tmp_path)
    other = leave_heartbeat(storage, host="elsewhere", pid=7)
    assert driver_alive(storage)
    with pytest.raises(StoreError, match="is in use by process 7 on elsewhere; wait for it"):
        RunLock(storage).__enter__()
    assert read_heartbeat(storage) == other
    leave_heartbeat(storage, host="elsewhere", time=time.time() - FRESH_SECONDS - 1)
    assert not driver_alive(storage)
    with RunLock(storage):
        assert driver_alive(storage)


@pytest.mark.parametrize("kind", ["another host", "a living process"])
def test_without_a_lock_a_fresh_heartbeat_refuses(remote, kind):
    leave_heartbeat(remote, **({"host": "elsewhere"} if kind == "another host" else {}))
    assert driver_alive(remote)
    with pytest.raises(
        StoreError, match=r"is in use by process \d+ on .*\(if it was killed: try again in 30 seconds\)"
    ):
        RunLock(remote).__enter__()


@pytest.mark.parametrize("kind", ["stale", "dead process"])
def test_without_a_lock_a_dead_drivers_heartbeat_is_taken_over(remote, kind):
    if kind == "stale":
        leave_heartbeat(remote, host="elsewhere", time=time.time() - FRESH_SECONDS - 1)
    else:
        leave_heartbeat(remote, pid=int(dead_process().stdout))
    assert not driver_alive(remote)
    with RunLock(remote):
        assert driver_alive(remote)
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
            RunLock(remote).__enter__()
    assert not driver_alive(remote)


def test_where_the_file_system_has_no_locks_the_heartbeat_decides(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock_module.fcntl, "flock", flock)
    storage = RunStorage(tmp_path)
    with RunLock(storage):
        assert driver_alive(storage)
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
            RunLock(storage).__enter__()
    assert not driver_alive(storage)


def test_a_failing_storage_stops_neither_the_run_nor_the_heartbeat(tmp_path, monkeypatch):
    storage = RunStorage(tmp_path)
    failures = []

    def fail(*_):
        failures.append(1)
        raise StoreError("no network")

    with RunLock(storage, beat_seconds=0.02):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", fail)
            wait_for(lambda: len(failures) >= 2)
        seen = read_heartbeat(storage).time
        wait_for(lambda: read_heartbeat(storage).time > seen)
        assert driver_alive(storage)


def test_a_place_that_cannot_be_locked_is_named():
    with pytest.raises(StoreError, match="run_dir '/proc/nntk-run' cannot be written"):
        RunLock(RunStorage("/proc/nntk-run")).__enter__()


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"unknown": 1}'])
def test_what_is_not_a_heartbeat_is_none(tmp_path, content):
    storage = RunStorage(tmp_path)
    storage.write_bytes(HEARTBEAT_PATH, content)
    assert read_heartbeat(storage) is None
    assert not driver_alive(storage)
