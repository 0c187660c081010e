"""Sources that are named arrays: NumPy archives, Zarr groups, and arrays in memory.

They hold `x` and `y` (one set, split by the loader), or `x_train`, `y_train`, `x_test` and `y_test`. Inputs are taken
as they are, images channels first: (n, features), (n, channels, height, width) or (n, height, width). In memory, inputs
may be a dict or tuple of arrays.

Axes: n examples.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import zarr
from jaxtyping import Int64, Shaped
from numpy.lib.npyio import NpzFile
from obstore.exceptions import BaseError
from obstore.store import from_url
from zarr.storage import ObjectStore

from nntk_dist.errors import DataError, first_line, one_line
from pipeline.data.source import Inputs, Source, SourceRows, existing_path

# Raised by stores, checksum codecs and decompressors.
_UNREADABLE = (BaseError, OSError, ValueError, RuntimeError)
SPLIT_KEYS = ("x_train", "y_train", "x_test", "y_test")
SINGLE_KEYS = ("x", "y")


def source_from_arrays(arrays: Mapping[str, Any], *, what: str) -> Source:
    """Make a source of named arrays.

    Args:
        arrays: `x` and `y`, or `x_train`, `y_train`, `x_test` and `y_test`; other keys are ignored.
        what: names the source in messages.

    Raises:
        DataError: a key is missing, an array is a single value, or inputs and targets differ in length.

    Example:
        >>> source = source_from_arrays({"x": [[1.0], [2.0]], "y": [0, 1]}, what="two points")
        >>> source.train.read([1])
        array([[2.]])
    """
    keys = SPLIT_KEYS if any(key in arrays for key in SPLIT_KEYS) else SINGLE_KEYS
    missing = [key for key in keys if key not in arrays]
    if missing:
        found = ", ".join(sorted(map(str, arrays))) or "nothing"
        raise DataError(
            f"{what} has no '{missing[0]}'; it needs {' and '.join(SINGLE_KEYS)}, or {', '.join(SPLIT_KEYS)}; "
            f"found {found}"
        )
    sets = [
        _rows(arrays[x_key], arrays[y_key], f"{what} {x_key}")
        for x_key, y_key in zip(keys[::2], keys[1::2], strict=True)
    ]
    return Source(sets[0], sets[1] if len(sets) == 2 else None)


def open_npz(location: str) -> Source:
    """Open a NumPy archive, `.npz`; pickled objects are refused.

    Args:
        location: its path.

    Raises:
        DataError: it is missing or damaged, or lacks an array.
    """
    what = f"npz:{location}"
    path = existing_path(location, what=what)
    wanted = (*SPLIT_KEYS, *SINGLE_KEYS)
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise ValueError("it is a single array")
        with archive:
            # the names of other arrays are kept for the message, their contents are not read
            arrays = {key: archive[key] if key in wanted else None for key in archive.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(
            f"{what} is no readable .npz archive of plain arrays ({one_line(error)}); write it with numpy.savez"
        ) from error
    return source_from_arrays(arrays, what=what)


def open_zarr(location: str) -> Source:
    """Open a Zarr group; only the selected rows are read.

    Args:
        location: its path, or a URL of an object store.

    Raises:
        DataError: it is missing or damaged, or lacks an array.
    """
    what = f"zarr:{location}"
    if "://" not in location:
        existing_path(location, what=what)
    try:
        remote = ObjectStore(from_url(location), read_only=True) if "://" in location else None
        group = zarr.open_group(remote or Path(location).expanduser(), mode="r")
        arrays = dict(group.arrays())
    except (*_UNREADABLE, TypeError) as error:
        raise DataError(
            f"{what} is no readable Zarr group ({one_line(error)}); give a group that holds x and y"
        ) from error
    return source_from_arrays(arrays, what=what)


def as_array(values: Any, name: str) -> Shaped[np.ndarray, "..."]:
    """Return an array, a tensor, a table or a list as a NumPy array.

    Args:
        values: what came; a table of pandas becomes one array of its columns.
        name: names it in messages.

    Raises:
        DataError: it has no such form.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().resolve_conj()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if hasattr(values, "columns") and hasattr(values, "to_numpy"):
        # column by column: together, numbers and booleans would be objects
        columns = {column: np.asarray(values[column]) for column in values.columns}
        for column, each in columns.items():
            if each.dtype.kind not in "biuf":
                raise DataError(f"{name}: column '{column}' has the type {each.dtype}; give numbers without gaps")
        return np.column_stack(list(columns.values()))
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:  # lists of different lengths, among others
        raise DataError(
            f"{name} is no array ({one_line(error)}); give numbers of one shape for each example"
        ) from error


def _rows(inputs: Any, targets: Any, name: str) -> SourceRows:
    targets = targets if isinstance(targets, zarr.Array) else as_array(targets, f"targets of {name}")
    if targets.ndim == 0:
        raise DataError(f"{name} has a single value as its targets; give one target for each row")
    targets = _read(targets, slice(None), name) if isinstance(targets, zarr.Array) else targets
    parts = dict(enumerate(inputs)) if isinstance(inputs, tuple) else inputs
    if not isinstance(parts, Mapping):
        whole = _array(inputs, targets, name)
        return SourceRows(name, targets, lambda rows: _taken(whole, rows, name))
    arrays = {key: _array(values, targets, f"{name}[{key!r}]") for key, values in parts.items()}

    def read(rows: Int64[np.ndarray, " n"]) -> Inputs:
        taken = {key: values[rows] for key, values in arrays.items()}
        return tuple(taken.values()) if isinstance(inputs, tuple) else {str(key): taken[key] for key in taken}

    return SourceRows(name, targets, read)


def _array(values: Any, targets: Shaped[np.ndarray, "..."], name: str) -> Any:
    array = values if isinstance(values, zarr.Array) else as_array(values, name)
    if array.ndim == 0:
        raise DataError(f"{name} is a single value; give an array whose first axis is the examples")
    if array.shape[0] != targets.shape[0]:
        raise DataError(
            f"{name} has {array.shape[0]} rows but its targets have {targets.shape[0]}; give one target per row"
        )
    return array


def _read(array: zarr.Array, selection: Any, name: str) -> Shaped[np.ndarray, "..."]:
    try:
        return np.asarray(array.oindex[selection])
    except _UNREADABLE as error:
        raise DataError(
            f"'{array.path}' of {name} cannot be read ({first_line(error)}); write it again, or check your access to it"
        ) from error


def _taken(values: Any, rows: Int64[np.ndarray, " n"], name: str) -> Shaped[np.ndarray, "n ..."]:
    taken: np.ndarray = _read(values, rows, name) if isinstance(values, zarr.Array) else values[rows]
    return taken
