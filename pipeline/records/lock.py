"""One driver for each run directory, and a heartbeat that shows it to others.

A second driver is refused with the name of the first, and `status` knows whether a run is alive. Single files and tiles
are not locked (each shard has one writer by construction), and a dead driver's workers are left alone.

On a local disk the lock is `flock` on `.lock`, which the operating system releases however the driver ends. The
heartbeat is a file, rewritten every few seconds on any storage. It decides on object stores, for other hosts, and on
file systems without locks; the clocks of the machines must then agree to within a few seconds. Two drivers that start
within the same second on an object store may not see each other.

`filelock` takes the same lock, but it has no shared one, with which `status` looks without writing to a directory of
somebody else, and on a file system without locks it raises or falls back on a file that a killed driver leaves behind.

Axes: none.
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

from nntk_dist.errors import StoreError
from pipeline.storage.run_storage import RunStorage

LOCK_PATH = ".lock"
HEARTBEAT_PATH = "heartbeat.json"
BEAT_SECONDS = 3.0
FRESH_SECONDS = 30.0

# `driver_alive` takes the lock for an instant, so one failed attempt proves nothing.
_LOCK_ATTEMPTS = 5
_LOCK_PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Heartbeat:
    """A driver's sign of life.

    Attributes:
        pid: the driver's process.
        host: its machine.
        time: Unix time in seconds.
        stage: the stage that it works on.
        done: finished tasks of this stage.
        total: all tasks of this stage.
    """

    pid: int
    host: str
    time: float
    stage: str | None = None
    done: int = 0
    total: int = 0


def read_heartbeat(storage: RunStorage) -> Heartbeat | None:
    """Return the last heartbeat of the run's driver; None if there is none, or the file is not a heartbeat."""
    content = storage.read_bytes(HEARTBEAT_PATH)
    try:
        return None if content is None else Heartbeat(**json.loads(content))
    except (ValueError, TypeError):
        return None


def driver_alive(storage: RunStorage) -> bool:
    """Return whether a driver works on this run directory now.

    The lock says so if the run directory is on a local disk and the last driver ran on this host, otherwise the age of
    the heartbeat.
    """
    heartbeat = read_heartbeat(storage)
    elsewhere = heartbeat is not None and heartbeat.host != socket.gethostname()
    if storage.local_path is not None and not elsewhere:
        locked = _is_locked(storage.local_path / LOCK_PATH)
        if locked is not None:
            return locked
    return heartbeat is not None and _is_living(heartbeat)


class RunLock:
    """Hold a run directory for this process, and send its heartbeat: a context manager.

    Entering creates the run directory. Leaving removes the heartbeat, so that one without a driver is left only by a
    driver that was killed.

    Args:
        storage: the run directory.
        beat_seconds: time between heartbeats.

    Raises:
        StoreError: on entering, if another driver holds the run directory (its process and host are named), or the
            directory cannot be written.

    Example:
        >>> import tempfile
        >>> storage = RunStorage(tempfile.mkdtemp())
        >>> with RunLock(storage):
        ...     driver_alive(storage)
        True
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
            # If this process has the lock, a heartbeat of this host is of a driver that has died; one of another host
            # may be of a driver whose lock does not reach this machine.
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
            with suppress(StoreError):  # the run's own outcome matters more than a heartbeat that stays behind
                self._storage.delete(HEARTBEAT_PATH)
        finally:
            self._release_lock()

    def update(self, stage: str, done: int, total: int) -> None:
        """Set what the next heartbeat says; cheap enough for every task."""
        self._heartbeat = replace(self._heartbeat, stage=stage, done=done, total=total)

    def _take_lock(self) -> bool:
        folder = self._storage.local_path
        if folder is None:
            return False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / LOCK_PATH).open("ab")
        except OSError as error:
            raise StoreError(
                f"run_dir '{folder}' cannot be written ({error.strerror}); choose another run_dir"
            ) from error
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if attempt + 1 < _LOCK_ATTEMPTS:
                    time.sleep(_LOCK_PAUSE_SECONDS)
            except OSError:  # a file system without locks: the heartbeat decides
                self._release_lock()
                return False
        self._release_lock()
        raise self._refusal(read_heartbeat(self._storage))

    def _release_lock(self) -> None:
        if self._file is not None:
            self._file.close()  # closing releases; the file stays, since deleting it would race with a newcomer
            self._file = None

    def _refusal(self, other: Heartbeat | None) -> StoreError:
        who = f"process {other.pid} on {other.host}" if other else "another process"
        message = f"run_dir '{self._storage.url}' is in use by {who}; wait for it, stop it, or choose another run_dir"
        if other is not None and self._storage.local_path is None:
            message += f" (if it was killed: try again in {FRESH_SECONDS:.0f} seconds)"
        return StoreError(message)

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            with suppress(StoreError):  # a storage that fails for a moment must not end the run
                self._beat()

    def _beat(self) -> None:
        heartbeat = replace(self._heartbeat, time=time.time())
        self._storage.write_bytes(HEARTBEAT_PATH, json.dumps(asdict(heartbeat)).encode())


def _is_locked(path: Path) -> bool | None:
    """Return whether somebody holds the lock file; None if locks do not work here."""
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
    """Return whether it is fresh, and not of a process of this host that has ended."""
    if abs(time.time() - heartbeat.time) > FRESH_SECONDS:
        return False
    return heartbeat.host != socket.gethostname() or psutil.pid_exists(heartbeat.pid)
