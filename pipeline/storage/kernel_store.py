"""`kernel.zarr`: how its arrays are laid out, written and read back, in one place.

What this room is for: the policy (chunks, shards, codec, fill value, dimension names) that makes a flipped byte, a
missing tile and a half-written tile show, and that lets plain zarr, xarray and dask open the arrays as they are.
What it refuses to do: to write part of a shard (two such writers lose data silently), to know what the arrays mean, to
write consolidated metadata (not in the Zarr v3 specification).

Every inner chunk is Blosc's lz4 over shuffled bits, with a crc32c behind it (Blosc has none that is checked). Measured
on one core with chunks of a dense float32 kernel of MNIST: 78 % of the bytes, 2.5 GB/s in and 3.7 out; zstd at −1 kept
all of the bytes at 0.5 to 1.3 GB/s in, at 1 87 % at 0.6 in and 1.5 out.

Axis legend: whatever `dimension_names` of the array says.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.buffer import cpu
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError
from zarr.storage import LocalStore, StorePath

from nntk_dist.errors import NNTKError
from pipeline.storage.run_storage import (
    ACCESS_ERRORS,
    KERNEL_STORE,
    STORAGE_ERRORS,
    RunStorage,
    StorageRefusal,
    reason_of,
)
from pipeline.storage.shard_files import Bounds, forget_memory, has_content, kept_memory, opened, shard_files
from pipeline.storage.shards import can_encode, compressors, decode, encode

SCHEMA_NAME = "nntk-kernel"
SCHEMA_VERSION = 1
# Of inner chunks, the largest that fits first: 0.25 to 4 MiB of a float32 matrix. Reading whole shards of 4096² took a
# core 1.1 to 1.3 times as long in chunks of 512 as of 1024 (stripes of 512 rows 0.8 times); writing them, the same.
CHUNK_EDGES = range(1024, 255, -1)

Selection = tuple[slice, ...]
Each = Callable[[Callable[[Any], None], Iterable[Any]], Iterable[None]]

_CHUNK_BYTES = 2**30  # the most that an inner chunk takes: Blosc refuses 2 GiB
_STRIPE_BYTES = 2**22  # of values that have to be brought into C order for their checksum

# Not kept in the array's metadata, so every opening for writing has to say it: otherwise a tile that happens to equal
# the fill value would leave no file and look as if it had never been computed.
_CONFIG: Any = {"write_empty_chunks": True}


class _DamageError(Exception):
    """What lies in a file is not what was written."""


def create_store(storage: RunStorage, attributes: Mapping[str, Any]) -> None:
    """Create `kernel.zarr` where it is missing, and set the attributes of its root (schema and version are added).

    Raises: StorageRefusal where the storage does not take it.
    """
    with _refusals_named(f"'{storage.url}/{KERNEL_STORE}'"):
        root = zarr.open_group(storage.zarr_store(read_only=False), mode="a", zarr_format=3)
        root.update_attributes({**attributes, "schema": SCHEMA_NAME, "version": SCHEMA_VERSION})


def open_store(storage: RunStorage, *, read_only: bool = True) -> zarr.Group:
    """The root group.

    Raises:
        NNTKError: there is no kernel store here, it is something else, or of a newer version; a StorageRefusal where
            the storage does not say.
    """
    where = f"'{storage.url}/{KERNEL_STORE}'"
    mode: Literal["r", "r+"] = "r" if read_only else "r+"
    try:
        with _refusals_named(where):
            root = zarr.open_group(storage.zarr_store(read_only=read_only), mode=mode, zarr_format=3)
    except FileNotFoundError as error:
        raise NNTKError(f"there is no kernel store at {where}; run `nntk run` first, or check run_dir") from error
    except StorageRefusal:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise NNTKError(f"{where} is damaged ({error}); restore it from a copy or run anew") from error
    if root.attrs.get("schema") != SCHEMA_NAME:
        raise NNTKError(f"{where} is not a kernel store (its attribute schema is not '{SCHEMA_NAME}'); check run_dir")
    version = root.attrs.get("version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise NNTKError(
            f"{where} has version {version}; this nntk reads up to {SCHEMA_VERSION}: use the one that wrote it"
        )
    return root


def create_array(
    storage: RunStorage,
    path: str,
    *,
    shape: Sequence[int],
    dtype: npt.DTypeLike,
    shard: Sequence[int],
    dimension_names: Sequence[str],
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> zarr.Array:
    """Create an array by the policy of this module, open for writing.

    Args:
        storage: the run directory; `create_store` has been called for it.
        path: group and name, such as "train/gram".
        shape: its shape.
        dtype: stored little-endian; floats are filled with NaN, others with zarr's default.
        shard: rows, columns, … of one task's block; where it exceeds the shape, the shape counts.
        dimension_names: one name an axis; arrays of a group that share a name share its length.
        attributes: the array's own attributes.
        overwrite: replace an array of this name, with all its data.

    Raises:
        ValueError: the array exists already; a dimension name with another length in the group (xarray could not open
            it); lengths of the arguments that differ. Errors of the program, not of its user.
        StorageRefusal: the storage does not take it.
    """
    if not len(shape) == len(shard) == len(dimension_names):
        raise ValueError(f"{path}: shape {shape}, shard {shard} and dimension_names {dimension_names} differ in length")
    shards = tuple(max(1, min(edge, length)) for edge, length in zip(shard, shape, strict=True))
    dtype = np.dtype(dtype).newbyteorder("<")
    with _refusals_named(f"{path} of '{storage.url}/{KERNEL_STORE}'"):
        root = zarr.open_group(storage.zarr_store(read_only=False), mode="r+", zarr_format=3)
        group_path, _, name = path.rpartition("/")
        group = root.require_group(group_path) if group_path else root
        _check_dimensions(group, name, dict(zip(dimension_names, shape, strict=True)))
        try:
            return group.create_array(
                name,
                shape=tuple(shape),
                dtype=dtype,
                chunks=inner_chunks(shards, dtype.itemsize),
                shards=shards,
                compressors=compressors(dtype.itemsize),
                fill_value=np.nan if dtype.kind == "f" else None,
                dimension_names=list(dimension_names),
                attributes=dict(attributes or {}),
                overwrite=overwrite,
                config=_CONFIG,
            )
        except ContainsArrayError as error:
            raise ValueError(f"{path} exists already") from error


def open_array(storage: RunStorage, path: str, *, read_only: bool = True) -> zarr.Array:
    """An array of the store, with the settings that `write_block` needs.

    Raises:
        NNTKError: the store or the array does not exist; a StorageRefusal where the storage does not say.
    """
    array = _member(storage, path, read_only=read_only)
    if not isinstance(array, zarr.Array):
        raise NNTKError(f"'{storage.url}/{KERNEL_STORE}' has no array '{path}'; run its stage first, or check run_dir")
    return array.with_config(_CONFIG)


def has_array(storage: RunStorage, path: str) -> bool:
    """Whether the store holds something of this name.

    Raises: NNTKError as `open_array`, where there is no store.
    """
    return _member(storage, path, read_only=True) is not None


def _member(storage: RunStorage, path: str, *, read_only: bool) -> object:
    root = open_store(storage, read_only=read_only)
    with _refusals_named(f"{path} of '{storage.url}/{KERNEL_STORE}'"):
        return root.get(path)


def chunk_edge(shard_edge: int) -> int:
    """Edge of the inner chunks: the shard's where that is small, else its largest divisor from 256 to 1024.

    A shard edge without such a divisor is one chunk: a few large chunks cost less than very many small ones.
    """
    if shard_edge <= CHUNK_EDGES[0]:
        return shard_edge
    return next((edge for edge in CHUNK_EDGES if shard_edge % edge == 0), shard_edge)


def inner_chunks(shards: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Inner chunks of a shard: of `chunk_edge` where that does not make them too large, from the first axis on."""
    edges = [chunk_edge(edge) for edge in shards]
    for axis, shard in enumerate(shards):
        most = max(1, _CHUNK_BYTES // (itemsize * math.prod(edges[:axis] + edges[axis + 1 :])))
        if edges[axis] > most:
            edges[axis] = next(edge for edge in range(most, 0, -1) if shard % edge == 0)
    return tuple(edges)


def write_block(array: zarr.Array, selection: Selection, values: npt.ArrayLike) -> tuple[int, int]:
    """Write whole shards; returns the uncompressed number of bytes and the crc32c of the values as stored.

    Args:
        array: from `create_array` or `open_array(read_only=False)`.
        selection: one slice an axis, each beginning at a shard's edge and ending at one or at the array's.
        values: of the selection's shape (nothing is broadcast); cast to the array's dtype.

    Raises:
        ValueError: part of a shard, or values of another shape. Errors of the program, not of its user.
    """
    bounds = _bounds(array, selection)
    if not _of_whole_shards(array, bounds):
        raise ValueError(f"{array.path}: {_text(bounds)} is not made of whole shards of {array.shards or array.chunks}")
    block = np.asarray(values, dtype=array.dtype.newbyteorder("<"))
    if block.shape != tuple(stop - start for start, stop in bounds):
        raise ValueError(f"{array.path}: values of shape {block.shape} for {_text(bounds)}")
    if can_encode(array):
        return block.nbytes, _write_shards(array, bounds, block)
    array[selection] = block  # of a run that an earlier version began, with other codecs
    return block.nbytes, checksum(block)


def read_block(
    array: zarr.Array,
    selection: Selection,
    *,
    required: bool = True,
    dtype: npt.DTypeLike | None = None,
    each: Each | None = None,
) -> npt.NDArray[Any]:
    """The values of a selection, checksums verified; from a local disk without zarr's temporary copies.

    Args:
        array: any array of the store.
        selection: one slice an axis, not necessarily aligned.
        required: refuse where a shard has not been written; otherwise its place holds the fill value.
        dtype: to cast to, None for the array's own.
        each: the `map` of a pool, which then reads parts of the block from a local disk beside each other.

    Raises:
        NNTKError: damaged or missing data; names array, selection and, for missing data, the file. A StorageRefusal
            where the storage does not let us look.
    """
    bounds = _bounds(array, selection)
    where = f"{array.path}{_text(bounds)} of '{array.store}'"
    if required:
        with _refusals_named(where):
            missing = next((file for _, file in shard_files(array, bounds) if not has_content(file)), None)
        if missing is not None:
            raise NNTKError(f"{array.path}{_text(bounds)} is incomplete: '{missing}' is missing; see nntk verify")
    try:
        with _refusals_named(where, ACCESS_ERRORS):
            if required and _can_read(array, bounds):
                return _read_shards(array, bounds, dtype, each)
            with _damage_told():
                return np.asarray(array[selection], dtype=dtype)
    except STORAGE_ERRORS as error:  # of a file that is there
        raise NNTKError(
            f"{where} cannot be read ({reason_of(error)}); see to the storage, then continue with --resume"
        ) from error
    except _DamageError as error:
        raise NNTKError(f"{where} is damaged ({error}); restore it from a copy or run anew") from error


def checksum(block: npt.NDArray[Any]) -> int:
    """crc32c of a little-endian block in C order: what the ledger keeps, whatever the chunks and the codec."""
    crc = 0
    for stripe in _stripes(block):
        crc = google_crc32c.extend(crc, stripe)
    return crc


def former_checksum(block: npt.NDArray[Any]) -> int:
    """crc32 of a block in the same order: what the ledgers of earlier versions keep."""
    crc = 0
    for stripe in _stripes(block):
        crc = zlib.crc32(stripe.data, crc)
    return crc


@contextmanager
def _refusals_named(where: str, errors: tuple[type[Exception], ...] = STORAGE_ERRORS) -> Iterator[None]:
    """Such errors become a StorageRefusal that says where; that something is not there is no refusal."""
    try:
        yield
    except FileNotFoundError:
        raise
    except errors as error:
        raise StorageRefusal(
            f"{where} is out of reach ({reason_of(error)}); see to the storage, then continue with --resume"
        ) from error


@contextmanager
def _damage_told() -> Iterator[None]:
    """What zarr and its codecs raise for a checksum that does not match, and for what cannot be decoded at all, becomes
    a _DamageError: around the decoding alone, since threads and the program raise such errors too.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise _DamageError(str(error)) from error


def _stripes(block: npt.NDArray[Any]) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a block in C order, in portions."""
    step = max(1, _STRIPE_BYTES * len(block) // max(1, block.nbytes))
    for start in range(0, len(block), step):
        yield np.ascontiguousarray(block[start : start + step]).reshape(-1).view(np.uint8)


def _write_shards(array: zarr.Array, bounds: Bounds, block: npt.NDArray[Any]) -> int:
    """Write a block of whole shards, each atomically, as the store writes any file; the checksum of the block."""
    crcs = []
    for place, file in shard_files(array, bounds):
        # Memory stores keep what they are given.
        empty = kept_memory if isinstance(file.store, LocalStore) else None
        content, crc = encode(array, block[_box(array, place, bounds)], empty)
        try:
            sync(file.set(cpu.Buffer.from_array_like(content)))
        except BaseException:  # an interrupted write may go on in zarr's own thread
            forget_memory()
            raise
        crcs.append(crc)
    return crcs[0] if len(crcs) == 1 else checksum(block)


def _read_shards(array: zarr.Array, bounds: Bounds, dtype: npt.DTypeLike | None, each: Each | None) -> npt.NDArray[Any]:
    """The values of a block, of whole shards or of parts; by a pool a row of chunks at a time."""
    block = np.empty([stop - start for start, stop in bounds], array.dtype if dtype is None else dtype)
    edges = array.shards or array.chunks
    parts = []
    for place, file in shard_files(array, bounds):
        first = [max(0, start - i * edge) for i, edge, (start, _) in zip(place, edges, bounds, strict=True)]
        values = block[_box(array, place, bounds)]
        step = array.chunks[0] if each and isinstance(file.store, LocalStore) else edges[0]
        for begin in range(first[0] - first[0] % step, first[0] + len(values), step):
            rows = slice(max(begin - first[0], 0), begin + step - first[0])
            parts.append((array, file, values[rows], [max(begin, first[0]), *first[1:]]))
    list((each or map)(_read_part, parts))
    return block


def _read_part(part: tuple[zarr.Array, StorePath, npt.NDArray[Any], list[int]]) -> None:
    """Fill a part of a block, which begins so far into the shard of this file."""
    array, file, values, first = part
    with opened(file) as (size, read), _damage_told():
        decode(array, size, read, values, first)


def _can_read(array: zarr.Array, bounds: Bounds) -> bool:
    """Whether `_read_shards` does it as well as zarr, which has many requests under way at once, and asks for no more
    of a distant file than it needs.
    """
    if not can_encode(array):
        return False
    if isinstance(array.store, LocalStore):
        return True
    return _of_whole_shards(array, bounds) and len(list(shard_files(array, bounds))) == 1


def _of_whole_shards(array: zarr.Array, bounds: Bounds) -> bool:
    edges = zip(bounds, array.shape, array.shards or array.chunks, strict=True)
    return all(start % edge == 0 and (stop % edge == 0 or stop == length) for (start, stop), length, edge in edges)


def _box(array: zarr.Array, place: tuple[int, ...], bounds: Bounds) -> Selection:
    """Where a shard, or what the block has of it, lies within a block."""
    return tuple(
        slice(max(i * edge, start) - start, min((i + 1) * edge, stop) - start)
        for i, edge, (start, stop) in zip(place, array.shards or array.chunks, bounds, strict=True)
    )


def _check_dimensions(group: zarr.Group, name: str, lengths: Mapping[str, int]) -> None:
    for other_name, other in group.arrays():
        if other_name == name:
            continue
        names = getattr(other.metadata, "dimension_names", None) or ()
        for dimension, length in zip(names, other.shape, strict=False):
            if lengths.get(dimension, length) != length:
                raise ValueError(
                    f"{group.path}/{name}: {dimension} has length {length} in {other_name}, not {lengths[dimension]}"
                )


def _bounds(array: zarr.Array, selection: Selection) -> Bounds:
    """First and last-plus-one index on each axis."""
    if len(selection) != array.ndim:
        raise ValueError(f"{array.path}: {len(selection)} slices for {array.ndim} axes")
    ranges = [range(length)[part] for part, length in zip(selection, array.shape, strict=True)]
    if any(part.step != 1 or not part for part in ranges):
        raise ValueError(f"{array.path}: {selection} is empty or has steps")
    return tuple((part.start, part.stop) for part in ranges)


def _text(bounds: Bounds) -> str:
    return f"[{', '.join(f'{start}:{stop}' for start, stop in bounds)}]"
