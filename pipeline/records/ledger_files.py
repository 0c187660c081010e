"""The files of the ledger: which of them count, reading them in portions, replacing some by others in one atomic step.

A list of Parquet files that grows by appending and shrinks by rewriting, whole after a kill at any moment, in a few
megabytes of memory however long it is. Which rows count, and when to rewrite, is decided in `pipeline.records.ledger`.

Files in `ledger/`:
00000007.parquet         the rows of one flush; it counts as soon as it exists
00000009-merged.parquet  rows of several files, or the rest of one; it counts once an index lists it
_00000010.json           an index: which files with smaller numbers count, oldest first; only the newest index is read
So files that replace others are written first, and take effect with the index: a single atomic write. Files that no
longer count, and those that a kill before the index left, are deleted afterwards, now or at the next rewrite.

Axes: none.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nntk_dist.errors import StoreError, first_line
from pipeline.storage.run_storage import RunStorage

FOLDER = "ledger"
FULL_ROWS = 4_096  # a file with as many is not rewritten: about 200 KB, and 245 files for a million rows
PORTION_ROWS = 4_096  # read at a time

_FILE_NAME = re.compile(r"/_?(\d{8})(|-merged)\.(parquet|json)$")

SCHEMA = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("tile", pa.string(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
        pa.field("started", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("checksum", pa.uint32(), nullable=False),
        pa.field("error", pa.float64()),
        pa.field("peak_bytes", pa.int64(), nullable=False),
        pa.field("numbers", pa.map_(pa.string(), pa.float64()), nullable=False),
    ]
)


class VanishedError(Exception):
    """A file that counted is gone: a driver has replaced it meanwhile, and a new listing shows what took its place."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file that counts.

    Attributes:
        path: in the run directory.
        counts: how many rows of each stage it holds.
    """

    path: str
    counts: Mapping[str, int]

    @property
    def rows(self) -> int:
        """Number of all its rows."""
        return sum(self.counts.values())

    @property
    def flushed(self) -> bool:
        """Whether it holds one flush, never rewritten."""
        return _is_flush(self.path)


class LedgerFiles:
    """The folder `ledger` of a run. Constructing it reads and writes nothing.

    Args:
        storage: the run directory.
    """

    def __init__(self, storage: RunStorage) -> None:
        self._storage = storage
        self._next_number = 0

    def counting(self) -> list[str]:
        """List the files that count, oldest first; files written from now on are numbered after all that exist."""
        present = [path for path in self._storage.list(FOLDER) if _FILE_NAME.search(path)]
        self._next_number = 1 + max(map(_number, present), default=-1)
        index = max((path for path in present if _is_index(path)), key=_number, default=None)
        since = -1 if index is None else _number(index)
        # A file that an index lists and that is missing was damaged, and deleted as the message about it says.
        listed = [] if index is None else [path for path in self._listed(index) if path in present]
        flushes = [path for path in present if _is_flush(path) and _number(path) > since]
        return [*listed, *sorted(flushes, key=_number)]

    def portions(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a file, some thousand at a time, after verifying their page checksums.

        Raises:
            VanishedError: the file is missing.
            StoreError: it is damaged.
        """
        content = self._storage.read_bytes(path)
        if content is None:
            raise VanishedError(path)
        try:
            file = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
            for batch in file.iter_batches(PORTION_ROWS):
                yield from pa.Table.from_batches([batch]).cast(SCHEMA).to_batches()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(path, error) from error

    def write_flush(self, table: pa.Table) -> Part:
        """Write a new file, which counts as soon as it exists."""
        return self._write(table, "")

    def write_merged(self, portions: Iterable[pa.RecordBatch]) -> list[Part]:
        """Write new files with all these rows; they count once an index lists them."""
        parts: list[Part] = []
        waiting: list[pa.RecordBatch] = []
        for portion in portions:
            waiting.append(portion)
            if sum(batch.num_rows for batch in waiting) >= FULL_ROWS:
                parts.append(self._write(pa.Table.from_batches(waiting), "-merged"))
                waiting = []
        if any(batch.num_rows for batch in waiting):
            parts.append(self._write(pa.Table.from_batches(waiting), "-merged"))
        return parts

    def write_index(self, parts: Sequence[Part]) -> None:
        """Let exactly these files count from now on, in this order."""
        index = f"{FOLDER}/_{self._take_number():08d}.json"
        self._storage.write_bytes(index, json.dumps({"files": [part.path for part in parts]}).encode())

    def clean_up(self, parts: Sequence[Part]) -> None:
        """Delete all files but these and the newest index, also those that an interrupted clean-up left."""
        present = [path for path in self._storage.list(FOLDER) if _FILE_NAME.search(path)]
        kept = {part.path for part in parts} | {max(filter(_is_index, present), key=_number, default="")}
        for path in present:
            if path not in kept:
                self._storage.delete(path)

    def _write(self, table: pa.Table, suffix: str) -> Part:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, write_page_checksum=True, compression="zstd")
        path = f"{FOLDER}/{self._take_number():08d}{suffix}.parquet"
        self._storage.write_bytes(path, buffer.getvalue())
        return Part(path, count_stages(table["stage"]))

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def _listed(self, index: str) -> list[str]:
        content = self._storage.read_bytes(index)
        if content is None:
            raise VanishedError(index)
        try:
            return [str(path) for path in json.loads(content)["files"]]
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(index, error) from error

    def _damaged(self, path: str, error: Exception) -> StoreError:
        return StoreError(
            f"ledger file '{path}' in run_dir '{self._storage.url}' is damaged ({first_line(error)}); delete it and "
            "run again with --resume: the tasks that it listed are then computed again"
        )


def count_stages(stages: pa.Array | pa.ChunkedArray) -> Counter[str]:
    """Return how often each stage occurs in a column."""
    counted = pc.value_counts(stages).to_pylist()
    return Counter({entry["values"]: entry["counts"] for entry in counted})


def _number(path: str) -> int:
    match = _FILE_NAME.search(path)
    assert match is not None
    return int(match[1])


def _is_index(path: str) -> bool:
    return path.endswith(".json")


def _is_flush(path: str) -> bool:
    return not _is_index(path) and "-merged" not in path
