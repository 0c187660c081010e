"""Columns of Arrow tables: which hold the targets and the inputs, and their values as arrays.

Numbers keep their type. A column of lists of equal lengths, nested or not, has further axes.

Axes: n rows, then those of nested lists.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Shaped

from nntk_dist.errors import DataError, nearest_name

TARGET_NAMES = ("label", "labels", "target", "targets", "class", "y")


def target_column(schema: pa.Schema, column: str | None, name: str) -> str:
    """Return the column of targets: the given one, or the only one with a usual name.

    Raises:
        DataError: there is none or more than one, or its type cannot be a target.
    """
    if column is not None:
        _check_column(schema, column, name)
    else:
        found = [candidate for candidate in schema.names if candidate in TARGET_NAMES]
        if len(found) != 1:
            raise DataError(
                f"{name} has {len(found)} columns called {', '.join(TARGET_NAMES)}; "
                f"name the column of targets with data.target_column: {', '.join(schema.names)}"
            )
        column = found[0]
    kind = schema.field(column).type
    if (pa.types.is_nested(kind) and not is_list(kind)) or pa.types.is_temporal(kind) or is_image(kind):
        raise DataError(f"{name}: column '{column}' of type {kind} cannot be the target; give numbers or class names")
    return column


def input_columns(schema: pa.Schema, columns: Sequence[str] | None, target: str, name: str) -> list[str]:
    """Return the columns of the inputs: the given ones, or the only column of images, or all but the target.

    Raises:
        DataError: there is none, or one does not exist or has a type that cannot be an input.
    """
    if columns is None:
        images = [column for column in schema.names if is_image(schema.field(column).type)]
        chosen = images if len(images) == 1 else [column for column in schema.names if column != target]
    else:
        chosen = list(columns)
    if not chosen or target in chosen:
        raise DataError(
            f"{name}: the inputs must be columns other than the target '{target}'; name them with data.input_columns"
        )
    for column in chosen:
        _check_column(schema, column, name)
        kind = schema.field(column).type
        if not (_is_number(kind) or is_list(kind) or (is_image(kind) and len(chosen) == 1)):
            raise DataError(
                f"{name}: column '{column}' of type {kind} cannot be an input beside others; "
                "name columns of numbers or of lists of numbers, or one of images, with data.input_columns"
            )
    return chosen


def is_image(kind: pa.DataType) -> bool:
    """Return whether a column holds encoded images: bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_image(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column holds lists of numbers, of one length or of several, nested or not."""
    types = pa.types
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return False
    return is_list(kind.value_type) or _is_number(kind.value_type)


def numbers(column: pa.ChunkedArray, name: str) -> Shaped[np.ndarray, "n ..."]:
    """Return a column of numbers, or of lists of numbers, as an array; missing numbers become NaN.

    Args:
        column: of a table.
        name: names it in messages.

    Raises:
        DataError: a list is missing, or lists differ in length.

    Example:
        >>> numbers(pa.chunked_array([[[1, 2], [3, 4]]]), "ids")
        array([[1, 2],
               [3, 4]])
    """
    values = column.combine_chunks()
    shape = [len(values)]
    while is_list(values.type):
        if values.null_count:
            raise DataError(f"{name} has {values.null_count} missing lists; remove these rows or fill the gaps")
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        if len(lengths) and lengths.min() != lengths.max():
            raise DataError(
                f"{name} has lists of {lengths.min()} to {lengths.max()} numbers; pad them to one length, and name a "
                "column with the mask of what counts beside it if the model takes one"
            )
        shape.append(int(lengths[0]) if len(lengths) else 0)
        values = values.flatten()
    if values.null_count or pa.types.is_decimal(values.type):
        values = pc.cast(values, pa.float64(), safe=False)
    array: np.ndarray = values.to_numpy(zero_copy_only=False)
    return array.reshape(shape)


def _check_column(schema: pa.Schema, column: str, name: str) -> None:
    if column not in schema.names:
        raise DataError(
            f"{name} has no column '{column}'; it has {', '.join(schema.names)}{nearest_name(column, schema.names)}"
        )


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))
