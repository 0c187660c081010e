"""The files of an array's shards: which there are, whether they hold anything, and parts of them.

On a local disk content is read and made in memory that is used again. What is in a file is the business of
`pipeline.storage.shards`.

Axes: those of the array.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import numpy.typing as npt
import zarr
from zarr.buffer import cpu
from zarr.core.sync import sync
from zarr.storage import LocalStore, StorePath

Bounds = tuple[tuple[int, int], ...]

_ROOM = threading.local()  # of every thread that reads or writes, for the content of a file
_KEPT_BYTES = 65 << 20  # a tile of 4096² in float32 that cannot be compressed, and what a shard adds to it


def shard_files(array: zarr.Array, bounds: Bounds) -> Iterator[tuple[tuple[int, ...], StorePath]]:
    """Place in the grid of shards and file of everything that holds a selection."""
    shards = array.shards or array.chunks
    grid = [range(start // edge, -(-stop // edge)) for (start, stop), edge in zip(bounds, shards, strict=True)]
    for coordinates in product(*grid):
        yield coordinates, array.store_path / array.metadata.encode_chunk_key(coordinates)


def has_content(file: StorePath) -> bool:
    """Whether the file is there and not empty (zarr takes an empty one for a missing one)."""
    try:
        return sync(file.store.getsize(file.path)) > 0
    except FileNotFoundError:
        return False


@contextmanager
def opened(file: StorePath) -> Iterator[tuple[int, Callable[[int, int], npt.NDArray[np.uint8]]]]:
    """The size of a file, and what reads so many bytes of it from a position on: on a local disk those alone, in memory
    that the next ones take.
    """
    if not isinstance(file.store, LocalStore):
        buffer = sync(file.get(cpu.buffer_prototype))
        if buffer is None:
            raise FileNotFoundError(str(file))
        content = buffer.as_numpy_array()
        yield len(content), lambda start, length: content[start : start + length]
        return
    with (file.store.root / file.path).open("rb", buffering=0) as local:

        def read(start: int, length: int) -> npt.NDArray[np.uint8]:
            room, filled = kept_memory(length), 0
            local.seek(start)
            while filled < length and (count := local.readinto(room.data[filled:])):
                filled += count
            return room[:filled]

        yield os.fstat(local.fileno()).st_size, read


def kept_memory(size: int) -> npt.NDArray[np.uint8]:
    """Memory that the next call in this thread takes again, if no more than 65 MiB: the system hands out memory page by
    page, which takes longer than reading.
    """
    room = getattr(_ROOM, "memory", None)
    if room is None or len(room) < size:
        room = np.empty(size, np.uint8)
        _ROOM.memory = room if size <= _KEPT_BYTES else None
    return room[:size]


def forget_memory() -> None:
    """Give back what `kept_memory` keeps for this thread."""
    _ROOM.memory = None
