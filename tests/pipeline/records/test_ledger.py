"""The ledger: after any interruption, `done` agrees with what is stored."""

import tracemalloc
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nntk_dist.errors import StoreError
from pipeline.job.task import Outcome
from pipeline.records import ledger as ledger_module
from pipeline.records import ledger_files
from pipeline.records.ledger import PARTS_BEFORE_MERGING, Ledger, StageTotals
from pipeline.storage.run_storage import RunStorage

ROW = Outcome(
    stage="gram",
    tile="train/0/0",
    worker="host/1",
    started=1.7e9 + 0.1,
    seconds=1.25,
    bytes=4_194_304,
    checksum=2**32 - 1,
    error=0.1,
    peak_bytes=2**40,
    numbers={"plugin²": 0.1 + 0.2, "cross": float("inf")},
)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class KilledError(Exception):
    pass


class FailingStorage(RunStorage):
    """Dies at the n-th write or delete from now."""

    operations_left = 10**9

    def _count(self):
        self.operations_left -= 1
        if self.operations_left < 0:
            raise KilledError

    def write_bytes(self, path, data):
        self._count()
        super().write_bytes(path, data)

    def delete(self, path):
        self._count()
        super().delete(path)


def rows(count, stage="gram"):
    return [replace(ROW, stage=stage, tile=f"train/{index}", seconds=float(index)) for index in range(count)]


def write_parts(storage, *parts):
    ledger = Ledger(storage)
    for part in parts:
        for row in part:
            ledger.append(row)
        ledger.flush()
    return ledger


def test_rows_come_back_as_they_went_in(tmp_path):
    plain = replace(ROW, tile="train/0/1", error=None, numbers={})
    write_parts(RunStorage(tmp_path), [ROW, plain])
    again = Ledger(RunStorage(tmp_path))
    assert list(again.rows()) == [ROW, plain]
    assert again.done("gram") == {"train/0/0", "train/0/1"}
    assert again.done("spectrum") == frozenset()


def test_waiting_rows_count_at_once_and_an_empty_ledger_writes_nothing(tmp_path):
    ledger = Ledger(RunStorage(tmp_path / "run"))
    ledger.flush()
    ledger.compact()
    ledger.forget("gram")
    assert list(ledger.rows()) == []
    assert not (tmp_path / "run").exists()
    ledger.append(ROW)
    assert ledger.done("gram") == {"train/0/0"}
    assert list(ledger.rows("gram")) == [ROW]
    assert list(ledger.rows("features")) == []
    assert ledger_files.SCHEMA.names == list(Outcome.__dataclass_fields__)


def test_a_row_behind_a_long_task_reaches_storage_at_once_others_within_five_seconds(tmp_path):
    storage, clock = RunStorage(tmp_path), Clock()
    ledger = Ledger(storage, flush_seconds=5.0, clock=clock)
    first, second, third = rows(3)
    ledger.append(first)
    clock.now += 4.9
    ledger.append(second)
    ledger.tick()
    assert storage.list("ledger") == []
    clock.now += 0.1
    ledger.tick()
    assert list(Ledger(storage).rows()) == [first, second]
    clock.now += 1000
    ledger.append(third)
    assert len(Ledger(storage).done("gram")) == 3
    assert len(storage.list("ledger")) == 2


def test_the_last_row_of_a_tile_counts(tmp_path):
    storage = RunStorage(tmp_path)
    again = replace(ROW, seconds=9.0)
    ledger = write_parts(storage, [ROW, replace(ROW, stage="other")], [again])
    ledger.append(replace(ROW, seconds=10.0))
    assert [row.seconds for row in ledger.rows("gram")] == [10.0]
    assert [(row.stage, row.seconds) for row in Ledger(storage).rows()] == [("other", 1.25), ("gram", 9.0)]


def test_a_resumed_ledger_adds_files_and_overwrites_none(tmp_path):
    storage = RunStorage(tmp_path)
    first, second, third = rows(3)
    write_parts(storage, [first])
    write_parts(storage, [second])
    Ledger(storage).compact()
    write_parts(storage, [third])
    assert list(Ledger(storage).rows()) == [first, second, third]


def test_forgetting_is_durable_and_spares_the_other_stages(tmp_path):
    storage = RunStorage(tmp_path)
    ledger = write_parts(storage, rows(3), rows(2, "features"))
    ledger.append(replace(ROW, tile="waiting"))
    ledger.forget("gram")
    for seen in (ledger, Ledger(storage)):
        assert seen.done("gram") == frozenset()
        assert list(seen.rows()) == rows(2, "features")
    ledger.append(ROW)
    ledger.flush()
    assert Ledger(storage).done("gram") == {ROW.tile}


def test_many_flushes_leave_few_files(tmp_path):
    storage = RunStorage(tmp_path)
    every = rows(PARTS_BEFORE_MERGING + 1)
    ledger = write_parts(storage, *([row] for row in every))
    assert storage.list("ledger") == ["ledger/00000065-merged.parquet", "ledger/_00000066.json"]
    assert list(Ledger(storage).rows()) == list(ledger.rows()) == every


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("operations", range(7))
def test_a_kill_at_any_moment_of_a_rewrite_loses_and_doubles_nothing(tmp_path, operations, forget):
    storage = FailingStorage(tmp_path)
    newest = replace(rows(1)[0], seconds=99.0)
    ledger = write_parts(storage, rows(2), rows(1, "features"), [newest, *rows(1, "metric")])
    storage.operations_left = operations
    # the forgotten rows are a whole file, or one row among others
    stage, steps = (
        ("features", 2) if operations % 2 else ("metric", 3)
    )  # a file with what is left, an index, a deletion
    rewrite, steps = (lambda: ledger.forget(stage), steps) if forget else (ledger.compact, 5)
    if operations < steps:
        with pytest.raises(KilledError):
            rewrite()
    else:
        rewrite()
    indexed = operations >= (steps - 1 if forget else 2)
    gone = {stage} if forget and indexed else set()
    kept = [row for row in [rows(2)[1], *rows(1, "features"), newest, *rows(1, "metric")] if row.stage not in gone]
    after = Ledger(RunStorage(tmp_path))
    assert list(after.rows()) == kept
    assert {name: set(after.done(name)) for name in ("gram", stage)} == {
        "gram": {"train/0", "train/1"},
        stage: set() if gone else {"train/0"},
    }
    # The next rewrite removes what the interrupted clean-up left.
    after.append(ROW)
    after.compact()
    assert len(storage.list("ledger")) == 2
    assert list(Ledger(RunStorage(tmp_path)).rows()) == [*kept, ROW]


def test_a_file_that_no_index_lists_does_not_count(tmp_path):
    """A file left by a rewrite that was killed, beside later flushes."""
    storage = RunStorage(tmp_path)
    write_parts(storage, rows(2))
    storage.write_bytes("ledger/00000001-merged.parquet", storage.read_bytes("ledger/00000000.parquet"))
    storage.delete("ledger/00000000.parquet")
    ledger = Ledger(storage)
    assert list(ledger.rows()) == []
    ledger.append(ROW)
    ledger.flush()
    assert "ledger/00000002.parquet" in storage.list("ledger")
    assert list(Ledger(storage).rows()) == [ROW]


@pytest.mark.parametrize("flushes", [1, 7, 40])
def test_merging_rewrites_each_row_a_few_times_and_keeps_their_order(tmp_path, monkeypatch, flushes):
    """Small limits, so that many merges and full files come about; against a plain list."""
    monkeypatch.setattr(ledger_module, "PARTS_BEFORE_MERGING", 4)
    monkeypatch.setattr(ledger_module, "FULL_ROWS", 50)
    monkeypatch.setattr(ledger_files, "FULL_ROWS", 50)
    monkeypatch.setattr(ledger_files, "PORTION_ROWS", 7)
    written = []

    class Counting(RunStorage):
        def write_bytes(self, path, data):
            if "merged" in path:
                written.append(path)
            super().write_bytes(path, data)

    storage = Counting(tmp_path)
    every, ledger = [], Ledger(storage)
    for flush in range(flushes):
        for number in range(1 + flush % 5):
            # sometimes a tile is repeated, in this flush or much later
            tile = f"train/{flush}/{number}" if number != 3 else f"train/{flush // 2}/0"
            row = replace(ROW, tile=tile, stage="gram" if flush % 3 else "test", seconds=float(len(every)))
            ledger.append(row)
            every.append(row)
        ledger.flush()
    last = {(row.stage, row.tile): row for row in every}
    expected = [row for row in every if last[row.stage, row.tile] is row]
    for seen in (ledger, Ledger(storage)):
        assert list(seen.rows()) == expected
        assert list(seen.rows("test")) == [row for row in expected if row.stage == "test"]
        assert seen.done("gram") == {tile for stage, tile in last if stage == "gram"}
        for stage, totals in seen.totals().items():
            mine = [row for row in expected if row.stage == stage]
            assert totals == StageTotals(
                len(mine), sum(row.seconds for row in mine), len(mine) * ROW.bytes, ROW.peak_bytes
            )
    assert len(written) <= flushes / 2
    ledger.forget("test", {"train/0/0", "train/3/0", "none/such"})
    expected = [row for row in expected if (row.stage, row.tile) not in {("test", "train/0/0"), ("test", "train/3/0")}]
    ledger.compact()
    assert list(ledger.rows()) == list(Ledger(storage).rows()) == expected
    assert len(storage.list("ledger")) <= 2 + len(every) / 50


def test_sums_are_those_of_the_rows_that_count(tmp_path):
    storage = RunStorage(tmp_path)
    named = [{"train/gram:a": 0.1 * k, "train/gram:b": -1.0, "train/gram_stderr:a": 7.0} for k in range(9)]
    numbered = [replace(row, numbers=numbers) for row, numbers in zip(rows(9), named, strict=True)]
    ledger = write_parts(storage, [replace(numbered[2], numbers={"train/gram:a": 1e9})], numbered[:5])
    for row in numbered[5:]:
        ledger.append(row)
    ledger.append(replace(ROW, stage="test", numbers={"train/gram:a": 1e9}))
    in_order = 0.0
    for numbers in named:
        in_order += numbers["train/gram:a"]
    assert ledger.sums("gram", "train/gram:") == {"train/gram:a": in_order, "train/gram:b": -9.0}
    assert ledger.sums("features", "train/gram:") == {}


@pytest.mark.process
def test_memory_stays_flat_however_many_rows_there_are(tmp_path):
    """A hundred thousand rows with the numbers of a real tile; only names, as bits, and a list of files are kept.

    As Arrow columns these rows would take 30 MB, and their names as Python strings 7.
    """
    storage = RunStorage(tmp_path)
    arrays = ("gram", "gram_unbiased", "gram_stderr")
    ledger = Ledger(storage, clock=Clock())
    tracemalloc.start()
    try:
        begin, arrow = tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()
        kept = []
        for i in range(400):
            numbers = {f"crc32c:train/{name}@{i},0": float(i) for name in arrays} | {"train/gram:unresolved": 1.0}
            for j in range(250):
                ledger.append(replace(ROW, tile=f"train/{i}/{j}", numbers=numbers))
            if i in (199, 399):
                ledger.flush()
                kept.append(tracemalloc.get_traced_memory()[0] - begin + pa.total_allocated_bytes() - arrow)
        assert ledger.totals()["gram"].tasks == len(ledger.done("gram")) == 100_000
        assert ledger.sums("gram", "train/gram:") == {"train/gram:unresolved": 100_000.0}
        reading = tracemalloc.get_traced_memory()[1] - begin
    finally:
        tracemalloc.stop()
    assert max(kept) < 2e6  # a fifteenth of what the columns would take
    assert kept[1] < kept[0] + 2e5
    assert reading < 6e7  # the peak: rows that wait for a flush, and one portion that is read
    assert "train/399/249" in Ledger(storage).done("gram")


def test_rows_wait_on_where_a_flush_fails(tmp_path):
    storage = FailingStorage(tmp_path)
    ledger = Ledger(storage)
    ledger.append(ROW)
    storage.operations_left = 0
    with pytest.raises(KilledError):
        ledger.flush()
    storage.operations_left = 1
    ledger.flush()
    assert list(Ledger(storage).rows()) == [ROW]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_file_is_named(tmp_path, damage):
    storage = RunStorage(tmp_path)
    write_parts(storage, rows(1), rows(100, "features"))
    path = tmp_path / "ledger/00000001.parquet"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 4] ^= 1
        path.write_bytes(content)
    else:
        pq.write_table(pq.read_table(path).drop_columns(["tile"]), path)
    with pytest.raises(StoreError, match=r"ledger file 'ledger/00000001.parquet' in run_dir .* is damaged .*delete it"):
        Ledger(storage)


def test_a_reader_follows_a_driver_that_merges_meanwhile(tmp_path):
    writer = write_parts(RunStorage(tmp_path), rows(1), rows(2))

    class Watched(RunStorage):
        def read_bytes(self, path):
            writer.compact()
            return super().read_bytes(path)

    reader = Ledger(Watched(tmp_path))
    assert list(reader.rows()) == rows(2)
    writer.append(ROW)
    writer.compact()
    assert reader.totals()["gram"].tasks == 3
    writer.append(replace(ROW, tile="train/0/1"))
    writer.compact()
    with pytest.raises(StoreError, match="vanish while they are read; try again"):
        list(reader.rows())
    with pytest.raises(StoreError, match="vanish while they are read; try again"):
        reader.sums("gram", "plugin")


def test_a_damaged_index_is_named_and_a_deleted_file_forgotten(tmp_path):
    storage = RunStorage(tmp_path)
    write_parts(storage, rows(1), rows(2)).compact()
    storage.write_bytes("ledger/_00000003.json", b"{")
    with pytest.raises(StoreError, match=r"ledger file 'ledger/_00000003.json' in run_dir .* is damaged .*delete it"):
        Ledger(storage)
    storage.write_bytes("ledger/_00000003.json", b'{"files": ["ledger/00000002-merged.parquet"]}')
    assert list(Ledger(storage).rows()) == rows(2)
    storage.delete("ledger/00000002-merged.parquet")
    assert list(Ledger(storage).rows()) == []


def test_a_ledger_that_vanishes_while_it_is_read(tmp_path):
    class Vanishing(RunStorage):
        def read_bytes(self, path):
            return None

    write_parts(RunStorage(tmp_path), rows(1))
    with pytest.raises(StoreError, match="vanish while they are read; try again"):
        Ledger(Vanishing(tmp_path))
