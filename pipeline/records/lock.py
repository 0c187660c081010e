"""One driver per run directory, and a heartbeat by which others see it.

What this room is for: to refuse a second driver with its owner's name, and to tell `status` whether a run is alive.
What it refuses to do: to guard single files or tiles (each shard has one writer by construction), to act on a dead
driver's workers, to settle two drivers that start within the same second on an object store, where there is no lock to
take: there, whoever sees the other's heartbeat refuses.

On a local disk the lock is `flock` on `.lock`, which the operating system releases however the driver ends. The
heartbeat is a file that is rewritten every few seconds on any storage; where it decides, the clocks of the machines are
assumed to agree to within a few seconds.

Axis legend: none.
"""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import IO

import psutil

from nntk_dist.errors import NNTKError
from pipeline.storage.run_storage import RunStorage

LOCK_PATH = ".lock"
HEARTBEAT_PATH = "heartbeat.json"
BEAT_SECONDS = 3.0
FRESH_SECONDS = 30.0

# `driver_alive` takes the lock for an instant to see whether it is free, so one failed attempt proves nothing.
_LOCK_ATTEMPTS = 5
_LOCK_PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Heartbeat:
    """A driver's sign of life: its process id and host, Unix time in seconds, and tasks done of the current stage."""

    pid: int
    host: str
    time: float
    stage: str | None = None
    done: int = 0
    total: int = 0


def read_heartbeat(storage: RunStorage) -> Heartbeat | None:
    """The last heartbeat of the run's driver; None where none is running or the file is not a heartbeat."""
    content = storage.read_bytes(HEARTBEAT_PATH)
    try:
        return None if content is None else Heartbeat(**json.loads(content))
    except (ValueError, TypeError):
        return None


def driver_alive(storage: RunStorage) -> bool:
    """Whether a driver works on this run directory now.

    By the lock where the run directory is on this machine's disks, by the age of the heartbeat otherwise.
    """
    heartbeat = read_heartbeat(storage)
    elsewhere = heartbeat is not None and heartbeat.host != socket.gethostname()
    if storage.local_path is not None and not elsewhere:
        locked = _is_locked(storage.local_path / LOCK_PATH)
        if locked is not None:
            return locked
    return heartbeat is not None and _is_living(heartbeat)


class RunLock:
    """Context manager that holds a run directory for this process and sends its heartbeat.

    Entering creates the run directory. Leaving removes the heartbeat: a heartbeat without a driver means a driver that
    was killed.

    Args:
        storage: the run directory.
        beat_seconds: time between heartbeats.

    Raises:
        NNTKError: on entering, where another driver holds the run directory; names its process id and host.
    """

    def __init__(self, storage: RunStorage, beat_seconds: float = BEAT_SECONDS) -> None:
        self._storage = storage
        self._beat_seconds = beat_seconds
        self._file: IO[bytes] | None = None
        self._stop = Event()
        self._thread: Thread | None = None
        self._heartbeat = Heartbeat(os.getpid(), socket.gethostname(), time.time())

    def __enter__(self) -> "RunLock":
        locked_here = self._take_lock()
        try:
            other = read_heartbeat(self._storage)
            # With the lock in hand, a heartbeat of this host is of a driver that has died; one of another host may be
            # of a driver whose lock does not reach this machine.
            decisive = other is not None and not (locked_here and other.host == self._heartbeat.host)
            if other is not None and decisive and _is_living(other):
                raise self._refusal(other)
            self._beat()
        except BaseException:
            self._release_lock()
            raise
        self._thread = Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            with suppress(NNTKError):  # the run's own outcome matters more than a heartbeat that stays behind
                self._storage.delete(HEARTBEAT_PATH)
        finally:
            self._release_lock()

    def update(self, stage: str, done: int, total: int) -> None:
        """What the next heartbeat says. Costs nothing; call it for every task."""
        self._heartbeat = replace(self._heartbeat, stage=stage, done=done, total=total)

    def _take_lock(self) -> bool:
        folder = self._storage.local_path
        if folder is None:
            return False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / LOCK_PATH).open("ab")
        except OSError as error:
            raise NNTKError(
                f"run_dir '{folder}' cannot be written ({error.strerror}); choose another run_dir"
            ) from error
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if attempt + 1 < _LOCK_ATTEMPTS:
                    time.sleep(_LOCK_PAUSE_SECONDS)
            except OSError:  # a network file system without locks: the heartbeat decides
                self._release_lock()
                return False
        self._release_lock()
        raise self._refusal(read_heartbeat(self._storage))

    def _release_lock(self) -> None:
        if self._file is not None:
            self._file.close()  # closing releases; the file stays, since deleting it would race with a newcomer
            self._file = None

    def _refusal(self, other: Heartbeat | None) -> NNTKError:
        who = f"process {other.pid} on {other.host}" if other else "another process"
        message = f"run_dir '{self._storage.url}' is in use by {who}; wait for it, stop it, or choose another run_dir"
        if other is not None and self._storage.local_path is None:
            message += f" (if it was killed: try again in {FRESH_SECONDS:.0f} seconds)"
        return NNTKError(message)

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            with suppress(
                NNTKError
            ):  # a storage that fails for a moment must not end the run; the next beat tries again
                self._beat()

    def _beat(self) -> None:
        heartbeat = replace(self._heartbeat, time=time.time())
        self._storage.write_bytes(HEARTBEAT_PATH, json.dumps(asdict(heartbeat)).encode())


def _is_locked(path: Path) -> bool | None:
    """Whether somebody holds the lock file; None where locks do not work here."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    return False


def _is_living(heartbeat: Heartbeat) -> bool:
    """Fresh, and not of a process of this host that has ended."""
    if abs(time.time() - heartbeat.time) > FRESH_SECONDS:
        return False
    return heartbeat.host != socket.gethostname() or psutil.pid_exists(heartbeat.pid)
