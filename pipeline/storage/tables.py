"""The tables of a run directory: small Parquet files under `tables/`, whole or absent.

No task adds to a table; a table is written once by the stage that makes it, and replaced as a whole when that stage
reruns.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.run_storage import RunStorage


def table_path(name: str) -> str:
    """Where a table lies in the run directory."""
    return f"tables/{name}.parquet"


def write_table(storage: RunStorage, name: str, columns: Mapping[str, Sequence[Any] | Any]) -> int:
    """Write the columns as one Parquet file and return its bytes."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), buffer, compression="zstd")
    content = buffer.getvalue()
    storage.write_bytes(table_path(name), content)
    return len(content)


def read_table(storage: RunStorage, name: str) -> dict[str, list[Any]] | None:
    """The columns of a table as lists, None where it does not exist."""
    content = storage.read_bytes(table_path(name))
    return None if content is None else pq.read_table(io.BytesIO(content)).to_pydict()
