"""Tiles as tasks: their order, the precision of their products, and which of their parts are written in parallel.

Legend: i, j tile rows and columns.
"""

from itertools import groupby

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from nntk_dist.errors import NNTKError
from nntk_dist.products import metric as metric_module
from nntk_dist.products.block_sums import Meeting
from nntk_dist.products.wanted import Side
from pipeline.records.manifest import read_manifest
from pipeline.storage.array_table import StoredArray
from pipeline.storage.kernel_arrays import KernelArrays
from pipeline.storage.kernel_store import checksum
from pipeline.storage.run_storage import RunStorage
from pipeline.work.context import Context
from pipeline.work.gram_tiles import tile_order, tile_totals
from tests.pipeline.tools import arrays, config_file, finished, nntk


@pytest.mark.parametrize("group", [1, 2, 3, 7, 100])
def test_every_tile_comes_once_and_a_group_s_columns_together(group):
    upper = list(tile_order(7, 7, group, upper=True))
    assert sorted(upper) == [(i, j) for i in range(7) for j in range(i, 7)]
    whole = list(tile_order(3, 7, group))
    assert sorted(whole) == [(i, j) for i in range(3) for j in range(7)]
    for order in (upper, whole):
        groups = [j // group for _, j in order]
        assert groups == sorted(groups)


def test_groups_of_columns_spare_most_of_the_loads():
    """A cache of six row sets that evicts the oldest, for 20 × 20 tiles: row by row, and in groups of four columns,
    which leave space for a row and the one before it. With space for only one row, every new row would evict a column.
    """

    def loads(order: list[tuple[int, int]]) -> int:
        kept: list[tuple[str, int]] = []
        count = 0
        for i, j in order:
            for key in (("column", j), ("row", i)):
                count += key not in kept
                kept = [*[other for other in kept if other != key], key][-6:]
        return count

    assert loads(list(tile_order(20, 20, 20))) == 20 + 400
    assert loads(list(tile_order(20, 20, 4))) == 5 * 20 + 20
    assert loads(list(tile_order(20, 20, 5))) > 400


@pytest.mark.parametrize(("stderr", "each_row"), [("sample", 0), ("entry", 1)])
def test_a_metric_meets_a_row_set_once_as_columns_however_small_the_cache(stderr, each_row, tmp_path, monkeypatch):
    """Two products with M for a tile's columns; its rows, which change with every tile, need one for sums by block."""
    made, columns, rows = [], [], []
    times, rows_of = metric_module._times, Context.rows

    def noted_times(*arguments):
        made.append(None)
        return times(*arguments)

    def noted_rows(self, interval, part, side=Side.BOTH):
        before = len(made)
        result = rows_of(self, interval, part, side)
        (rows if side == Side.ROWS else columns).append((interval, len(made) - before))
        return result

    monkeypatch.setattr("pipeline.decisions.layout.FEATURE_CACHE_BYTES", 0)
    monkeypatch.setattr("pipeline.work.context.FEATURE_CACHE_BYTES", 0)
    monkeypatch.setattr(metric_module, "_times", noted_times)
    monkeypatch.setattr(Context, "rows", noted_rows)
    finished(tmp_path / "run", "kernel.estimator=weight", "kernel.draws=16", f"compute.stderr={stderr}")
    of_train = [each for each in columns if each[0][0] == "train"]
    turns = [[count for _, count in turn] for _, turn in groupby(of_train, key=lambda each: each[0])]
    assert turns == [[2], [2, 0], [2, 0, 0], [2], [2], [2]]  # the kernel's upper triangle, then the test rows
    assert {count for _, count in rows} == {0, each_row}


def test_features_that_a_tile_recomputes_are_made_at_full_precision(tmp_path, monkeypatch):
    """Records the precision of passes over the model, also in the stage of tiles, and of the products there."""
    passes, products = [], []
    forward, matrix = nn.Linear.forward, Meeting.matrix

    def noted_forward(*arguments):
        passes.append(torch.get_float32_matmul_precision())
        return forward(*arguments)

    def noted_matrix(*arguments):
        products.append(torch.get_float32_matmul_precision())
        return matrix(*arguments)

    monkeypatch.setattr("pipeline.decisions.layout._STORED_FEATURE_BYTES", 0)
    monkeypatch.setattr(nn.Linear, "forward", noted_forward)
    monkeypatch.setattr(Meeting, "matrix", noted_matrix)
    sets = ("data.train=23", "data.test=7", "compute.tile=16", "kernel.contraction=means")
    place = finished(tmp_path / "run", *sets, "compute.matmul_precision=medium")
    manifest = read_manifest(RunStorage(str(place)))
    assert manifest is not None
    assert not manifest.layout["store_features"]
    assert set(passes) == {"highest"}
    assert "medium" in products


def test_precision_is_a_choice_that_a_run_keeps(tmp_path):
    config = config_file(tmp_path / "run")
    place = finished(tmp_path / "run", "compute.matmul_precision=medium")
    manifest = read_manifest(RunStorage(str(place)))
    assert manifest is not None
    assert manifest.layout["matmul_precision"] == "medium"
    assert np.isfinite(arrays(place)["train/gram"]).all()
    assert "multiplied at matmul_precision medium" in (place / "report" / "index.html").read_text()
    planned = nntk("plan", config, "--set", f"run_dir={place}", "--set", "compute.matmul_precision=medium")
    assert "products of tiles at matmul_precision medium" in " ".join(planned.out.split())
    refused = nntk("run", config, "--set", f"run_dir={place}", "--resume")
    assert refused.code == 2
    assert "laid out with compute.matmul_precision medium, the configuration says highest" in " ".join(
        refused.err.split()
    )
    wrong = nntk("plan", config, "--set", "compute.matmul_precision=tf32")
    assert wrong.code == 2
    assert "compute.matmul_precision is 'tf32'" in " ".join(wrong.err.split())


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shape", [(300, 500), (3, 5)])  # several stripes and a part; less than one stripe
def test_totals_of_a_tile_are_sums_over_it(shape, dtype):
    rng = np.random.default_rng(0)
    plugin, unbiased, stderr = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    stderr[0, :2] = np.nan
    values = {"plugin": plugin, "unbiased": unbiased, "stderr": stderr}
    before = {name: value.copy() for name, value in values.items()}
    totals = tile_totals({name: torch.from_numpy(value) for name, value in values.items()})
    plugin, unbiased, stderr = (value.astype("f8") for value in before.values())
    expected = {
        "squared_unbiased": (unbiased**2).sum(),
        "squared_difference": ((plugin - unbiased) ** 2).sum(),
        "squared_stderr": np.nansum(stderr**2),
        "unresolved": 2,
    }
    assert totals == pytest.approx(expected, rel=1e-13)
    assert all(np.array_equal(values[name], before[name], equal_nan=True) for name in values)
    assert tile_totals({"plugin": torch.from_numpy(before["plugin"])}) == {}


def test_pieces_written_beside_each_other_are_all_there(tmp_path):
    store = KernelArrays(RunStorage(tmp_path))
    paths = [f"train/gram{suffix}" for suffix in ("", "_unbiased", "_stderr")]
    store.create([StoredArray(path, (8, 8), (4, 4), ("row", "col"), "float32") for path in paths], {})
    generator = np.random.default_rng(0)
    blocks = {(path, start): generator.random((4, 4), dtype=np.float32) for path in paths for start in ((0, 4), (4, 0))}
    results = store.write_all([(*key, block) for key, block in blocks.items()], threads=3)
    assert results == [(64, checksum(block)) for block in blocks.values()]
    root = zarr.open_group(tmp_path / "kernel.zarr", mode="r")
    for (path, (row, column)), block in blocks.items():
        assert np.array_equal(root[path][row : row + 4, column : column + 4], block)


def test_a_piece_that_cannot_be_written_is_told_of(tmp_path, monkeypatch):
    store = KernelArrays(RunStorage(tmp_path))
    store.create([StoredArray("train/gram", (8, 4), (4, 4), ("row", "col"), "float32")], {})

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.storage.kernel_arrays.write_block", full)
    pieces = [("train/gram", (row, 0), np.zeros((4, 4), np.float32)) for row in (0, 4)]
    with pytest.raises(NNTKError, match=r"train/gram in run_dir .* cannot be written \(No space left on device\)"):
        store.write_all(pieces, threads=2)
