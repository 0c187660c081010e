"""The tables of a run directory: small Parquet files under `tables/`, whole or absent.

The stage that makes a table writes it once, and replaces it as a whole when it runs again; no task adds to it.

Axes: none.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.run_storage import RunStorage


def table_path(name: str) -> str:
    """Return the path of a table in the run directory."""
    return f"tables/{name}.parquet"


def write_table(storage: RunStorage, name: str, columns: Mapping[str, Sequence[Any] | Any]) -> int:
    """Write a table as one Parquet file.

    Args:
        storage: the run directory.
        name: of the table.
        columns: values by column name, all of one length.

    Returns:
        The size of the file in bytes.

    Raises:
        StoreError: the storage cannot be written.
    """
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), buffer, compression="zstd")
    content = buffer.getvalue()
    storage.write_bytes(table_path(name), content)
    return len(content)


def read_table(storage: RunStorage, name: str) -> dict[str, list[Any]] | None:
    """Return the columns of a table as lists, or None if it does not exist.

    Raises:
        StoreError: the storage does not answer or denies access.
    """
    content = storage.read_bytes(table_path(name))
    return None if content is None else pq.read_table(io.BytesIO(content)).to_pydict()
