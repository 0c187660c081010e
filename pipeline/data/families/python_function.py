"""Sources that a Python function returns: arrays, torch data sets, or tables.

A table is recognised by what it offers, not by its package: the Arrow stream of polars, DuckDB and others
(`__arrow_c_stream__`), or the formats of a Hugging Face data set (`with_format`).

Axes: n examples.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from nntk_dist.errors import ArgumentError, DataError, NNTKError, one_line
from nntk_dist.registration.callables import call_checked, import_function, takes_argument
from pipeline.data.families.arrays import SINGLE_KEYS, SPLIT_KEYS, as_array, source_from_arrays
from pipeline.data.families.tables import Table, source_from_tables
from pipeline.data.source import Source, SourceRows

_SETS = ("train", "test")
_STREAM = "__arrow_c_stream__"
_ITEM = (int, float, np.ndarray, np.generic, Tensor)


def open_python(
    location: str, /, input_columns: Sequence[str] | None = None, target_column: str | None = None, **args: Any
) -> Source:
    """Open what a function returns.

    That is the pair (x, y), or a mapping of named arrays, see `source_from_arrays`; a torch data set of pairs (x, y),
    whose items are numbers, tensors or NumPy arrays, or a dict or tuple of them for x; or a table: a pandas or polars
    DataFrame, an Arrow table or anything with an Arrow stream, a Hugging Face data set. A
    mapping of `train` and `test` holds two data sets or two tables.

    Args:
        location: `module:function`.
        input_columns: see `source_from_tables`; passed on to a function that takes it.
        target_column: see `source_from_tables`; passed on to a function that takes it.
        **args: the function's arguments.

    Raises:
        ArgumentError: it cannot be imported, or does not take these arguments, or columns are named and it returns no
            table.
        DataError: it fails, or returns something else.
    """
    what = f"python:{location}"
    function = import_function(location, what="data source")
    columns = {"input_columns": input_columns, "target_column": target_column}
    named = {key: value for key, value in columns.items() if value is not None}
    result = call_checked(function, args, what=f"data source {what}", offered=named, failure=DataError)
    tables = _tables_of(result, f"data source {what}")
    if tables:
        return source_from_tables(tables[0], tables[1] if len(tables) == 2 else None, input_columns, target_column)
    ignored = [name for name in named if not takes_argument(function, name)]
    if ignored:
        raise ArgumentError(
            f"data.{ignored[0]} names columns, but data source {what} returned no table and takes no argument "
            f"'{ignored[0]}'; leave it out"
        )
    return _source(result, f"data source {what}")


def _tables_of(result: Any, what: str) -> list[Table]:
    """The table that a function returned, or the tables of training and test examples; empty if it returned none."""
    sets = _sets(result)
    if not all(_is_table(each) for each in sets.values()):
        return []
    return [_table(each, f"{what} {name}".strip()) for name, each in sets.items()]


def _sets(result: Any) -> dict[str, Any]:
    """The sets of a mapping of `train` and `test`, or one set without a name."""
    if isinstance(result, Mapping) and set(result) == set(_SETS):
        return {name: result[name] for name in _SETS}
    return {"": result}


def _source(result: Any, what: str) -> Source:
    sets = _sets(result)
    if all(isinstance(each, Dataset) for each in sets.values()):
        train, *test = [_dataset_rows(each, f"{what} {name}".strip()) for name, each in sets.items()]
        return Source(train, test[0] if test else None)
    if isinstance(result, tuple | list) and len(result) == 2:
        result = dict(zip(SINGLE_KEYS, result, strict=True))
    if not isinstance(result, Mapping):
        raise DataError(
            f"{what} returned a {type(result).__name__}; it must return (x, y), or a mapping with "
            f"{' and '.join(SINGLE_KEYS)}, or {', '.join(SPLIT_KEYS)}, or a torch data set, or a table"
        )
    return source_from_arrays(result, what=what)


def _is_table(value: Any) -> bool:
    return isinstance(value, pa.Table) or _is_frame(value) or _is_hugging_face(value) or hasattr(value, _STREAM)


def _is_frame(value: Any) -> bool:
    pandas = sys.modules.get("pandas")  # who returns a DataFrame has imported it
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _is_hugging_face(value: Any) -> bool:
    """Whether this is a Hugging Face data set with a length; one that streams has none."""
    return hasattr(value, "with_format") and hasattr(value, "column_names") and hasattr(value, "__len__")


def _table(value: Any, name: str) -> Table:
    """A table in memory."""
    try:
        table = _arrow_table(value)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{name} cannot be read as a table: {one_line(error)}") from error
    return Table(name, lambda: pads.dataset(table), "cannot be read as a table")


def _arrow_table(value: Any) -> pa.Table:
    """The table of Arrow; a stream can be read once only."""
    if isinstance(value, pa.Table):
        return value
    if _is_frame(value):
        return pa.Table.from_pandas(value, preserve_index=False)
    return value.with_format("arrow")[:] if _is_hugging_face(value) else pa.table(value)


def _dataset_rows(dataset: Any, name: str) -> SourceRows:
    """The rows of a torch data set. Every item is read once for its target, and the selected ones for their inputs."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(f"{name} is a data set without a length; give one with __len__ and __getitem__")
    targets = [_item(dataset, row, name)[1] for row in range(len(dataset))]

    def read(rows: Int64[np.ndarray, " n"]) -> Any:
        return _stacked([_item(dataset, int(row), name)[0] for row in rows], f"{name}: inputs")

    return SourceRows(name, _stacked(targets, f"{name}: targets") if targets else np.zeros(0), read)


def _item(dataset: Any, row: int, name: str) -> tuple[Any, Any]:
    try:
        item = dataset[row]
    except NNTKError:
        raise
    except Exception as error:  # a data set is anyone's; its exception stays visible as the cause
        raise DataError(f"{name}: item {row} cannot be read: {type(error).__name__}: {one_line(error)}") from error
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise DataError(f"{name}: item {row} is a {type(item).__name__}; give pairs (x, y)")
    return item[0], item[1]


def _stacked(values: Sequence[Any], name: str) -> Any:
    """Items as one array, or as a dict or tuple of arrays."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _stacked([value[key] for value in values], f"{name} '{key}'") for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked(part, f"{name} {place}") for place, part in enumerate(zip(*values, strict=True)))
    if not isinstance(first, (*_ITEM, str)):
        raise DataError(f"{name} are {type(first).__name__} objects; give numbers, tensors or NumPy arrays")
    arrays = [as_array(value, name) for value in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        listed = " and ".join(map(str, sorted(shapes)[:2]))
        raise DataError(f"{name} have different shapes, such as {listed}; give all examples one shape (pad sequences)")
    return np.stack(arrays)
