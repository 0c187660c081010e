"""`kernel.zarr`: how its arrays are laid out, written and read back, in one place.

The policy (chunks, shards, codec, fill value, dimension names) makes a flipped byte, a missing tile and a half-written
tile show, and lets plain Zarr, xarray and dask open the arrays as they are. This module never writes part of a shard
(two such writers lose data silently), does not know what the arrays mean, and writes no consolidated metadata (not in
the Zarr v3 specification).

Every inner chunk is Blosc's lz4 over shuffled bits, followed by a crc32c (Blosc itself verifies no checksum).
Measured on one core with chunks of a dense float32 kernel of MNIST: 78 % of the bytes, 2.5 GB/s written and 3.7 read;
zstd at -1 kept all bytes at 0.5 to 1.3 GB/s written, at 1 87 % at 0.6 written and 1.5 read.

Axes: those that `dimension_names` of each array says.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.errors import ContainsArrayError
from zarr.storage import LocalStore, StorePath

from nntk_dist.errors import StoreError
from pipeline.storage.run_storage import (
    ACCESS_ERRORS,
    KERNEL_STORE,
    STORAGE_ERRORS,
    RunStorage,
    StorageRefusal,
    reason_of,
)
from pipeline.storage.shard_files import Bounds, has_content, reading, shard_files, writing
from pipeline.storage.shards import compressors, decode, encode, has_our_codecs

SCHEMA_NAME = "nntk-kernel"
SCHEMA_VERSION = 1
# Edges of inner chunks, largest first: 0.25 to 4 MiB of a float32 matrix. Reading whole shards of 4096² took a core 1.1
# to 1.3 times as long in chunks of 512 as of 1024 (stripes of 512 rows 0.8 times); writing them, the same.
CHUNK_EDGES = range(1024, 255, -1)

Selection = tuple[slice, ...]
Each = Callable[[Callable[[Any], None], Iterable[Any]], Iterable[None]]

_CHUNK_BYTES = 2**30  # of an inner chunk at most: Blosc refuses 2 GiB
_STRIPE_BYTES = 2**22  # of values that are brought into C order for their checksum
_REPAIR = "run `nntk verify --forget` on its run_dir, then continue with --resume: what is missing is made again"

# The array's metadata do not keep this, so every opening for writing sets it: otherwise a tile that happens to equal
# the fill value would leave no file and look as if it had never been computed.
_CONFIG: Any = {"write_empty_chunks": True}


class _DamageError(Exception):
    """A file holds something else than was written."""


def create_store(storage: RunStorage, attributes: Mapping[str, Any]) -> None:
    """Create `kernel.zarr` if it is missing, and set the attributes of its root; schema and version are added.

    Raises:
        StorageRefusal: the storage does not answer or refuses.
    """
    with _refusals_named(f"'{storage.url}/{KERNEL_STORE}'"):
        root = zarr.open_group(storage.zarr_store(read_only=False), mode="a", zarr_format=3)
        root.update_attributes({**attributes, "schema": SCHEMA_NAME, "version": SCHEMA_VERSION})


def open_store(storage: RunStorage, *, read_only: bool = True) -> zarr.Group:
    """Open the root group.

    Raises:
        StoreError: there is no kernel store here, it is something else, or of another version.
        StorageRefusal: the storage does not answer or refuses.
    """
    where = f"'{storage.url}/{KERNEL_STORE}'"
    mode: Literal["r", "r+"] = "r" if read_only else "r+"
    try:
        with _refusals_named(where):
            root = zarr.open_group(storage.zarr_store(read_only=read_only), mode=mode, zarr_format=3)
    except FileNotFoundError as error:
        raise StoreError(f"there is no kernel store at {where}; run `nntk run` first, or check run_dir") from error
    except StorageRefusal:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{where} is damaged ({error}); restore it from a copy or run anew") from error
    if root.attrs.get("schema") != SCHEMA_NAME:
        raise StoreError(f"{where} is not a kernel store (its attribute schema is not '{SCHEMA_NAME}'); check run_dir")
    version = root.attrs.get("version")
    if version != SCHEMA_VERSION:
        raise StoreError(f"{where} has version {version}; this nntk reads {SCHEMA_VERSION}: use the one that wrote it")
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
        dtype: stored little-endian; the fill value is NaN for floats, Zarr's default for others.
        shard: rows, columns, … of one task's block; at most the shape counts.
        dimension_names: one for each axis; arrays of a group that share a name share its length.
        attributes: of the array itself.
        overwrite: replace an array of this name, with all its data.

    Raises:
        ValueError: the array exists already; a dimension name has another length in the group (xarray could not open
            it); the arguments differ in length. Bugs of the program, not errors of its user.
        StorageRefusal: the storage does not answer or refuses.
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
    """Open an array of the store, with the settings that `write_block` needs.

    Raises:
        StoreError: the store or the array does not exist, or the array has other codecs than this module gives it.
        StorageRefusal: the storage does not answer or refuses.
    """
    array = _member(storage, path, read_only=read_only)
    if not isinstance(array, zarr.Array):
        raise StoreError(f"'{storage.url}/{KERNEL_STORE}' has no array '{path}'; run its stage first, or check run_dir")
    if not has_our_codecs(array):
        raise StoreError(f"'{storage.url}/{KERNEL_STORE}': array '{path}' has codecs of another program; check run_dir")
    return array.with_config(_CONFIG)


def has_array(storage: RunStorage, path: str) -> bool:
    """Return whether the store holds something of this name.

    Raises:
        StoreError: there is no store.
        StorageRefusal: the storage does not answer or refuses.
    """
    return _member(storage, path, read_only=True) is not None


def _member(storage: RunStorage, path: str, *, read_only: bool) -> object:
    root = open_store(storage, read_only=read_only)
    with _refusals_named(f"{path} of '{storage.url}/{KERNEL_STORE}'"):
        return root.get(path)


def chunk_edge(shard_edge: int) -> int:
    """Return the edge of the inner chunks: the shard's own up to 1024, else its largest divisor from 256 to 1024.

    A shard edge without such a divisor is one chunk: a few large chunks cost less than very many small ones.
    """
    if shard_edge <= CHUNK_EDGES[0]:
        return shard_edge
    return next((edge for edge in CHUNK_EDGES if shard_edge % edge == 0), shard_edge)


def inner_chunks(shards: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the shape of a shard's inner chunks: `chunk_edge` along each axis, or less from the first axis on.

    Args:
        shards: the shape of a shard.
        itemsize: bytes of a number.
    """
    edges = [chunk_edge(edge) for edge in shards]
    for axis, shard in enumerate(shards):
        most = max(1, _CHUNK_BYTES // (itemsize * math.prod(edges[:axis] + edges[axis + 1 :])))
        if edges[axis] > most:
            edges[axis] = next(edge for edge in range(most, 0, -1) if shard % edge == 0)
    return tuple(edges)


def write_block(array: zarr.Array, selection: Selection, values: npt.ArrayLike) -> tuple[int, int]:
    """Write whole shards, each atomically.

    Args:
        array: from `create_array` or `open_array(read_only=False)`.
        selection: one slice for each axis, from a shard's edge to another or to the array's.
        values: of the selection's shape (nothing is broadcast); cast to the array's dtype.

    Returns:
        The uncompressed number of bytes and the crc32c of the values as stored, in C order.

    Raises:
        ValueError: part of a shard, or values of another shape. Bugs of the program, not errors of its user.
    """
    bounds = _bounds(array, selection)
    if not _of_whole_shards(array, bounds):
        raise ValueError(
            f"{array.path}: {_text(bounds)} does not consist of whole shards of {array.shards or array.chunks}"
        )
    block = np.asarray(values, dtype=array.dtype.newbyteorder("<"))
    if block.shape != tuple(stop - start for start, stop in bounds):
        raise ValueError(f"{array.path}: values of shape {block.shape} for {_text(bounds)}")
    crcs = []
    for place, file in shard_files(array, bounds):
        with writing(file) as write:
            crcs.append(encode(array, block[_box(array, place, bounds)], write))
    return block.nbytes, crcs[0] if len(crcs) == 1 else checksum(block)


def read_block(
    array: zarr.Array,
    selection: Selection,
    *,
    required: bool = True,
    dtype: npt.DTypeLike | None = None,
    each: Each | None = None,
) -> npt.NDArray[Any]:
    """Read the values of a selection and verify their checksums; from a local disk without Zarr's temporary copies.

    Args:
        array: from `create_array` or `open_array`.
        selection: one slice for each axis, not necessarily aligned with shards.
        required: raise if a shard has not been written; otherwise its place holds the fill value.
        dtype: to cast to; None for the array's own.
        each: the `map` of a pool that reads parts of the block from a local disk side by side.

    Raises:
        StoreError: data are damaged or missing; names array, selection and, for missing data, the file.
        StorageRefusal: the storage does not answer or refuses.
    """
    bounds = _bounds(array, selection)
    where = f"{array.path}{_text(bounds)} of '{array.store}'"
    if required:
        with _refusals_named(where):
            missing = next((file for _, file in shard_files(array, bounds) if not has_content(file)), None)
        if missing is not None:
            raise StoreError(f"{array.path}{_text(bounds)} is incomplete: '{missing}' is missing; {_REPAIR}")
    try:
        with _refusals_named(where, ACCESS_ERRORS):
            if required and _can_read(array, bounds):
                return _read_shards(array, bounds, dtype, each)
            with _damage_named():
                return np.asarray(array[selection], dtype=dtype)
    except STORAGE_ERRORS as error:  # of a file that is there
        raise StoreError(
            f"{where} cannot be read ({reason_of(error)}); check the storage, then continue with --resume"
        ) from error
    except _DamageError as error:
        raise StoreError(f"{where} is damaged ({error}); {_REPAIR}") from error


def checksum(block: npt.NDArray[Any]) -> int:
    """Return the crc32c of a little-endian block in C order, for the ledger; it does not depend on chunks or codecs."""
    crc, step = 0, max(1, _STRIPE_BYTES * len(block) // max(1, block.nbytes))
    for start in range(0, len(block), step):
        crc = google_crc32c.extend(crc, np.ascontiguousarray(block[start : start + step]))
    return crc


@contextmanager
def _refusals_named(where: str, errors: tuple[type[Exception], ...] = STORAGE_ERRORS) -> Iterator[None]:
    """Convert these errors to a StorageRefusal that names the place; a missing file is not one of them."""
    try:
        yield
    except FileNotFoundError:
        raise
    except errors as error:
        raise StorageRefusal(
            f"{where} is out of reach ({reason_of(error)}); check the storage, then continue with --resume"
        ) from error


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turn what codecs raise for damaged data into a _DamageError.

    Use it around the decoding alone, since threads and bugs raise the same types.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise _DamageError(str(error)) from error


def _read_shards(array: zarr.Array, bounds: Bounds, dtype: npt.DTypeLike | None, each: Each | None) -> npt.NDArray[Any]:
    """Read a block of whole shards or of parts; by a pool a row of chunks at a time."""
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
    """Fill a part of a block that begins at `first` in the shard of this file."""
    array, file, values, first = part
    with reading(file) as (size, read), _damage_named():
        decode(array, size, read, values, first)


def _can_read(array: zarr.Array, bounds: Bounds) -> bool:
    """Return whether `_read_shards` is as fast as Zarr, which sends requests in parallel and reads parts of files."""
    if isinstance(array.store, LocalStore):
        return True
    return _of_whole_shards(array, bounds) and len(list(shard_files(array, bounds))) == 1


def _of_whole_shards(array: zarr.Array, bounds: Bounds) -> bool:
    edges = zip(bounds, array.shape, array.shards or array.chunks, strict=True)
    return all(start % edge == 0 and (stop % edge == 0 or stop == length) for (start, stop), length, edge in edges)


def _box(array: zarr.Array, place: tuple[int, ...], bounds: Bounds) -> Selection:
    """Return the slices of a block that a shard overlaps."""
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
    """Return first and last-plus-one index on each axis."""
    if len(selection) != array.ndim:
        raise ValueError(f"{array.path}: {len(selection)} slices for {array.ndim} axes")
    ranges = [range(length)[part] for part, length in zip(selection, array.shape, strict=True)]
    if any(part.step != 1 or not part for part in ranges):
        raise ValueError(f"{array.path}: {selection} is empty or has steps")
    return tuple((part.start, part.stop) for part in ranges)


def _text(bounds: Bounds) -> str:
    return f"[{', '.join(f'{start}:{stop}' for start, stop in bounds)}]"
