"""The ledger: what is on storage after any interruption is what `done` says."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from nntk_dist.errors import NNTKError
from pipeline.ledger import PARTS_BEFORE_COMPACTION, Ledger, LedgerRow
from pipeline.storage import RunStorage

ROW = LedgerRow(
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
    assert ledger.table().column_names == list(LedgerRow.__dataclass_fields__)


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
    every = rows(PARTS_BEFORE_COMPACTION + 1)
    ledger = write_parts(storage, *([row] for row in every))
    assert len(storage.list("ledger")) == 1
    assert list(Ledger(storage).rows()) == list(ledger.rows()) == every


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("operations", range(6))
def test_a_kill_at_any_moment_of_a_rewrite_loses_and_doubles_nothing(tmp_path, operations, forget):
    storage = FailingStorage(tmp_path)
    newest = replace(rows(1)[0], seconds=99.0)
    ledger = write_parts(storage, rows(2), rows(1, "features"), [newest])
    storage.operations_left = operations
    rewrite = (lambda: ledger.forget("features")) if forget else ledger.compact
    if operations < 4:  # one write, three deletions
        with pytest.raises(KilledError):
            rewrite()
    else:
        rewrite()
    after = Ledger(RunStorage(tmp_path))
    kept = [] if forget and operations else rows(1, "features")
    assert list(after.rows()) == [rows(2)[1], *kept, newest]
    # What the interrupted clean-up left is taken away by the next rewrite.
    after.append(ROW)
    after.compact()
    assert len(storage.list("ledger")) == 1
    assert list(Ledger(RunStorage(tmp_path)).rows()) == [rows(2)[1], *kept, newest, ROW]


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
    with pytest.raises(NNTKError, match=r"ledger file 'ledger/00000001.parquet' in run_dir .* is damaged .*delete it"):
        Ledger(storage)


def test_a_reader_follows_a_driver_that_compacts_meanwhile(tmp_path):
    writer = write_parts(RunStorage(tmp_path), rows(1), rows(2))

    class Watched(RunStorage):
        def read_bytes(self, path):
            writer.compact()
            return super().read_bytes(path)

    assert list(Ledger(Watched(tmp_path)).rows()) == rows(2)


def test_a_ledger_that_vanishes_while_it_is_read(tmp_path):
    class Vanishing(RunStorage):
        def read_bytes(self, path):
            return None

    write_parts(RunStorage(tmp_path), rows(1))
    with pytest.raises(NNTKError, match="vanish while they are read; try again"):
        Ledger(Vanishing(tmp_path))
