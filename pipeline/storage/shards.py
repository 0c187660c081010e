"""A shard of an array as the bytes of its file: Zarr's `sharding_indexed`, made as a whole and read in part or as a
whole, without zarr's own copies.

What this room is for: the codecs of the store's arrays, and the fast way to apply them. Plain zarr reads the shards as
its own. For 64 MiB of a float32 kernel, zarr and the checksum of the values take a core 1.3 times as long as this
does, 3.3 times for a transposed block: the difference goes into temporary copies.
What it refuses to do: to write part of a shard, to know arrays with other codecs (`can_encode` tells), to open a store.

A file holds the inner chunks, each bytes → Blosc → crc32c, in C order of the chunk grid; then for every place of the
grid where its chunk begins and how long it is, as little-endian uint64, all ones where it lies outside of the array;
then the crc32c of that index.

Axis legend: whatever the array's axes are; a stripe is one row of chunks along the first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
import zarr
from numcodecs import blosc
from numcodecs.blosc import MAX_OVERHEAD, Blosc, decompress
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec

# In the main thread of a process Blosc takes up to eight threads of its own, whatever the process may use.
blosc.use_threads = False

_ABSENT = 2**64 - 1
_CRC_BYTES = 4
_HEADER_BYTES = 16  # of what Blosc made: at 4 the length of what it compressed, at 12 of what came of it
_BLOSC: Any = {"cname": "lz4", "clevel": 1}

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Box = tuple[slice, ...]


def compressors(itemsize: int) -> tuple[BloscCodec, Crc32cCodec]:
    """What follows on the bytes of an inner chunk: in the metadata of the arrays that the store creates."""
    return BloscCodec(**_BLOSC, shuffle="bitshuffle", typesize=itemsize), Crc32cCodec()


def can_encode(array: zarr.Array) -> bool:
    """Whether `encode` makes what zarr would: numbers under exactly the codecs above, by the array's own metadata."""
    itemsize = array.dtype.itemsize
    to_bytes = BytesCodec(endian="little" if itemsize > 1 else None)
    sharding = ShardingCodec(chunk_shape=array.chunks, codecs=(to_bytes, *compressors(itemsize)))
    return (
        array.ndim > 0
        and array.dtype.kind in "biuf"
        and array.metadata.to_dict().get("codecs") == (sharding.to_dict(),)
    )


def encode(array: zarr.Array, values: Array, empty: Callable[[int], Bytes] | None = None) -> tuple[Bytes, int]:
    """The content of a shard's file, and the crc32c of its values in C order.

    Args:
        array: one that `can_encode` accepts.
        values: what of the shard lies within the array, in the array's dtype (little-endian), in any order in memory.
        empty: makes the memory for so many bytes, in which the content will lie.
    """
    shard = _Shard(array, empty or (lambda size: np.empty(size, np.uint8)))
    stripe = np.empty((min(array.chunks[0], len(values)), *values.shape[1:]), values.dtype)
    checksum = 0
    for row, start in enumerate(range(0, len(values), array.chunks[0])):
        rows = values[start : start + array.chunks[0]]
        in_order = rows if rows.flags.c_contiguous else stripe[: len(rows)]
        for place, box in _boxes(rows.shape, array.chunks):
            chunk = shard.add((row, *place[1:]), rows[box])
            if chunk.shape == rows.shape and chunk.flags.c_contiguous:
                in_order = chunk  # the only one of the stripe
            elif in_order is not rows:
                in_order[box] = chunk
        checksum = google_crc32c.extend(checksum, in_order)
    return shard.finish(), checksum


def decode(
    array: zarr.Array,
    size: int,
    read: Callable[[int, int], Bytes],
    out: Array,
    first: Sequence[int],
) -> None:
    """Fill `out` with values that a shard's file holds, every checksum verified, cast where it has another dtype.

    Args:
        array: one that `can_encode` accepts.
        size: of the file in bytes.
        read: gives so many bytes of the file from a position on, at least until it is called again.
        out: as large as what is wanted, at most what of the shard lies within the array.
        first: where in the shard `out` begins.

    Raises:
        ValueError, RuntimeError: the content is not what `encode` makes of any values.
    """
    shard = array.shards or array.chunks
    grid = tuple(edge // part for edge, part in zip(shard, array.chunks, strict=True))
    num_bytes = 16 * math.prod(grid) + _CRC_BYTES
    if size < num_bytes:
        raise ValueError(f"{size} bytes hold no index")
    index = np.frombuffer(_checked(read(size - num_bytes, num_bytes), "the index").tobytes(), "<u8").reshape(*grid, 2)
    chunk = np.empty(array.chunks, array.dtype.newbyteorder("<"))
    for place, box, inner in _overlaps(first, out.shape, array.chunks):
        part, (start, length) = out[box], map(int, index[place])
        if start == length == _ABSENT:  # as zarr leaves chunks of the fill value out, unless it is told not to
            part[...] = array.fill_value
            continue
        if start + length > size:
            raise ValueError(f"chunk {place} lies outside of the file")
        encoded = _checked(read(start, length), f"chunk {place}")
        header = np.frombuffer(encoded[:_HEADER_BYTES].tobytes().ljust(_HEADER_BYTES), "<u4")
        if header[1::2].tolist() != [chunk.nbytes, len(encoded)]:  # which decompressing does not look at
            raise ValueError(f"chunk {place} is of another size than those of '{array.path}'")
        if part.shape == chunk.shape and part.dtype == chunk.dtype and part.flags.c_contiguous:
            decompress(encoded, part)
            continue
        decompress(encoded, chunk)
        np.copyto(part, chunk[inner], casting="unsafe")  # as zarr's values are cast


def _checked(content: npt.NDArray[np.uint8], what: str) -> Bytes:
    """Bytes without the checksum behind them, which must be theirs."""
    data, expected = content[:-_CRC_BYTES], int.from_bytes(content[-_CRC_BYTES:].tobytes(), "little")
    if google_crc32c.value(data) != expected:
        raise ValueError(f"{what} has another checksum than was written")
    return data


class _Shard:
    """A file's content while chunks are added: one buffer for all of it, one for the chunk being compressed."""

    def __init__(self, array: zarr.Array, empty: Callable[[int], Bytes]) -> None:
        shard = array.shards or array.chunks
        grid = tuple(edge // part for edge, part in zip(shard, array.chunks, strict=True))
        self._blosc = Blosc(**_BLOSC, shuffle=Blosc.BITSHUFFLE, blocksize=0)
        self._chunk = np.empty(array.chunks, array.dtype.newbyteorder("<"))
        self._fill_value = array.fill_value
        self._index = np.full((*grid, 2), _ABSENT, dtype="<u8")
        most = math.prod(grid) * (self._chunk.nbytes + MAX_OVERHEAD + _CRC_BYTES) + self._index.nbytes + _CRC_BYTES
        self._content = empty(most)  # pages that nothing was ever written to take no memory
        self._end = 0

    def add(self, place: tuple[int, ...], values: Array) -> Array:
        """Append the chunk at a place of the grid, padded where it is cut off; its values as they were compressed."""
        whole = values.shape == self._chunk.shape
        chunk = values if whole and values.flags.c_contiguous else self._chunk
        inner = chunk[tuple(map(slice, values.shape))]
        if not whole:
            chunk[...] = self._fill_value
        if chunk is not values:
            _copy(values, inner)
        encoded = self._blosc.encode(chunk)
        self._index[place] = self._end, len(encoded) + _CRC_BYTES
        self._append(encoded)
        return inner

    def finish(self) -> Bytes:
        """Append the index; the whole content."""
        self._append(self._index.tobytes())
        return self._content[: self._end]

    def _append(self, data: bytes) -> None:
        for part in (data, google_crc32c.value(data).to_bytes(_CRC_BYTES, "little")):
            self._content[self._end : self._end + len(part)] = np.frombuffer(part, np.uint8)
            self._end += len(part)


def _boxes(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """Place in the grid and slices of every chunk that has values, in C order."""
    for place in product(*(range(-(-length // edge)) for length, edge in zip(shape, chunks, strict=True))):
        yield place, tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip(place, chunks, strict=True))


def _overlaps(
    first: Sequence[int], shape: tuple[int, ...], chunks: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], Box, Box]]:
    """Place in the grid of every chunk that reaches into a block, and slices of what they share: of the block's, of the
    chunk's.
    """
    grid = [
        range(start // edge, -(-(start + length) // edge))
        for start, length, edge in zip(first, shape, chunks, strict=True)
    ]
    for place in product(*grid):
        ends = [
            (max(i * edge, start), min((i + 1) * edge, start + length))
            for i, edge, start, length in zip(place, chunks, first, shape, strict=True)
        ]
        yield (
            place,
            tuple(slice(a - start, b - start) for (a, b), start in zip(ends, first, strict=True)),
            tuple(slice(a - i * edge, b - i * edge) for (a, b), i, edge in zip(ends, place, chunks, strict=True)),
        )


def _copy(source: Array, target: Array) -> None:
    """A transposed matrix by way of a copy of its rows: torch transposes what is contiguous block by block, a third of
    the time that numpy takes, and that torch takes for a part of a larger matrix.
    """
    if source.ndim == 2 and source.strides[0] == source.itemsize:
        torch.from_numpy(target).copy_(torch.from_numpy(source.T.copy(order="C")).T)
    else:
        np.copyto(target, source)
