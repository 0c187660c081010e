"""The run directory: small files by name, on a local disk or in an object store, through obstore.

One address (`runs/digits`, `s3://bucket/runs/digits`) that the driver and every worker open for themselves, with the
few operations that the ledger, the manifest and the heartbeat need. This module does not know what is inside the files,
creates nothing before the first write, and handles no credentials (obstore reads the cloud's usual environment
variables). Writes are atomic against a killed process, not against a power cut: they are not fsynced.

Axes: none; paths are relative to the run directory, with `/` between the parts.
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
from obstore.store import LocalStore

from nntk_dist.errors import ArgumentError, StoreError, check_choice, first_line
from nntk_dist.store.backends import BACKENDS

KERNEL_STORE = "kernel.zarr"

STORAGE_ERRORS = (BaseError, OSError)  # raised by object stores and disks
ACCESS_ERRORS = (BaseError, PermissionError)  # they do not show what the storage holds
# Files that a hard kill can leave: of shards and zarr (`0.<uuid>.partial`), and of obstore (`manifest.json#1`).
_PARTIAL_FILE = re.compile(r"\.partial$|#\d+$")
_ERROR_CODE = re.compile(r"<Code>(\w+)</Code>")
_PROBE_FILE = ".writable"
_OWN_FOLDERS = (KERNEL_STORE, "ledger", "tables", "report")


class StorageRefusal(StoreError):
    """A disk or an object store does not answer or denies access; this does not show what it holds."""


class RunStorage:
    """A run directory by its address. It is pickled as its address, and opened again on arrival.

    Args:
        url: a local path (a relative one is made absolute here, because workers run elsewhere), `file://…`, or
            `s3://bucket/prefix` (also `gs://`, `az://`, and the schemes that other packages add to `BACKENDS`).

    Raises:
        ArgumentError: the url is empty, has an unknown scheme, or names no bucket.

    Example:
        >>> RunStorage("s3://bucket/runs/digits/").url
        's3://bucket/runs/digits'
    """

    def __init__(self, url: str | Path) -> None:
        text = str(url)
        if not text.strip():
            raise ArgumentError("run_dir is empty; give a local path or s3://bucket/prefix")
        scheme, separator, _ = text.partition("://")
        self.local_path: Path | None = None
        if not separator:
            self.local_path = Path(text).expanduser().absolute()
        elif scheme == "file":
            self.local_path = Path(unquote(urlsplit(text).path))
        else:
            check_choice(f"scheme of run_dir '{text}'", scheme, (*BACKENDS, "file"))
            if not urlsplit(text).netloc:
                raise ArgumentError(f"run_dir '{text}' names no bucket; write {scheme}://bucket/prefix")
        self.url = str(self.local_path) if self.local_path else text.rstrip("/")

    def __reduce__(self) -> tuple[type["RunStorage"], tuple[str]]:
        return RunStorage, (self.url,)

    def __repr__(self) -> str:
        return f"RunStorage({self.url!r})"

    def read_bytes(self, path: str) -> bytes | None:
        """Return the content of a file, or None if there is none.

        Raises:
            StoreError: the storage does not answer or denies access.
        """
        if not self._exists():
            return None
        with self._errors_named("read", path):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a whole file, atomically: a reader, or a kill in the middle, sees the old content or the new one.

        Raises:
            StoreError: the storage cannot be written.
        """
        with self._errors_named("write", path):
            obstore.put(self._store, path, data)

    def list(self, prefix: str = "") -> Sequence[str]:
        """Return the sorted paths of all files below the folder `prefix`; "" stands for the run directory.

        Raises:
            StoreError: the storage does not answer or denies access.
        """
        if not self._exists():
            return []
        with self._errors_named("list", prefix or "."):
            batches = obstore.list(self._store, prefix=prefix or None)
            return sorted(entry["path"] for batch in batches for entry in batch)

    def delete(self, path: str) -> None:
        """Delete a file, if there is one.

        Raises:
            StoreError: the storage cannot be written.
        """
        if not self._exists():
            return
        with self._errors_named("delete", path), suppress(FileNotFoundError):
            obstore.delete(self._store, path)

    def zarr_store(self, *, read_only: bool) -> zarr.abc.store.Store:
        """Return the Zarr store of `kernel.zarr`. Nothing is created or read before Zarr opens it."""
        if self.local_path is not None:
            return zarr.storage.LocalStore(self.local_path / KERNEL_STORE, read_only=read_only)
        return zarr.storage.ObjectStore(self._open_remote(KERNEL_STORE), read_only=read_only)

    def check_writable(self) -> None:
        """Check, by writing a probe file and deleting it, that this run directory can be written.

        Permission bits would say nothing of read-only mounts, /proc, a full disk or a missing bucket, and nothing at
        all to root. Folders made for the probe are removed again.

        Raises:
            StoreError: the place cannot be written, a file is in the place of a folder, or the bucket does not exist.
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
                raise StoreError(f"run_dir '{self.url}': '{nearest}' is a file, not a folder; choose another run_dir")
            self.local_path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(f"run_dir '{self.url}' cannot be written ({reason}); choose another run_dir") from error
        finally:
            with suppress(OSError):
                probe.unlink()
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()  # refuses what somebody else has begun to use meanwhile

    def remove_partial_files(self) -> int:
        """Delete the temporary files that hard kills have left on a local disk, and return how many.

        Only the holder of the run lock may call this, before it starts workers: a file that is being written looks the
        same. Object stores show no unfinished uploads.
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
        return BACKENDS.get(self.url.partition("://")[0])("/".join((self.url, *parts)))

    @contextmanager
    def _errors_named(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except STORAGE_ERRORS as error:
            raise StoreError(
                f"cannot {action} '{path}' in run_dir '{self.url}': {reason_of(error)}; check the address and your "
                "access to it"
            ) from error


def reason_of(error: Exception) -> str:
    """Return in a few words what a disk or an object store has said.

    Object stores answer with a code such as NoSuchBucket. Otherwise the first line says what happened; pages of
    debugging output may follow it.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = _ERROR_CODE.search(str(error))
    return code[1] if code else first_line(error)
