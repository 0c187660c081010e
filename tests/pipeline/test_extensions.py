"""A user's own package adds a data source, a model builder and a storage backend by entry points, and nothing else."""

import numpy as np
import pytest
import torch

from nntk_dist import open_kernel
from nntk_dist.errors import ArgumentError, DataError
from nntk_dist.models.builders import build_model
from pipeline import run
from pipeline.data import load_dataset
from pipeline.storage.run_storage import RunStorage

MODULE = """
from pathlib import Path

import numpy as np
from obstore.store import LocalStore
from torch import nn
from pipeline.data.source import Source, SourceRows

def open_lines(location, /, *, slope=1.0):
    x = np.arange(float(location))[:, None]
    return Source(SourceRows(f"lines:{location}", slope * x, lambda rows: x[rows]), None)


def broken(location):
    return 7


def perceptron(*, input_shape, num_outputs, gain=1.0):
    layer = nn.Linear(input_shape[0], num_outputs, bias=False)
    nn.init.constant_(layer.weight, gain)
    return layer


def open_shelf(url):
    return LocalStore(Path("shelf") / url.partition("://")[2], mkdir=True)


def arrays(rows=3):
    return {"x": np.ones((rows, 2)), "y": np.arange(float(rows))}
"""
ENTRY_POINTS = """
[nntk_dist.data_sources]
lines = acme_nntk:open_lines
broken = acme_nntk:broken
[nntk_dist.model_builders]
perceptron = acme_nntk:perceptron
[nntk_dist.storage_backends]
shelf = acme_nntk:open_shelf
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """An installed package `acme-nntk`."""
    metadata = tmp_path / "acme_nntk-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-nntk\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "acme_nntk.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def test_a_source_with_an_option():
    data = load_dataset("lines:10", train=7, test=3, normalize=False, args={"slope": 2.0})
    np.testing.assert_array_equal(data.train.targets, 2.0 * data.train.inputs)
    with pytest.raises(ArgumentError, match=r"'lines:10' takes no argument 'slop'; allowed: slope; did you mean"):
        load_dataset("lines:10", train=7, test=3, args={"slop": 2.0})
    with pytest.raises(DataError, match="'broken:10': its family returned a int; it must return a Source"):
        load_dataset("broken:10", train=7, test=3)
    with pytest.raises(
        ArgumentError, match=r"family of data.source is 'line'; allowed: sklearn, .*lines.*did you mean"
    ):
        load_dataset("line:10", train=7, test=3)


def test_the_arguments_of_a_function():
    assert len(load_dataset("python:acme_nntk:arrays", train=4, test=1, args={"rows": 5}).train.ids) == 4
    with pytest.raises(ArgumentError, match="takes no argument 'row'; allowed: rows; did you mean 'rows'"):
        load_dataset("python:acme_nntk:arrays", train=4, test=1, args={"row": 5})


def test_a_model_builder():
    model = build_model("perceptron", {"gain": 3.0}, input_shape=(2,), num_outputs=1, seed=0)
    assert model(torch.ones(1, 2)).item() == 6.0
    with pytest.raises(ArgumentError, match=r"model perceptron takes no argument 'gian'.*did you mean 'gain'"):
        build_model("perceptron", {"gian": 3.0}, input_shape=(2,), num_outputs=1, seed=0)


def test_a_storage_backend():
    storage = RunStorage("shelf://place/run")
    storage.write_bytes("ledger/1", b"row")
    assert RunStorage("shelf://place/run").read_bytes("ledger/1") == b"row"
    with pytest.raises(ArgumentError, match="is 'shef'; allowed: s3, gs, az, shelf, file; did you mean 'shelf'"):
        RunStorage("shef://place/run")


def test_a_whole_run_uses_all_three():
    """Linear regression on a line: the kernel of `f = w x` is `x x'`, and the run lies in the user's storage."""
    document = {
        "name": "lines",
        "run_dir": "shelf://place/lines",
        "data": {"source": "lines:12", "args": {"slope": 2.0}, "train": 9, "test": 3, "normalize": False},
        "model": {"builder": "perceptron", "args": {"gain": 3.0}},
        "kernel": {"kind": "local"},
        "compute": {"executor": "serial", "dtype": "float64"},
    }
    kernel = run(document, progress=False)
    x = kernel.outputs[...] / 3.0  # f(x) = 3 x
    np.testing.assert_allclose(kernel.gram[...], x @ x.T, rtol=1e-12)
    assert kernel.complete
    np.testing.assert_array_equal(open_kernel("shelf://place/lines").test_gram[...], kernel.test_gram[...])
    assert len(kernel.predictions) == 3
