"""The ledger: one row per finished task, in Parquet files that survive a killed driver.

What this room is for: to know which tiles are done, and what each cost and summed up to, after any interruption.
What it refuses to do: to be written by two processes (the driver alone writes; see `pipeline.lock`), to know what a
stage or a tile means, to interpret the numbers that it keeps.

Files: `ledger/00000007.parquet` holds the rows of one flush; `ledger/00000008-all.parquet` holds every row that counted
when it was written and makes all files with smaller numbers void, whether or not they are deleted yet. So forgetting
a stage and compacting are the same single atomic write, and a crash before or during the clean-up loses and doubles
nothing. Where a (stage, tile) occurs twice, the last one counts.

Axis legend: none.
"""

import io
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nntk_dist.errors import NNTKError
from pipeline.storage import RunStorage

FOLDER = "ledger"

# Reading 64 small files back is quick, also from an object store; rewriting a million rows takes about a second.
PARTS_BEFORE_COMPACTION = 64
READ_ATTEMPTS = 5

_PART_NAME = re.compile(r"(\d{8})(-all)?\.parquet$")

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


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """What is known of one finished task.

    Attributes:
        stage: the stage's name.
        tile: the task within its stage, such as "train/3/5".
        worker: who did it.
        started: Unix time in seconds.
        seconds: how long it took.
        bytes: uncompressed bytes written to the kernel store.
        checksum: crc32 of these bytes.
        error: the task's estimated error, or None where it has none.
        peak_bytes: largest resident memory of the worker, measured.
        numbers: named sums over the task, for later stages to add up.
    """

    stage: str
    tile: str
    worker: str
    started: float
    seconds: float
    bytes: int
    checksum: int
    error: float | None
    peak_bytes: int
    numbers: Mapping[str, float] = field(default_factory=dict)


_COLUMNS = tuple(column.name for column in fields(LedgerRow))


class Ledger:
    """All rows of a run, in memory as Arrow columns and on storage as Parquet files.

    Constructing it reads and never writes, so that `status` may look while a driver works. About 200 bytes a row.

    Args:
        storage: the run directory.
        flush_seconds: rows reach storage at most this long after `append`, provided that `tick` is called often.
        clock: a monotonic clock in seconds.

    Raises:
        NNTKError: a file of the ledger cannot be read; the message names it.
    """

    def __init__(
        self, storage: RunStorage, flush_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._storage = storage
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._pending: list[LedgerRow] = []
        self._flushed_at = clock()
        self._parts, self._table = _read_parts(storage)
        self._next_number = 1 + max(map(_number, self._parts), default=-1)
        self._done: defaultdict[str, set[str]] = defaultdict(set)
        for stage in pc.unique(self._table["stage"]).to_pylist():
            mine = pc.equal(self._table["stage"], stage)
            self._done[stage] = set(self._table["tile"].filter(mine).to_pylist())

    def append(self, row: LedgerRow) -> None:
        """Add a finished task, and flush if a flush is due."""
        self._pending.append(row)
        self._done[row.stage].add(row.tile)
        self.tick()

    def tick(self) -> None:
        """Flush if rows wait and the last flush is `flush_seconds` ago, so that a row behind a long task goes at once.

        The driver calls this at least once a second, except while a serial task runs.
        """
        if self._pending and self._clock() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Put all waiting rows on storage now, in one new file. They keep waiting if that fails."""
        if not self._pending:
            return
        self._flushed_at = self._clock()
        recent = _table_of(self._pending)
        self._write_part(recent, replaces_all=False)
        self._table = pa.concat_tables([self._table, recent])
        self._pending = []
        if len(self._parts) > PARTS_BEFORE_COMPACTION:
            self.compact()

    def done(self, stage: str) -> frozenset[str]:
        """The tiles of this stage that have a row, waiting ones included."""
        return frozenset(self._done.get(stage, ()))

    def table(self, stage: str | None = None) -> pa.Table:
        """The rows that count (of one stage, or all) as an Arrow table with the columns of `LedgerRow`."""
        table = pa.concat_tables([self._table, _table_of(self._pending)])
        if stage is not None:
            table = table.filter(pc.equal(table["stage"], stage))
        return _last_of_each_tile(table)

    def rows(self, stage: str | None = None) -> Iterator[LedgerRow]:
        """The rows that count, in the order in which they were appended, one at a time."""
        for batch in self.table(stage).to_batches(max_chunksize=65536):
            columns = {name: batch.column(name).to_pylist() for name in _COLUMNS}
            columns["numbers"] = map(dict, columns["numbers"])
            for values in zip(*columns.values(), strict=True):
                yield LedgerRow(*values)

    def forget(self, stage: str, tiles: Collection[str] | None = None) -> None:
        """Drop the rows of a stage, or of some of its tiles, that has to run again; on storage when this returns."""
        gone = self._done[stage] & set(self._done[stage] if tiles is None else tiles)
        if gone:
            table = self.table()
            lost = pc.and_(pc.equal(table["stage"], stage), pc.is_in(table["tile"], pa.array(sorted(gone))))
            self._replace_all(table.filter(pc.invert(lost)))
            self._done[stage] -= gone

    def compact(self) -> None:
        """Bring all files into one. Costs a rewrite of every row."""
        if self._pending or len(self._parts) > 1:
            self._replace_all(self.table())

    def _replace_all(self, table: pa.Table) -> None:
        self._write_part(table, replaces_all=True)
        self._parts = self._parts[-1:]
        self._table = table.combine_chunks()
        self._pending = []
        # The listing also shows what an interrupted clean-up left behind.
        for path in self._storage.list(FOLDER):
            if _PART_NAME.search(path) and path not in self._parts:
                self._storage.delete(path)

    def _write_part(self, table: pa.Table, *, replaces_all: bool) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, write_page_checksum=True)
        path = f"{FOLDER}/{self._next_number:08d}{'-all' if replaces_all else ''}.parquet"
        self._storage.write_bytes(path, buffer.getvalue())
        self._next_number += 1
        self._parts = [*self._parts, path]


def _table_of(rows: list[LedgerRow]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in _COLUMNS}
    columns["numbers"] = [list(numbers.items()) for numbers in columns["numbers"]]
    return pa.table(columns, schema=SCHEMA)


def _last_of_each_tile(table: pa.Table) -> pa.Table:
    if table.num_rows == 0:
        return table
    numbered = table.select(["stage", "tile"]).append_column("position", pa.array(range(table.num_rows), pa.int64()))
    last = numbered.group_by(["stage", "tile"]).aggregate([("position", "max")])["position_max"]
    if len(last) == table.num_rows:
        return table
    return table.take(last.take(pc.sort_indices(last)))


def _number(path: str) -> int:
    match = _PART_NAME.search(path)
    return int(match[1]) if match else -1


def _current_parts(storage: RunStorage) -> list[str]:
    """Files that count, oldest first: the newest `-all` file and whatever came after it."""
    parts = sorted((path for path in storage.list(FOLDER) if _PART_NAME.search(path)), key=_number)
    starts = [index for index, path in enumerate(parts) if path.endswith("-all.parquet")]
    return parts[starts[-1] :] if starts else parts


def _read_parts(storage: RunStorage) -> tuple[list[str], pa.Table]:
    # A driver may compact between the listing and the reading; a newer listing then shows what took the files' place.
    for _ in range(READ_ATTEMPTS):
        parts = _current_parts(storage)
        contents = [storage.read_bytes(path) for path in parts]
        present = [content for content in contents if content is not None]
        if len(present) == len(parts):
            tables = [_parse(storage, path, content) for path, content in zip(parts, present, strict=True)]
            return parts, _last_of_each_tile(pa.concat_tables([SCHEMA.empty_table(), *tables])).combine_chunks()
    raise NNTKError(f"ledger files of run_dir '{storage.url}' vanish while they are read; try again in a moment")


def _parse(storage: RunStorage, path: str, content: bytes) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(content), page_checksum_verification=True).cast(SCHEMA)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise NNTKError(
            f"ledger file '{path}' in run_dir '{storage.url}' is damaged ({reason}); delete it and run again with"
            " --resume: the tasks that it listed are then computed again"
        ) from error
