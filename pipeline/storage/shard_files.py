"""The files of an array's shards: which there are, whether they hold anything, reading parts of them and writing them.

`pipeline.storage.shards` knows what is in a file.

Axes: of the array.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from uuid import uuid4

import zarr
from zarr.buffer import cpu
from zarr.core.sync import sync
from zarr.storage import LocalStore, StorePath

Bounds = tuple[tuple[int, int], ...]
Read = Callable[[int, int], bytes]
Write = Callable[[bytes], object]


def shard_files(array: zarr.Array, bounds: Bounds) -> Iterator[tuple[tuple[int, ...], StorePath]]:
    """Yield place in the grid of shards and file of every shard that overlaps a selection."""
    shards = array.shards or array.chunks
    grid = [range(start // edge, -(-stop // edge)) for (start, stop), edge in zip(bounds, shards, strict=True)]
    for coordinates in product(*grid):
        yield coordinates, array.store_path / array.metadata.encode_chunk_key(coordinates)


def has_content(file: StorePath) -> bool:
    """Return whether the file exists and is not empty (Zarr takes an empty one for a missing one)."""
    try:
        return sync(file.store.getsize(file.path)) > 0
    except FileNotFoundError:
        return False


@contextmanager
def reading(file: StorePath) -> Iterator[tuple[int, Read]]:
    """Give the size of a file and a function that reads a number of bytes from a position on.

    From a local disk only these bytes are read, otherwise the whole file at once.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not isinstance(file.store, LocalStore):
        buffer = sync(file.get(cpu.buffer_prototype))
        if buffer is None:
            raise FileNotFoundError(str(file))
        content = buffer.to_bytes()
        yield len(content), lambda start, length: content[start : start + length]
        return
    with (file.store.root / file.path).open("rb") as local:

        def read(start: int, length: int) -> bytes:
            local.seek(start)
            return local.read(length)

        yield os.fstat(local.fileno()).st_size, read


@contextmanager
def writing(file: StorePath) -> Iterator[Write]:
    """Give a function that takes the parts of a file's new content; the file changes as a whole, when all is written.

    A kill in between leaves the old content, and on a local disk a `*.partial` file, named as Zarr names its own. There
    parts go to the disk one by one; elsewhere they are collected.
    """
    if not isinstance(file.store, LocalStore):
        content = bytearray()
        yield content.extend
        sync(file.set(cpu.Buffer.from_bytes(content)))
        return
    path = file.store.root / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("wb") as local:
            yield local.write
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
