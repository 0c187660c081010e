"""Whole numbers keep their type from every source to an embedding layer; examples of several parts become rows of bytes
and a layout; arrays of any memory layout and byte order.
"""

import re
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from numpy.testing import assert_array_equal

from nntk_dist import open_kernel
from nntk_dist.errors import DataError
from nntk_dist.models.evaluation import outputs
from pipeline.config.schema import load_config
from pipeline.data import load_dataset
from pipeline.decisions.build import build_dataset, build_model, build_prepared, identity
from tests.pipeline.tools import config_file, finished, nntk, run

RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(0, 50, (23, 6))
MASK = (np.arange(6) < RANDOM.integers(2, 7, 23)[:, None]).astype(np.int64)
SCALE = RANDOM.standard_normal(23)
Y = np.arange(23) % 3
MODULE = """
    import numpy as np, torch
    from torch import nn
    stored = np.load({path!r})
    ids, mask, scale, y = (stored[name] for name in ("ids", "mask", "scale", "y"))

    def tokens(dtype="int64", shift=0):
        return (ids + shift).astype(dtype), y

    def strided():
        return np.asfortranarray(ids[::-1])[:, ::-1], y[::-1]

    def other_byte_order():
        values = scale.astype(">f8")
        values.flags.writeable = False
        return values, y.astype(">i4")

    def tensors():
        return torch.tensor(ids, dtype=torch.int32), torch.tensor(y)

    def parts():
        return {{"ids": ids, "mask": mask, "scale": scale}}, y

    def pair():
        return (ids, scale.astype(np.float32)), y

    def two_sets():
        cut = {{"x_train": {{"ids": ids[:9]}}, "y_train": y[:9]}}
        return cut | {{"x_test": {{"ids": ids[9:].astype(np.int32)}}, "y_test": y[9:]}}

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(50, 4), nn.Linear(4, 3)

        def forward(self, ids, mask=None, scale=None):
            assert ids.dtype == torch.int64
            h = self.table(ids)
            if mask is None:
                return self.head(h.mean(1))
            assert mask.dtype == torch.int64
            mask = mask[:, :, None].to(h.dtype)
            return self.head((h * mask).sum(1) / mask.sum(1)) * scale[:, None]

    def model():
        return Tokens()
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    np.savez(tmp_path / "stored.npz", ids=IDS, mask=MASK, scale=SCALE, y=Y)
    (tmp_path / "own_tokens.py").write_text(textwrap.dedent(MODULE).format(path=str(tmp_path / "stored.npz")))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_tokens", None)


def write_all(folder):
    """The same ids in every kind of source."""
    np.savez(folder / "ids.npz", x=IDS, y=Y)
    zarr.open_group(folder / "ids.zarr", mode="w").create_array("x", data=IDS)
    zarr.open_group(folder / "ids.zarr", mode="a").create_array("y", data=Y)
    lists = pa.table({"ids": IDS.tolist(), "y": Y})
    pq.write_table(lists, folder / "lists.parquet")
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(IDS.reshape(-1)), 6)
    pq.write_table(pa.table({"ids": fixed, "y": Y}), folder / "fixed.parquet")
    columns = pa.table({f"id{j}": IDS[:, j] for j in range(6)} | {"y": Y})
    pq.write_table(columns, folder / "columns.parquet")
    pa.csv.write_csv(columns, folder / "columns.csv")
    pyarrow.feather.write_feather(lists, folder / "lists.feather")
    with pa.ipc.new_stream(folder / "stream.arrow", lists.schema) as stream:
        stream.write_table(lists)
    return [
        *(f"npz:{folder}/ids.npz", f"zarr:{folder}/ids.zarr", f"csv:{folder}/columns.csv"),
        *(f"parquet:{folder}/{name}.parquet" for name in ("lists", "fixed", "columns")),
        *(f"arrow:{folder}/lists.feather", f"arrow:{folder}/stream.arrow"),
        "python:own_tokens:tokens",
    ]


def test_ids_are_the_same_int64_from_every_source(tmp_path):
    for source in write_all(tmp_path):
        data = load_dataset(source, train=17, test=6)
        for split in (data.train, data.test):
            assert split.inputs.dtype == np.int64, source
            assert_array_equal(split.inputs, IDS[split.ids])
            assert_array_equal(split.targets, Y[split.ids])


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("int8", "int8"), ("int32", "int32"), (">i4", "int32"), ("uint16", "int64"), ("uint64", "int64"),
     ("uint8", "float32"), ("bool", "float32"), ("float16", "float32")],
)  # fmt: skip
def test_types(dtype, kept):
    data = load_dataset("python:own_tokens:tokens", train=17, test=6, normalize=False, args={"dtype": dtype})
    assert data.train.inputs.dtype == data.test.inputs.dtype == np.dtype(kept)
    assert_array_equal(data.train.inputs, IDS[data.train.ids].astype(dtype).astype(kept))
    assert torch.from_numpy(data.train.inputs).shape == (17, 6)


def test_pixels_are_normalised_and_ids_are_not():
    pixels = load_dataset("python:own_tokens:tokens", train=17, test=6, args={"dtype": "uint8"})
    np.testing.assert_allclose(pixels.train.inputs.mean(0), 0, atol=1e-6)
    ids = load_dataset("python:own_tokens:tokens", train=17, test=6)
    assert_array_equal(ids.train.inputs, IDS[ids.train.ids])
    assert_array_equal((ids.mean, ids.deviation), (np.zeros(6), np.ones(6)))


def test_numbers_too_large_for_int64():
    with pytest.raises(DataError, match=r"hold 18446744073709551615; give whole numbers that int64 can hold"):
        load_dataset("python:own_tokens:tokens", train=17, test=6, args={"dtype": "uint64", "shift": -50})


def test_any_memory_layout_and_byte_order():
    data = load_dataset("python:own_tokens:strided", train=17, test=6)
    assert_array_equal(data.train.inputs, IDS[::-1, ::-1][data.train.ids])
    assert_array_equal(data.train.targets, Y[::-1][data.train.ids])
    data = load_dataset("python:own_tokens:other_byte_order", train=17, test=6, normalize=False)
    assert_array_equal(data.train.inputs[:, 0], SCALE.astype(np.float32)[data.train.ids])
    assert_array_equal(data.train.targets, Y[data.train.ids])
    data = load_dataset("python:own_tokens:tensors", train=17, test=6)
    assert data.train.inputs.dtype == np.int32
    assert_array_equal(data.train.inputs, IDS[data.train.ids])


def check_parts(data, expected):
    for split in (data.train, data.test):
        assert split.inputs.dtype == np.uint8
        parts = data.layout.unpack(torch.from_numpy(split.inputs), torch.float32)
        assert list(parts) == list(expected)
        for name, values in expected.items():
            wanted = values.astype(np.float32) if values.dtype.kind == "f" else values
            assert parts[name].numpy().dtype == wanted.dtype
            assert_array_equal(parts[name].numpy(), wanted[split.ids])


def test_parts_are_packed_and_never_normalised():
    data = load_dataset("python:own_tokens:parts", train=17, test=6)
    check_parts(data, {"ids": IDS, "mask": MASK, "scale": SCALE})
    assert data.layout.named
    data = load_dataset("python:own_tokens:pair", train=17, test=0)
    check_parts(data, {"0": IDS, "1": SCALE})
    assert not data.layout.named


def test_columns_with_a_list_among_them_are_parts(tmp_path):
    table = pa.table({"ids": IDS.tolist(), "mask": MASK.tolist(), "scale": SCALE, "y": Y})
    pq.write_table(table, tmp_path / "tokens.parquet")
    check_parts(
        load_dataset(f"parquet:{tmp_path}/tokens.parquet", train=17, test=6),
        {"ids": IDS, "mask": MASK, "scale": SCALE},
    )
    source = load_dataset(f"parquet:{tmp_path}/tokens.parquet", train=17, test=6, input_columns=["mask"])
    assert source.layout is None
    assert_array_equal(source.train.inputs, MASK[source.train.ids])


def test_sets_with_other_parts_are_refused():
    message = r"two_sets x_test has the parts ids int32\[6\]; allowed: ids int64\[6\], as prepared"
    with pytest.raises(DataError, match=message):
        load_dataset("python:own_tokens:two_sets", train=None, test=None)


@pytest.mark.parametrize("function", ["tokens", "parts"])
def test_a_run_is_the_kernel_of_the_model_on_ids(function, tmp_path):
    """The local kernel against a loop of autograd over the examples."""
    sets = (
        f"data.source=python:own_tokens:{function}", "data.train=13", "data.test=5", "compute.tile=8",
        "model.builder=python:own_tokens:model", "model.args={}", "kernel.kind=local", "compute.dtype=float64",
    )  # fmt: skip
    place = finished(tmp_path / "run", *sets)
    config = load_config(config_file(place), [f"run_dir={place}", *sets])
    dataset = build_dataset(config)
    model = build_model(config, dataset).double()
    rows = dataset.train.ids
    gradients = []
    for row in rows:
        given = [torch.tensor(IDS[row : row + 1])]
        if function == "parts":
            scale = torch.tensor(SCALE[row : row + 1].astype(np.float32)).double()
            given += [torch.tensor(MASK[row : row + 1]), scale]
        found = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in model(*given)[0]]
        gradients.append(torch.stack([torch.cat([part.reshape(-1) for part in each]) for each in found]))
    stacked = torch.stack(gradients)
    expected = torch.einsum("ncp,mcp->nm", stacked, stacked).numpy()
    np.testing.assert_allclose(open_kernel(place).gram[:, :], expected, rtol=1e-10, atol=1e-10)
    prepared = build_prepared(config, dataset, build_model(config, dataset), "cpu")
    assert outputs(prepared, torch.from_numpy(dataset.train.inputs)).shape == (13, 3)
    assert nntk("verify", place).code == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("tokens", r"fails on its inputs .*; they are whole numbers \(int64\), .*set data.args={dtype: float32}"),
        ("parts", r"fails on its inputs .*; the examples have the parts ids int64\[6\], mask int64\[6\], scale"),
    ],
)
def test_a_model_of_floating_point_numbers_is_refused_with_advice(function, message, tmp_path):
    result = run(tmp_path / "run", f"data.source=python:own_tokens:{function}", "data.train=13", "data.test=5")
    assert result.code == 2
    assert re.search(message, " ".join(result.err.split())), result.err


def test_the_layout_is_part_of_the_identity(tmp_path):
    sets = (
        "data.source=python:own_tokens:parts", "data.train=13", "data.test=5", "model.builder=python:own_tokens:model",
        "model.args={}",
    )  # fmt: skip
    config = load_config(config_file(tmp_path / "run"), [f"run_dir={tmp_path / 'run'}", *sets])
    dataset = build_dataset(config)
    parts = identity(config, dataset, build_model(config, dataset))["data"]
    assert parts["parts"] == "ids int64[6], mask int64[6], scale float32[]"
