"""Tables: Parquet, CSV and Arrow files, and what a Python function returns as a table.

A column of encoded images becomes (n, channels, height, width) in [0, 1]. Columns of numbers become vectors, in the
order of `input_columns`; they keep their common type. One column of lists becomes an array with further axes. Several
columns with a list among them, such as token ids and a mask, become a dict of arrays. The targets of all rows are read
together; inputs for the selected rows only (a CSV file is parsed as a whole).

Axes: n examples, features, channels, height, width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.dataset as pads
from jaxtyping import Float, Int64, Shaped

from nntk_dist.errors import DataError, check_choice, one_line
from pipeline.data.families.columns import input_columns, is_image, is_list, numbers, target_column
from pipeline.data.families.images import decode_image
from pipeline.data.source import Source, SourceRows, existing_path

_CASTS = ("float32", "float64", "int32", "int64")
_LONGEST_BLOCK = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """Rows and columns, opened at the first use.

    Attributes:
        name: names it in messages.
        open: opens it.
        unreadable: what to say of files that cannot be read.
        dtype: the type to which inputs are converted; None leaves them as they are.
    """

    name: str
    open: Callable[[], pads.Dataset]
    unreadable: str = "cannot be read"
    dtype: str | None = None

    def rows(self, target: str, inputs: list[str]) -> SourceRows:
        """Return the rows of these columns."""
        kinds = [self.schema.field(column).type for column in inputs]
        read: Callable[..., Any] = self._read_numbers
        if is_image(kinds[0]):
            read = self._read_images
        elif len(inputs) > 1 and any(map(is_list, kinds)):
            read = self._read_parts
        return SourceRows(self.name, self._read_targets(target), lambda rows: read(inputs, rows))

    @cached_property
    def schema(self) -> pa.Schema:
        """Names and types of its columns. Raises: DataError if it cannot be read."""
        with self._readable():
            return self._dataset.schema

    @cached_property
    def _dataset(self) -> pads.Dataset:
        return self.open()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.name} {self.unreadable} ({one_line(error)}); write it again") from error

    def _take(self, rows: Int64[np.ndarray, " n"], columns: list[str]) -> pa.Table:
        """The columns in these rows, in their order."""
        with self._readable():
            return self._dataset.take(pa.array(rows), columns=columns)

    def _read_targets(self, column: str) -> Shaped[np.ndarray, "rows ..."]:
        with self._readable():
            found = self._dataset.to_table([column])[column]
        if is_list(found.type):
            return numbers(found, self._named(column))
        values = found.combine_chunks()
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if values.null_count and not pa.types.is_floating(values.type):
            first = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(
                f"{self.name} has {values.null_count} missing targets, the first in row {first}; remove these rows"
            )
        targets: np.ndarray = values.to_numpy(zero_copy_only=False)
        return targets.astype(np.float64) if pa.types.is_decimal(values.type) else targets

    def _read_parts(self, columns: list[str], rows: Int64[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        table = self._take(rows, columns)
        return {column: self._cast(numbers(table[column], self._named(column))) for column in columns}

    def _read_numbers(self, columns: list[str], rows: Int64[np.ndarray, " n"]) -> Shaped[np.ndarray, "n ..."]:
        arrays = list(self._read_parts(columns, rows).values())
        return arrays[0] if arrays[0].ndim > 1 else np.stack(arrays, axis=1)

    def _cast(self, values: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "n ..."]:
        return values if self.dtype is None else values.astype(self.dtype)

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

    def _named(self, column: str) -> str:
        return f"{self.name}: column '{column}'"


def source_from_tables(train: Table, test: Table | None, inputs: Sequence[str] | None, target: str | None) -> Source:
    """Make a source of one table, or of a training and a test table.

    Args:
        train: the training table.
        test: the test table, if there are two.
        inputs: one column of images (bytes, or a struct with a field `bytes`), or columns of numbers or of lists of
            numbers. None: the only column of images, or else all columns but the target's.
        target: None for the only column called label, labels, target, targets, class or y.

    Raises:
        DataError: a column is missing or of a type that cannot be used, or a file cannot be read.
    """
    label = target_column(train.schema, target, train.name)
    chosen = input_columns(train.schema, inputs, label, train.name)
    if test is None:
        return Source(train.rows(label, chosen), None)
    # by the names of the train table: another order, or another column in its place, would be another feature
    checked = target_column(test.schema, label, test.name), input_columns(test.schema, chosen, label, test.name)
    return Source(train.rows(label, chosen), test.rows(*checked))


def open_parquet(
    location: str,
    input_columns: Sequence[str] | None = None,
    target_column: str | None = None,
    dtype: str | None = None,
) -> Source:
    """Open Parquet files: one; `TRAIN,TEST`; or a folder of `train*.parquet` and `test*.parquet`, in order of name.

    Args:
        location: path or paths.
        input_columns: see `source_from_tables`.
        target_column: see `source_from_tables`.
        dtype: the type to which inputs are converted, such as float32 for whole numbers that are no ids.

    Raises:
        DataError: a file is missing or unreadable, or a column cannot be used.
    """

    def opened(paths: list[Path]) -> pads.Dataset:
        return pads.dataset([str(path) for path in paths], format="parquet")

    tables = _tables(location, "parquet", "Parquet", ("parquet",), opened, dtype)
    return source_from_tables(*tables, input_columns, target_column)


def open_csv(
    location: str,
    input_columns: Sequence[str] | None = None,
    target_column: str | None = None,
    dtype: str | None = None,
    delimiter: str = ",",
) -> Source:
    """Open CSV files with a line of column names, as `open_parquet` does; types are found from all lines of a file.

    Args:
        location: path or paths.
        input_columns: see `source_from_tables`.
        target_column: see `source_from_tables`.
        dtype: the type to which inputs are converted, such as float32 for whole numbers that are no ids.
        delimiter: the character between columns.

    Raises:
        DataError: a file is missing or unreadable, or a column cannot be used.
    """

    def opened(paths: list[Path]) -> pads.Dataset:
        return pads.dataset(pa.concat_tables([read(path) for path in paths], promote_options="permissive"))

    def read(path: Path) -> pa.Table:
        whole = pacsv.ReadOptions(block_size=min(_LONGEST_BLOCK, max(1, path.stat().st_size)))
        return pacsv.read_csv(path, whole, pacsv.ParseOptions(delimiter=delimiter))

    if not isinstance(delimiter, str) or len(delimiter) != 1:
        raise DataError(f"csv:{location}: delimiter is {delimiter!r}; give one character")
    return source_from_tables(*_tables(location, "csv", "CSV", ("csv",), opened, dtype), input_columns, target_column)


def open_arrow(
    location: str,
    input_columns: Sequence[str] | None = None,
    target_column: str | None = None,
    dtype: str | None = None,
) -> Source:
    """Open Arrow files, also called Feather, and Arrow streams, as `open_parquet` does.

    Args:
        location: path or paths.
        input_columns: see `source_from_tables`.
        target_column: see `source_from_tables`.
        dtype: the type to which inputs are converted, such as float32 for whole numbers that are no ids.

    Raises:
        DataError: a file is missing or unreadable, or a column cannot be used.
    """

    def opened(paths: list[Path]) -> pads.Dataset:
        return pads.dataset(pa.concat_tables([_read_arrow(path) for path in paths]))

    tables = _tables(location, "arrow", "Arrow", ("arrow", "feather"), opened, dtype)
    return source_from_tables(*tables, input_columns, target_column)


def _read_arrow(path: Path) -> pa.Table:
    """A file, or else a stream, mapped into memory; a compressed one is decompressed there."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _tables(
    location: str,
    family: str,
    format_name: str,
    suffixes: tuple[str, ...],
    opened: Callable[[list[Path]], pads.Dataset],
    dtype: str | None,
) -> tuple[Table, Table | None]:
    """The training table and, if there is one, the test table."""
    what = f"{family}:{location}"
    if dtype is not None:
        check_choice("data.args.dtype", dtype, _CASTS)

    def table(paths: list[Path]) -> Table:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        name = f"'{paths[0]}'{more}"
        return Table(name, lambda: opened(paths), f"is no readable {format_name} file", dtype)

    train, *test = _files(location, what, suffixes)
    return table(train), table(test[0]) if test else None


def _files(location: str, what: str, suffixes: tuple[str, ...]) -> list[list[Path]]:
    parts = location.split(",")
    if len(parts) == 2 and not Path(location).exists():
        return [[existing_path(part.strip(), what=what)] for part in parts]
    path = existing_path(location, what=what)
    if path.is_file():
        return [[path]]
    sets = [
        sorted(file for suffix in suffixes for file in path.glob(f"{name}*.{suffix}")) for name in ("train", "test")
    ]
    if not all(sets):
        absent = "test" if sets[0] else "train"
        suffix = suffixes[0]
        raise DataError(f"{what} has no {absent}*.{suffix}; a folder needs train*.{suffix} and test*.{suffix}")
    return sets
