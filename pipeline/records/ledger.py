"""The ledger: one row for each finished task, in Parquet files that survive a killed driver.

It knows which tiles are done, and what each cost and summed up to, after any interruption. Only the driver writes it
(see `pipeline.records.lock`). It knows neither what a stage or a tile means nor what the numbers mean that it keeps,
and holds no rows in memory.

`pipeline.records.ledger_files` knows which files count and replaces some in one atomic write: forgetting a stage and
merging files are the same step, and a crash before, in or after it loses and doubles nothing. If a (stage, tile) occurs
twice, the last row counts.

Axes: none.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nntk_dist.errors import StoreError
from pipeline.job.task import Outcome
from pipeline.records.ledger_files import FOLDER, FULL_ROWS, SCHEMA, LedgerFiles, Part, VanishedError, count_stages
from pipeline.records.tile_names import TileSet
from pipeline.storage.run_storage import RunStorage

__all__ = ["FOLDER", "Ledger", "Outcome", "StageTotals"]

PARTS_BEFORE_MERGING = 64  # small files that are quickly read back, also from an object store
MOST_WAITING = FULL_ROWS  # rows that cause a flush at any time: about 5 MB as Python objects
READ_ATTEMPTS = 5


_COLUMNS = tuple(column.name for column in fields(Outcome))


@dataclass(frozen=True, slots=True)
class StageTotals:
    """Sums over the rows of a stage that count.

    Attributes:
        tasks: how many.
        seconds: of all tasks.
        bytes: of all tasks.
        peak_bytes: the largest of a task.
    """

    tasks: int = 0
    seconds: float = 0.0
    bytes: int = 0
    peak_bytes: int = 0


class Ledger:
    """All rows of a run, on storage as Parquet files; in memory only the names of the finished tiles, as bits.

    Constructing it reads every row once, in portions, and never writes, so that `status` may read while a driver works.
    It takes half a byte for a Gram tile (see `pipeline.records.tile_names`), about 150 for a tile that occurs twice.

    Args:
        storage: the run directory.
        flush_seconds: rows reach storage at most this long after `append`, provided that `tick` is called often.
        clock: a monotonic clock in seconds.

    Raises:
        StoreError: a file of the ledger cannot be read; the message names it.
    """

    def __init__(
        self, storage: RunStorage, flush_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._storage = storage
        self._files = LedgerFiles(storage)
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._pending: list[Outcome] = []
        self._flushed_at = clock()
        self._parts: list[Part] = []
        self._done: defaultdict[str, TileSet] = defaultdict(TileSet)
        self._earlier: Counter[tuple[str, str]] = Counter()  # rows of a tile before the one that counts
        self._read_again()

    def append(self, row: Outcome) -> None:
        """Add a finished task, and flush if a flush is due."""
        self._pending.append(row)
        self._note(row.stage, row.tile)
        if len(self._pending) >= MOST_WAITING:
            self.flush()
        self.tick()

    def tick(self) -> None:
        """Flush if rows wait and the last flush is `flush_seconds` ago; so the row of a long task is not delayed.

        The driver calls this at least once a second, except while a serial task runs.
        """
        if self._pending and self._clock() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write all waiting rows to storage, in one new file. They keep waiting if that fails.

        After 64 flushes of less than 4,096 rows the files since the last rewrite are merged, together with earlier ones
        as long as that at least doubles their file, up to 4,096 rows. So a row is rewritten a few times at most.
        """
        if not self._pending:
            return
        self._flushed_at = self._clock()
        self._parts.append(self._files.write_flush(_table_of(self._pending)))
        self._pending = []
        small = [index for index, part in enumerate(self._parts) if part.flushed and part.rows < FULL_ROWS]
        if len(small) > PARTS_BEFORE_MERGING:
            self._merge(_start_of_merging(self._parts, small[0]))

    def done(self, stage: str) -> Set[str]:
        """Return the tiles of this stage that have a row, waiting ones included; a view that later rows change."""
        return self._done[stage]

    def rows(self, stage: str | None = None) -> Iterator[Outcome]:
        """Yield the rows that count, in the order in which they were appended, read in portions.

        Args:
            stage: only its rows; None for all.

        Raises:
            StoreError: another process rewrites the ledger meanwhile.
        """
        try:
            for portion in self._counting(stage):
                columns = {name: portion.column(name).to_pylist() for name in _COLUMNS}
                columns["numbers"] = map(dict, columns["numbers"])
                for values in zip(*columns.values(), strict=True):
                    yield Outcome(*values)
        except VanishedError as error:
            raise self._vanishing() from error

    def sums(self, stage: str, prefix: str) -> dict[str, float]:
        """Return the sums over a stage of all numbers whose names begin with `prefix`, by name.

        Each sum is taken in the order of the rows.

        Raises:
            StoreError: another process rewrites the ledger meanwhile.
        """
        sums: dict[str, float] = {}
        try:
            for portion in self._counting(stage):
                numbers = portion["numbers"]
                first, last = numbers.offsets[0].as_py(), numbers.offsets[-1].as_py()  # a portion may be a slice
                keys, items = numbers.keys[first:last], numbers.items[first:last]
                wanted = pc.starts_with(keys, pattern=prefix)
                names = keys.filter(wanted).dictionary_encode()
                values, codes = items.filter(wanted).to_numpy(), names.indices.to_numpy()
                for code, name in enumerate(names.dictionary.to_pylist()):
                    # one after the other, so that a sum does not depend on the portions
                    mine = np.concatenate([[sums.get(name, 0.0)], values[codes == code]])
                    sums[name] = float(np.add.accumulate(mine)[-1])
        except VanishedError as error:
            raise self._vanishing() from error
        return sums

    def totals(self) -> dict[str, StageTotals]:
        """Return the totals of every stage that has rows; also while another process rewrites the ledger.

        Raises:
            StoreError: files vanished five times while they were read.
        """
        for _ in range(READ_ATTEMPTS):
            try:
                return self._totals()
            except VanishedError:
                self._read_again()
        raise self._vanishing()

    def forget(self, stage: str, tiles: Collection[str] | None = None) -> None:
        """Drop the rows of a stage, or of some of its tiles, so that it runs again; on storage when this returns.

        Costs a rewrite of the files that hold rows of this stage.

        Args:
            stage: the stage's name.
            tiles: None for all.
        """
        gone = None if tiles is None else [tile for tile in tiles if tile in self._done[stage]]
        if not (self._done[stage] if gone is None else gone):
            return
        self.flush()
        kept: list[Part] = []
        for part in self._parts:
            if part.counts.get(stage):
                kept += self._files.write_merged(
                    _without(portion, stage, gone) for portion in self._files.portions(part.path)
                )
            else:
                kept.append(part)
        self._replace(kept)
        for key in [key for key in self._earlier if key[0] == stage and (gone is None or key[1] in gone)]:
            del self._earlier[key]
        if gone is None:
            self._done[stage].clear()
        else:
            self._done[stage] -= set(gone)

    def compact(self) -> None:
        """Merge the files into as few as possible; rewrites all rows after the first file that is not full."""
        self.flush()
        start = 0
        while start < len(self._parts) and self._parts[start].rows >= FULL_ROWS:
            start += 1
        if len(self._parts) - start > 1:
            self._merge(start)

    def _note(self, stage: str, tile: str) -> None:
        """Remember that a tile has a row, or one more."""
        tiles = self._done[stage]
        if tile in tiles:
            self._earlier[stage, tile] += 1
        else:
            tiles.add(tile)

    def _read_again(self) -> None:
        # A driver may merge between the listing and the reading; a newer listing then shows what took the files' place.
        for _ in range(READ_ATTEMPTS):
            self._parts, self._earlier = [], Counter()
            self._done.clear()
            try:
                for path in self._files.counting():
                    counts: Counter[str] = Counter()
                    for portion in self._files.portions(path):
                        counts += count_stages(portion["stage"])
                        for stage, tile in zip(portion["stage"].to_pylist(), portion["tile"].to_pylist(), strict=True):
                            self._note(stage, tile)
                    self._parts.append(Part(path, counts))
            except VanishedError:
                continue
            for row in self._pending:
                self._note(row.stage, row.tile)
            return
        raise self._vanishing()

    def _vanishing(self) -> StoreError:
        return StoreError(
            f"ledger files of run_dir '{self._storage.url}' vanish while they are read; try again in a moment"
        )

    def _counting(self, stage: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows that count (of one stage, or all), oldest first, in portions."""
        earlier = self._earlier.copy()
        for part in list(self._parts):
            if stage is None or part.counts.get(stage):
                for portion in self._files.portions(part.path):
                    yield _counting_rows(_of_stage(portion, stage), earlier)
        for portion in _table_of(list(self._pending)).to_batches():
            yield _counting_rows(_of_stage(portion, stage), earlier)

    def _totals(self) -> dict[str, StageTotals]:
        totals: defaultdict[str, StageTotals] = defaultdict(StageTotals)
        wanted = [("tile", "count"), ("seconds", "sum"), ("bytes", "sum"), ("peak_bytes", "max")]
        for portion in self._counting():
            names = ["stage", *(name for name, _ in wanted)]
            table = pa.Table.from_batches([portion]).select(names).group_by("stage").aggregate(wanted)
            for found in table.to_pylist():
                known = totals[found["stage"]]
                totals[found["stage"]] = StageTotals(
                    known.tasks + found["tile_count"],
                    known.seconds + found["seconds_sum"],
                    known.bytes + found["bytes_sum"],
                    max(known.peak_bytes, found["peak_bytes_max"]),
                )
        return dict(totals)

    def _merge(self, start: int) -> None:
        """Replace the files from `start` on by as few as possible; if these are all, only by rows that count."""
        stored = (portion for part in self._parts[start:] for portion in self._files.portions(part.path))
        merged = self._files.write_merged(stored if start else self._counting())
        self._replace([*self._parts[:start], *merged])
        if start == 0:
            self._earlier.clear()

    def _replace(self, parts: list[Part]) -> None:
        self._files.write_index(parts)
        self._parts = parts
        self._files.clean_up(parts)


def _start_of_merging(parts: list[Part], start: int) -> int:
    """Return the first file of a merge of those from `start` on: it includes earlier ones that are not full, and no
    larger than the merge so far.
    """
    rows = sum(part.rows for part in parts[start:])
    while start and parts[start - 1].rows <= min(rows, FULL_ROWS - 1):
        start -= 1
        rows += parts[start].rows
    return start


def _table_of(rows: list[Outcome]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in _COLUMNS}
    columns["numbers"] = [list(numbers.items()) for numbers in columns["numbers"]]
    return pa.table(columns, schema=SCHEMA)


def _of_stage(portion: pa.RecordBatch, stage: str | None) -> pa.RecordBatch:
    return portion if stage is None else portion.filter(pc.equal(portion["stage"], stage))


def _without(portion: pa.RecordBatch, stage: str, tiles: list[str] | None) -> pa.RecordBatch:
    """Return the rows of other stages, and of other tiles if only some are to go."""
    lost = pc.equal(portion["stage"], stage)
    if tiles is not None:
        lost = pc.and_(lost, pc.is_in(portion["tile"], pa.array(tiles, pa.string())))
    return portion.filter(pc.invert(lost))


def _counting_rows(portion: pa.RecordBatch, earlier: Counter[tuple[str, str]]) -> pa.RecordBatch:
    """Drop rows that later ones replace; `earlier` counts how many of each are still to come."""
    if not earlier:
        return portion
    counts = np.ones(portion.num_rows, bool)
    twice = pa.array(sorted({tile for _, tile in earlier}), pa.string())
    for index in np.flatnonzero(pc.is_in(portion["tile"], twice).to_numpy(zero_copy_only=False)).tolist():
        key = portion["stage"][index].as_py(), portion["tile"][index].as_py()
        if earlier[key] > 0:
            earlier[key] -= 1
            counts[index] = False
    return portion.filter(pa.array(counts))
