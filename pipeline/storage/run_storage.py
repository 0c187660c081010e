"""The run directory: small files by name, on a local disk or in an object store, through obstore.

What this room is for: one address (`runs/digits`, `s3://bucket/runs/digits`) that the driver and every worker open for
themselves, with the handful of operations that the ledger, the manifest and the heartbeat need.
What it refuses to do: to know what is inside the files, to create anything before the first write, to handle
credentials (obstore reads the cloud's ordinary environment variables), to promise survival of a power cut (writes are
atomic against a killed process; they are not fsynced).

Axis legend: none; paths are relative to the run directory, with `/` between the parts.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
import zarr.abc.store
import zarr.storage
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from nntk_dist.errors import NNTKError, check_choice

KERNEL_STORE = "kernel.zarr"
REMOTE_SCHEMES = ("s3", "gs", "az")

STORAGE_ERRORS = (BaseError, OSError)  # what object stores and disks raise
ACCESS_ERRORS = (BaseError, PermissionError)  # those that say nothing of what is there
# What a hard kill can leave behind: zarr's temporary files (`0.<uuid>.partial`) and obstore's (`manifest.json#1`).
_PARTIAL_FILE = re.compile(r"\.partial$|#\d+$")
_ERROR_CODE = re.compile(r"<Code>(\w+)</Code>")
_PROBE_FILE = ".writable"
_OWN_FOLDERS = (KERNEL_STORE, "ledger", "tables", "report")


class StorageRefusal(NNTKError):
    """A disk or an object store does not answer, or not us: nothing is known of what it holds."""


class RunStorage:
    """A run directory by its address; cheap to pickle, since it travels as its url and is reopened on arrival.

    Args:
        url: a local path (relative ones are made absolute here, because workers run elsewhere), `file://…`, or
            `s3://bucket/prefix` (also `gs://`, `az://`).

    Raises:
        NNTKError: empty url, or a scheme that is not supported.
    """

    def __init__(self, url: str | Path) -> None:
        text = str(url)
        if not text.strip():
            raise NNTKError("run_dir is empty; give a local path or s3://bucket/prefix")
        scheme, separator, _ = text.partition("://")
        self.local_path: Path | None = None
        if not separator:
            self.local_path = Path(text).expanduser().absolute()
        elif scheme == "file":
            self.local_path = Path(unquote(urlsplit(text).path))
        else:
            check_choice(f"scheme of run_dir '{text}'", scheme, (*REMOTE_SCHEMES, "file"))
            if not urlsplit(text).netloc:
                raise NNTKError(f"run_dir '{text}' names no bucket; write {scheme}://bucket/prefix")
        self.url = str(self.local_path) if self.local_path else text.rstrip("/")

    def __reduce__(self) -> tuple[type["RunStorage"], tuple[str]]:
        return RunStorage, (self.url,)

    def __repr__(self) -> str:
        return f"RunStorage({self.url!r})"

    def read_bytes(self, path: str) -> bytes | None:
        """The content of the file, or None where there is none."""
        if not self._exists():
            return None
        with self._errors_named("read", path):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write the whole file, atomically: a reader, or a kill in the middle, sees the old content or the new one."""
        with self._errors_named("write", path):
            obstore.put(self._store, path, data)

    def list(self, prefix: str = "") -> Sequence[str]:
        """Sorted paths of all files below the folder `prefix` (of the whole run directory where it is empty)."""
        if not self._exists():
            return []
        with self._errors_named("list", prefix or "."):
            batches = obstore.list(self._store, prefix=prefix or None)
            return sorted(entry["path"] for batch in batches for entry in batch)

    def delete(self, path: str) -> None:
        """Delete the file; no error where there is none."""
        if not self._exists():
            return
        with self._errors_named("delete", path), suppress(FileNotFoundError):
            obstore.delete(self._store, path)

    def zarr_store(self, *, read_only: bool) -> zarr.abc.store.Store:
        """The zarr store of `kernel.zarr`. Nothing is created or read until zarr opens it."""
        if self.local_path is not None:
            return zarr.storage.LocalStore(self.local_path / KERNEL_STORE, read_only=read_only)
        return zarr.storage.ObjectStore(self._open_remote(KERNEL_STORE), read_only=read_only)

    def check_writable(self) -> None:
        """Prove, by writing a probe file and taking it away again, that this run directory can be written.

        A probe and not a look at permission bits: those say nothing of read-only mounts, of /proc, of a full disk or of
        a missing bucket, and nothing at all to root. Folders made for the probe are removed again.

        Raises:
            NNTKError: the place cannot be written, a file is where a folder should be, the bucket does not exist.
        """
        if self.local_path is None:
            self.write_bytes(_PROBE_FILE, b"")
            self.delete(_PROBE_FILE)
            return
        missing: list[Path] = []
        probe = self.local_path / _PROBE_FILE
        try:
            lineage = (self.local_path, *self.local_path.parents)
            missing.extend(takewhile(lambda folder: not folder.exists(), lineage))
            nearest = lineage[len(missing)]
            if not nearest.is_dir():
                raise NNTKError(f"run_dir '{self.url}': '{nearest}' is a file, not a folder; choose another run_dir")
            self.local_path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
        except OSError as error:
            reason = error.strerror or error
            raise NNTKError(f"run_dir '{self.url}' cannot be written ({reason}); choose another run_dir") from error
        finally:
            with suppress(OSError):
                probe.unlink()
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()  # refuses what somebody else has begun to use meanwhile

    def remove_partial_files(self) -> int:
        """Delete the temporary files that hard kills leave of the run's own files on a local disk; returns how many.

        Only for the holder of the run lock, before it starts workers: a file that is being written looks the same.
        Object stores show no unfinished uploads, so there is nothing to do there.
        """
        if self.local_path is None:
            return 0
        ours = [*self.local_path.glob("*.json#*")]
        for folder in _OWN_FOLDERS:
            ours += (self.local_path / folder).rglob("*")
        partial = [path for path in ours if _PARTIAL_FILE.search(path.name) and path.is_file()]
        for path in partial:
            path.unlink(missing_ok=True)
        return len(partial)

    def _exists(self) -> bool:
        return self.local_path is None or self.local_path.is_dir()

    @cached_property
    def _store(self) -> Any:
        # Opening a local store needs its folder, so this property is reached by a write, or after `_exists`.
        return self._open_remote() if self.local_path is None else LocalStore(self.local_path, mkdir=True)

    def _open_remote(self, *parts: str) -> Any:
        return from_url("/".join((self.url, *parts)))

    @contextmanager
    def _errors_named(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except STORAGE_ERRORS as error:
            raise NNTKError(
                f"cannot {action} '{path}' in run_dir '{self.url}': {reason_of(error)}; check the address and your "
                "access to it"
            ) from error


def reason_of(error: Exception) -> str:
    """What a disk or an object store has said, in a few words.

    Object stores answer with a code such as NoSuchBucket; otherwise the first line says what happened, and obstore lets
    pages of debugging output follow.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = _ERROR_CODE.search(str(error))
    return code[1] if code else str(error).partition("\n")[0]
