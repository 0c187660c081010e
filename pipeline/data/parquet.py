"""Parquet files: a column of encoded images, or columns of numbers, and a column of targets.

Images become (channels, height, width) in [0, 1]; columns of numbers become vectors, in the order of `input_columns`.
The targets of all rows are read together; inputs are read and decoded for the selected rows only.

Axes: n examples, features, channels, height, width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from jaxtyping import Float, Int64, Shaped

from nntk_dist.errors import DataError, nearest_name, one_line
from pipeline.data.images import decode_image
from pipeline.data.source import Source, SourceRows, existing_path

TARGET_NAMES = ("label", "labels", "target", "targets", "class", "y")


def open_parquet(location: str, input_columns: Sequence[str] | None = None, target_column: str | None = None) -> Source:
    """Open one file; `TRAIN,TEST`; or a folder of `train*.parquet` and `test*.parquet`, in the order of their names.

    Args:
        location: path or paths.
        input_columns: one column of images (bytes, or a struct with a field `bytes`), or columns of numbers. None: the
            only column of images, or else all columns but the target's.
        target_column: None for the only column called label, labels, target, targets, class or y.

    Raises:
        DataError: a file is missing or unreadable, or a column is missing or of a type that cannot be used.
    """
    what = f"parquet:{location}"
    train, *test = [_Table(paths, what) for paths in _files(location, what)]
    target, inputs = train.columns(input_columns, target_column)
    # by the names of the train table: another order, or another column in its place, would be another feature
    others = [table.rows(*table.columns(inputs, target)) for table in test]
    return Source(train.rows(target, inputs), others[0] if others else None)


def _files(location: str, what: str) -> list[list[Path]]:
    parts = location.split(",")
    if len(parts) == 2 and not Path(location).exists():
        return [[existing_path(part.strip(), what=what)] for part in parts]
    path = existing_path(location, what=what)
    if path.is_file():
        return [[path]]
    sets = [sorted(path.glob(f"{name}*.parquet")) for name in ("train", "test")]
    if not all(sets):
        absent = "test" if sets[0] else "train"
        raise DataError(f"{what} has no {absent}*.parquet; a folder needs train*.parquet and test*.parquet")
    return sets


@dataclass(frozen=True)
class _Table:
    """Files that together are one table."""

    paths: list[Path]
    what: str

    @property
    def name(self) -> str:
        return f"'{self.paths[0]}'" + (f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else "")

    def columns(self, input_columns: Sequence[str] | None, target_column: str | None) -> tuple[str, list[str]]:
        """Return the column of the targets and the columns of the inputs."""
        schema = self._schema()
        target = _target_column(schema, target_column, self.name)
        return target, _input_columns(schema, input_columns, target, self.name)

    def rows(self, target: str, inputs: list[str]) -> SourceRows:
        read = self._read_images if _is_image(self._schema().field(inputs[0]).type) else self._read_numbers
        return SourceRows(self.name, self._read_targets(target), lambda rows: read(inputs, rows))

    def _schema(self) -> pa.Schema:
        with self._readable():
            return self._dataset().schema

    def _dataset(self) -> pads.Dataset:
        return pads.dataset([str(path) for path in self.paths], format="parquet")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.what}: {self.name} is no readable Parquet file ({one_line(error)}); write it again"
            ) from error

    def _take(self, rows: Int64[np.ndarray, " n"], columns: list[str]) -> pa.Table:
        """The columns in these rows, in their order."""
        with self._readable():
            return self._dataset().take(pa.array(rows), columns=columns)

    def _read_targets(self, column: str) -> Shaped[np.ndarray, " rows"]:
        with self._readable():
            values = self._dataset().to_table([column])[column].combine_chunks()
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if values.null_count and not pa.types.is_floating(values.type):
            first = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(
                f"{self.name} has {values.null_count} missing targets, the first in row {first}; remove these rows"
            )
        targets: np.ndarray = values.to_numpy(zero_copy_only=False)
        return targets.astype(np.float64) if pa.types.is_decimal(values.type) else targets

    def _read_numbers(self, columns: list[str], rows: Int64[np.ndarray, " n"]) -> Float[np.ndarray, "n features"]:
        table = self._take(rows, columns)
        # a missing number becomes NaN, which the loader reports
        return np.stack([pc.cast(table[name], pa.float64(), safe=False).to_numpy() for name in columns], axis=1)

    def _read_images(self, columns: list[str], rows: Int64[np.ndarray, " n"]) -> Float[np.ndarray, "n c height width"]:
        encoded = self._take(rows, columns)[columns[0]]
        if pa.types.is_struct(encoded.type):
            encoded = pc.struct_field(encoded, "bytes")
        images: np.ndarray | None = None
        for index, (row, data) in enumerate(zip(rows, encoded, strict=True)):
            image = decode_image(data.as_py(), what=f"{self.name}: image in row {row}")
            if images is None:
                images = np.empty((len(rows), *image.shape), dtype=np.float32)
            elif image.shape != images.shape[1:]:
                raise DataError(
                    f"{self.name}: image in row {row} has shape {image.shape} (channels, height, width), "
                    f"that in row {rows[0]} {images.shape[1:]}; give images of one size and kind"
                )
            images[index] = image
        assert images is not None, "the loader never reads no rows"
        return images


def _target_column(schema: pa.Schema, column: str | None, name: str) -> str:
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
    if pa.types.is_nested(kind) or pa.types.is_temporal(kind) or _is_image(kind):
        raise DataError(f"{name}: column '{column}' of type {kind} cannot be the target; give numbers or class names")
    return column


def _input_columns(schema: pa.Schema, columns: Sequence[str] | None, target: str, name: str) -> list[str]:
    if columns is None:
        images = [column for column in schema.names if _is_image(schema.field(column).type)]
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
        if not (_is_number(kind) or (_is_image(kind) and len(chosen) == 1)):
            raise DataError(
                f"{name}: column '{column}' of type {kind} cannot be an input beside others; "
                "name columns of numbers, or one of images, with data.input_columns"
            )
    return chosen


def _check_column(schema: pa.Schema, column: str, name: str) -> None:
    if column not in schema.names:
        raise DataError(
            f"{name} has no column '{column}'; it has {', '.join(schema.names)}{nearest_name(column, schema.names)}"
        )


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
