"""The bytes of a shard's file: Zarr's `sharding_indexed`, encoded as a whole, decoded in part or as a whole.

These are the codecs of the store's arrays and a fast way to apply them; plain Zarr reads and writes the same files.
This module never writes part of a shard and opens no store.

A library would do: `zarr` itself, or the `zarrs` codec pipeline. For 4096² float32 (chunks of 1024, a dense kernel)
they take 2.7 and 2.0 times the processor time of this module to write a tile, 2.4 and 2.7 times for a transposed block,
2.0 and 1.5 times to read one, and 1.7 and 1.4 times to read on two threads (medians of 9, alternating, checksum of the
values included): the difference is temporary copies.

A file holds the inner chunks, each bytes → Blosc → crc32c, in C order of the chunk grid; then for each place of the
grid the position and length of its chunk as little-endian uint64, all ones if it lies outside the array; then the
crc32c of this index.

Axes: of the array; a stripe is one row of chunks along the first.
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
from numcodecs.blosc import Blosc, decompress
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec

# In the main thread of a process Blosc starts up to eight threads, however few the process may use.
blosc.use_threads = False

_ABSENT = 2**64 - 1
_CRC_BYTES = 4
_HEADER_BYTES = 16  # of a Blosc buffer: at 4 the length of its values, at 12 its own
_BLOSC: Any = {"cname": "lz4", "clevel": 1}

Array = npt.NDArray[Any]
Box = tuple[slice, ...]


def compressors(itemsize: int) -> tuple[BloscCodec, Crc32cCodec]:
    """Return the codecs behind the bytes of an inner chunk, for the metadata of the arrays that the store creates."""
    return BloscCodec(**_BLOSC, shuffle="bitshuffle", typesize=itemsize), Crc32cCodec()


def has_our_codecs(array: zarr.Array) -> bool:
    """Return whether the array's metadata name exactly the codecs that this module applies."""
    itemsize = array.dtype.itemsize
    to_bytes = BytesCodec(endian="little" if itemsize > 1 else None)
    sharding = ShardingCodec(chunk_shape=array.chunks, codecs=(to_bytes, *compressors(itemsize)))
    return (
        array.ndim > 0
        and array.dtype.kind in "biuf"
        and array.metadata.to_dict().get("codecs") == (sharding.to_dict(),)
    )


def encode(array: zarr.Array, values: Array, write: Callable[[bytes], object]) -> int:
    """Write the content of a shard's file, part by part.

    Args:
        array: one with the codecs of this module.
        values: the part of the shard within the array, in the array's dtype (little-endian), in any memory order.
        write: takes the parts one after the other.

    Returns:
        The crc32c of the values in C order.
    """
    compressor = Blosc(**_BLOSC, shuffle=Blosc.BITSHUFFLE, blocksize=0)
    padded = np.empty(array.chunks, array.dtype.newbyteorder("<"))
    stripe = np.empty((min(array.chunks[0], len(values)), *values.shape[1:]), values.dtype)
    index = np.full((*_grid(array), 2), _ABSENT, dtype="<u8")
    position = checksum = 0
    for row, start in enumerate(range(0, len(values), array.chunks[0])):
        rows = values[start : start + array.chunks[0]]
        in_order = rows if rows.flags.c_contiguous else stripe[: len(rows)]
        for place, box in _boxes(rows.shape, array.chunks):
            chunk, inner = _chunk(rows[box], padded, array.fill_value)
            encoded = compressor.encode(chunk)
            index[(row, *place[1:])] = position, len(encoded) + _CRC_BYTES
            write(encoded)
            write(_crc(encoded))
            position += len(encoded) + _CRC_BYTES
            if inner.shape == rows.shape and inner.flags.c_contiguous:
                in_order = inner  # the only one of the stripe
            elif in_order is not rows:
                in_order[box] = inner
        checksum = google_crc32c.extend(checksum, in_order)
    write(index.tobytes())
    write(_crc(index.tobytes()))
    return checksum


def _grid(array: zarr.Array) -> tuple[int, ...]:
    """Return how many chunks a shard has along each axis."""
    return tuple(edge // part for edge, part in zip(array.shards or array.chunks, array.chunks, strict=True))


def _crc(data: bytes) -> bytes:
    return google_crc32c.value(data).to_bytes(_CRC_BYTES, "little")


def _chunk(values: Array, padded: Array, fill_value: Any) -> tuple[Array, Array]:
    """Return a contiguous whole chunk, `padded` unless the values are one, and the part of it that holds the values."""
    whole = values.shape == padded.shape
    if whole and values.flags.c_contiguous:
        return values, values
    if not whole:
        padded[...] = fill_value
    inner = padded[tuple(map(slice, values.shape))]
    _copy(values, inner)
    return padded, inner


def decode(array: zarr.Array, size: int, read: Callable[[int, int], bytes], out: Array, first: Sequence[int]) -> None:
    """Fill `out` with values from a shard's file, every checksum verified, cast if its dtype differs.

    Args:
        array: one with the codecs of this module.
        size: of the file in bytes.
        read: returns a given number of bytes of the file from a given position on.
        out: as large as the wanted part of the shard, within the array.
        first: the position of the first entry of `out` in the shard.

    Raises:
        ValueError, RuntimeError: the content is not what `encode` makes of any values.
    """
    grid = _grid(array)
    num_bytes = 16 * math.prod(grid) + _CRC_BYTES
    if size < num_bytes:
        raise ValueError(f"{size} bytes hold no index")
    index = _checked(read(size - num_bytes, num_bytes), "the index").view("<u8").reshape(*grid, 2)
    chunk = np.empty(array.chunks, array.dtype.newbyteorder("<"))
    for place, box, inner in _overlaps(first, out.shape, array.chunks):
        part, (start, length) = out[box], map(int, index[place])
        if start == length == _ABSENT:  # plain Zarr leaves out chunks of the fill value
            part[...] = array.fill_value
            continue
        if start + length > size:
            raise ValueError(f"chunk {place} lies outside of the file")
        encoded = _checked(read(start, length), f"chunk {place}")
        header = np.frombuffer(encoded[:_HEADER_BYTES].tobytes().ljust(_HEADER_BYTES), "<u4")
        if header[1::2].tolist() != [chunk.nbytes, len(encoded)]:  # decompressing does not check this
            raise ValueError(f"chunk {place} is of another size than the chunks of '{array.path}'")
        if part.shape == chunk.shape and part.dtype == chunk.dtype and part.flags.c_contiguous:
            decompress(encoded, part)
            continue
        decompress(encoded, chunk)
        np.copyto(part, chunk[inner], casting="unsafe")  # as Zarr casts


def _checked(content: bytes, what: str) -> npt.NDArray[np.uint8]:
    """Return the bytes without the checksum behind them, after comparing it."""
    data, expected = np.frombuffer(content, np.uint8)[:-_CRC_BYTES], int.from_bytes(content[-_CRC_BYTES:], "little")
    if google_crc32c.value(data) != expected:
        raise ValueError(f"{what} has another checksum than was written")
    return data


def _boxes(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """Yield place in the grid and slices of every chunk that has values, in C order."""
    for place in product(*(range(-(-length // edge)) for length, edge in zip(shape, chunks, strict=True))):
        yield place, tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip(place, chunks, strict=True))


def _overlaps(
    first: Sequence[int], shape: tuple[int, ...], chunks: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], Box, Box]]:
    """Yield the place of every chunk that overlaps a block, and the overlap's slices in the block and in the chunk."""
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
    """Copy; a transposed matrix by way of a copy of its rows, since torch transposes contiguous memory block by block.

    That takes a third of the time of numpy, and of torch for a part of a larger matrix.
    """
    if source.ndim == 2 and source.strides[0] == source.itemsize:
        torch.from_numpy(target).copy_(torch.from_numpy(source.T.copy(order="C")).T)
    else:
        np.copyto(target, source)
