"""The arrays of one `kernel.zarr` by path: created from the table of `pipeline.storage.array_table`, read and written.

A thin layer for workers and driver over the policy in `pipeline.storage.kernel_store`; it knows positions, not
meanings.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from nntk_dist.errors import StoreError
from pipeline.storage.array_table import StoredArray
from pipeline.storage.kernel_store import create_array, create_store, has_array, open_array, read_block, write_block
from pipeline.storage.run_storage import STORAGE_ERRORS, RunStorage, reason_of

Piece = tuple[str, Sequence[int], np.ndarray]  # path of an array, start, values


@dataclass
class KernelArrays:
    """The arrays of a run's kernel store, each opened at its first use.

    Args:
        storage: the run directory.
    """

    storage: RunStorage
    _open: dict[str, zarr.Array] = field(default_factory=dict)
    # Two pools: what is read for one tile does not wait for what is written of another.
    _writers: ThreadPoolExecutor | None = None
    _readers: ThreadPoolExecutor | None = None

    def create(self, arrays: Iterable[StoredArray], attributes: Mapping[str, Any]) -> None:
        """Create the store with these attributes, and the arrays that it does not hold yet."""
        create_store(self.storage, attributes)
        for array in arrays:
            if not has_array(self.storage, array.path):
                create_array(
                    self.storage,
                    array.path,
                    shape=array.shape,
                    dtype=array.dtype,
                    shard=array.shards,
                    dimension_names=array.axes,
                )

    def array(self, path: str) -> zarr.Array:
        """Return an array, open for reading and writing."""
        if path not in self._open:
            self._open[path] = open_array(self.storage, path, read_only=False)
        return self._open[path]

    def read(self, path: str, *selection: slice, dtype: npt.DTypeLike | None = None, threads: int = 1) -> np.ndarray:
        """Read a selection.

        Args:
            path: of the array.
            *selection: one slice for each of the first axes; the others are read whole.
            dtype: to cast to; None for the array's own.
            threads: above 1, a pool reads parts of the selection side by side; the first such call sets its size. One
                caller at a time.

        Raises:
            StoreError: data are missing or damaged.
        """
        array = self.array(path)
        if threads > 1 and self._readers is None:
            self._readers = ThreadPoolExecutor(threads)
        each = self._readers.map if threads > 1 and self._readers else None
        return read_block(array, (*selection, *[slice(None)] * (array.ndim - len(selection))), dtype=dtype, each=each)

    def read_shard(self, path: str, start: Sequence[int]) -> np.ndarray:
        """Read what one `write` at this start wrote: a shard, or the part of it within the array."""
        array = self.array(path)
        edges = array.shards or array.chunks
        begin = (*start, *[0] * (array.ndim - len(start)))
        ends = [min(b + edge, length) for b, edge, length in zip(begin, edges, array.shape, strict=True)]
        return read_block(array, tuple(slice(b, e) for b, e in zip(begin, ends, strict=True)))

    def write(self, path: str, start: Sequence[int], values: np.ndarray) -> tuple[int, int]:
        """Write whole shards.

        Args:
            path: of the array.
            start: first index on each of the first axes; 0 on the others.
            values: to write.

        Returns:
            Uncompressed bytes and checksum.

        Raises:
            StoreError: the storage cannot be written.
        """
        begin = (*start, *[0] * (values.ndim - len(start)))
        selection = tuple(slice(b, b + length) for b, length in zip(begin, values.shape, strict=True))
        try:
            return write_block(self.array(path), selection, values)
        except STORAGE_ERRORS as error:
            raise StoreError(
                f"{path} in run_dir '{self.storage.url}' cannot be written ({reason_of(error)}); free some space or "
                "check the storage, then continue with --resume"
            ) from error

    def write_all(self, pieces: Sequence[Piece], *, threads: int) -> list[tuple[int, int]]:
        """Write several pieces side by side, each as `write` does; all are done when this returns.

        Compression, checksums and the storage itself let other threads of Python run.

        Args:
            pieces: what to write.
            threads: of the pool that writes; the first call sets its size.

        Raises:
            StoreError: a piece cannot be written.
        """
        for path, _, _ in pieces:
            self.array(path)  # opened here: the table of open arrays is not for several threads
        if len(pieces) == 1:
            return [self.write(*piece) for piece in pieces]
        if self._writers is None:  # the same threads for all tiles, because each new thread would keep its own memory
            self._writers = ThreadPoolExecutor(threads)
        writing = [self._writers.submit(self.write, *piece) for piece in pieces]
        wait(writing)
        return [each.result() for each in writing]

    def forget(self) -> None:
        """End the threads that read and write; later calls start new ones."""
        for pool in (self._writers, self._readers):
            if pool is not None:
                pool.shutdown()
        self._writers = self._readers = None
