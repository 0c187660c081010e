"""The results of a run, read by plain zarr, xarray, dask and the library's reader, for every form of kernel.

Sizes: n train rows, m test rows, C = 10 outputs, S draws.
"""

import dask.array
import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray
import zarr

from nntk_dist import open_kernel
from tests.harness.grids import all_but
from tests.pipeline.tools import NUM_TEST, NUM_TRAIN, arrays, finished, nntk

OUTPUTS = 10
FEW = ("data.train=23", "data.test=7", "compute.tile=8")
EPS = float(np.finfo(np.float32).eps)


def test_the_store_says_what_it_is(good_run):
    root = zarr.open_group(good_run / "kernel.zarr", mode="r")
    attributes = dict(root.attrs)
    assert attributes["schema"] == "nntk-kernel"
    assert attributes["version"] == 1
    assert len(attributes["fingerprint"]) == 64
    assert (attributes["kind"], attributes["estimator"], attributes["draws"]) == ("nonlocal", "autodiff", 8)
    for path in ("train/gram", "train/gram_unbiased", "train/gram_stderr"):
        array = root[path]
        assert (array.shape, array.metadata.dimension_names) == ((NUM_TRAIN, NUM_TRAIN), ("row", "col"))
        assert array.shards == (64, 64)
        assert np.isnan(array.fill_value)
    assert root["test/gram"].shape == (NUM_TEST, NUM_TRAIN)
    assert root["test/diagonal"].shape == (NUM_TEST,)
    assert root["train/outputs"].metadata.dimension_names == ("row", "output")


def test_kernels_are_symmetric_finite_and_positive(good_run):
    stored = arrays(good_run)
    for name in ("gram", "gram_unbiased", "gram_stderr"):
        assert np.array_equal(stored[f"train/{name}"], stored[f"train/{name}"].T)
    assert all(np.isfinite(values).all() for values in stored.values())
    eigenvalues = np.linalg.eigvalsh(stored["train/gram"].astype(np.float64))
    assert eigenvalues[0] > -NUM_TRAIN * EPS * eigenvalues[-1]
    assert (stored["train/gram_stderr"] > 0).all()
    assert stored["train/id"].tolist() != sorted(stored["train/id"].tolist())
    assert not set(stored["train/id"]) & set(stored["test/id"])


def test_xarray_and_dask_open_the_store_as_it_is(good_run):
    stored = arrays(good_run)
    for split in ("train", "test"):
        opened = xarray.open_zarr(good_run / "kernel.zarr", group=split, consolidated=False)
        assert set(opened["gram"].dims) == {"row", "col"}
        assert np.array_equal(opened["gram"].values, stored[f"{split}/gram"])
        assert np.array_equal(opened["targets"].values, stored[f"{split}/targets"])
    lazy = dask.array.from_zarr(str(good_run / "kernel.zarr"), component="train/gram")
    assert np.array_equal(lazy.compute(), stored["train/gram"])


def test_the_reader_opens_a_run(good_run):
    stored, kernel = arrays(good_run), open_kernel(good_run)
    assert kernel.complete
    assert np.array_equal(kernel.gram[...], stored["train/gram"])
    assert np.array_equal(kernel.test_gram_unbiased[...], stored["test/gram_unbiased"])
    assert np.array_equal(kernel.targets[...], stored["train/targets"])
    vector = np.arange(NUM_TRAIN, dtype=np.float64)
    product = stored["train/gram"].astype(np.float64) @ vector
    np.testing.assert_allclose(kernel.linear_operator() @ vector, product, rtol=1e-12)
    assert kernel.to_xarray("test").sizes == {"row": NUM_TEST, "col": NUM_TRAIN, "output": OUTPUTS}


WEIGHT = ("kernel.estimator=weight", "kernel.draws=32")
SKETCH = ("kernel.contraction=sketch", "kernel.sketch=64")
FACTORED = {
    "trace": WEIGHT,
    "full": (*WEIGHT, "kernel.outputs=full"),
    "one output": (*WEIGHT, "kernel.outputs=4"),
    "antithetic": (*WEIGHT, "kernel.design=antithetic"),
    "covariance": ("kernel.kind=covariance", "kernel.draws=32"),
    "raw": (*WEIGHT, "kernel.scale=raw"),
    "sketch": (*SKETCH, "kernel.scale=raw"),
    "sketch full": (*SKETCH, "kernel.outputs=full"),
}


@pytest.mark.parametrize("sets", all_but(["trace", "covariance"], FACTORED, pytest.mark.process))
def test_the_factor_is_the_kernel(sets, tmp_path):
    kernel = open_kernel(finished(tmp_path / "run", *FEW, *sets))
    features, metric = kernel.factor()
    gram = kernel.gram[...]
    # sums in float32 over at most 32 draws and 10 outputs, or 10 outputs and 64 columns
    np.testing.assert_allclose(features @ metric @ features.T, gram, rtol=0, atol=np.sqrt(640) * EPS * gram.max())


FORMS = {
    "both": ((), {"", "_unbiased", "_stderr"}, 1),
    "plugin": (("kernel.statistic=plugin",), {"", "_stderr"}, 1),
    "sampled errors": (("compute.stderr=sample",), {"", "_unbiased"}, 1),
    "no errors": (("compute.stderr=none",), {"", "_unbiased"}, 1),
    "full": (("kernel.outputs=full",), {"", "_unbiased", "_stderr"}, OUTPUTS),
    "one output": (("kernel.outputs=9",), {"", "_unbiased", "_stderr"}, 1),
    "covariance": (("kernel.kind=covariance", "kernel.draws=32"), {"", "_stderr"}, 1),
    "averaged": (("kernel.kind=averaged",), {"", "_stderr"}, 1),
    "local": (("kernel.kind=local",), {""}, 1),
    "local full": (("kernel.kind=local", "kernel.outputs=full"), {""}, OUTPUTS),
    "float64": (("compute.dtype=float64",), {"", "_unbiased", "_stderr"}, 1),
    "averaged full": (("kernel.kind=averaged", "kernel.outputs=full"), {"", "_stderr"}, OUTPUTS),
}


@pytest.mark.parametrize(
    ("sets", "suffixes", "width"), all_but(["covariance", "local full"], FORMS, pytest.mark.process, unpack=True)
)
def test_every_form_of_kernel(sets, suffixes, width, tmp_path):
    run_dir = finished(tmp_path / "run", *FEW, *sets)
    stored, (n, m) = arrays(run_dir), (23 * width, 7 * width)
    expected = {f"{prefix}{suffix}" for suffix in suffixes for prefix in ("train/gram", "test/gram", "test/diagonal")}
    assert {path for path in stored if "gram" in path or "diagonal" in path} == expected
    for suffix in suffixes:
        assert stored[f"train/gram{suffix}"].shape == (n, n)
        assert stored[f"test/gram{suffix}"].shape == (m, n)
        assert stored[f"test/diagonal{suffix}"].shape == ((7,) if width == 1 else (7, width, width))
        assert np.array_equal(stored[f"train/gram{suffix}"], stored[f"train/gram{suffix}"].T)
    assert {values.dtype for path, values in stored.items() if path in expected} == {
        np.dtype("f8" if "compute.dtype=float64" in sets else "f4")
    }
    assert nntk("verify", run_dir, "--recompute", 20).code == 0


@pytest.mark.process
def test_a_full_kernel_sums_to_the_trace(tmp_path):
    full = arrays(finished(tmp_path / "full", *FEW, "kernel.outputs=full"))
    trace = arrays(finished(tmp_path / "trace", *FEW))
    one = arrays(finished(tmp_path / "one", *FEW, "kernel.outputs=4"))
    for path in ("train/gram", "test/gram_unbiased"):
        rows, columns = trace[path].shape
        entries = full[path].reshape(rows, OUTPUTS, columns, OUTPUTS).astype(np.float64)
        largest = np.abs(trace[path]).max()
        np.testing.assert_allclose(np.einsum("icjc->ij", entries), trace[path], rtol=0, atol=16 * EPS * largest)
        np.testing.assert_allclose(entries[:, 4, :, 4], one[path], rtol=0, atol=16 * EPS * largest)
    diagonal = np.einsum("icc->i", full["test/diagonal"].astype(np.float64))
    np.testing.assert_allclose(diagonal, trace["test/diagonal"], rtol=16 * EPS)


@pytest.mark.process
def test_raw_and_localised_kernels_differ_by_the_square_of_the_parameters(tmp_path):
    raw = arrays(finished(tmp_path / "raw", *FEW, "kernel.scale=raw"))
    localised = arrays(finished(tmp_path / "localised", *FEW))
    parameters = open_kernel(tmp_path / "raw").group.attrs["parameters"]
    assert parameters == 64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
    for path in ("train/gram", "train/gram_unbiased", "train/gram_stderr", "test/diagonal"):
        np.testing.assert_allclose(raw[path] * float(parameters) ** 2, localised[path], rtol=4 * EPS)


@pytest.mark.process
def test_regression_with_jumps(tmp_path):
    sets = (
        "data.source=synthetic:sign",
        "data.train=97",
        "data.test=31",
        "model.args={widths: [32], activation: sign}",
        "kernel.distribution.gamma=0.3",
        "kernel.draws=256",
    )
    run_dir = finished(tmp_path / "run", *sets)
    stored = arrays(run_dir)
    assert open_kernel(run_dir).group.attrs["estimator"] == "activation"
    assert (stored["train/targets"].shape, stored["train/targets"].dtype) == ((97, 1), np.float64)
    table = pq.read_table(run_dir / "tables/regression.parquet").to_pylist()
    chosen = next(row for row in table if row["selected"])
    assert chosen["test_error"] < 0.1  # the targets are ±1; a constant has error 1
    assert nntk("verify", run_dir).code == 0


@pytest.mark.parametrize(
    ("train", "test", "tile", "batch"),
    [
        (1, 1, 64, "auto"),
        pytest.param(2, 1, 1, 1, marks=pytest.mark.process),
        pytest.param(5, 2, 512, 512, marks=pytest.mark.process),
        pytest.param(13, 3, 1, 7, marks=pytest.mark.process),
        pytest.param(11, 5, 4, 3, marks=pytest.mark.process),
    ],
)
def test_awkward_sizes(train, test, tile, batch, tmp_path):
    sets = (f"data.train={train}", f"data.test={test}", f"compute.tile={tile}", f"compute.batch={batch}")
    run_dir = finished(tmp_path / "run", *sets)
    assert nntk("verify", run_dir, "--recompute", 99).code == 0
    assert arrays(run_dir)["test/gram"].shape == (test, train)


def test_labels_of_text_and_classes_without_training_examples(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.array(["ash", "birch", "cedar", "dogwood"])[np.arange(40) % 4]
    np.savez(
        tmp_path / "trees.npz",
        x_train=generator.standard_normal((20, 6)),
        y_train=np.where(labels[:20] == "cedar", "ash", labels[:20]),
        x_test=generator.standard_normal((12, 6)),
        y_test=labels[:12],
    )
    sets = (f"data.source=npz:{tmp_path / 'trees.npz'}", "data.train=20", "data.test=12", "report.plots=true")
    run_dir = finished(tmp_path / "run", *sets)
    stored = arrays(run_dir)
    assert stored["train/outputs"].shape == (20, 4)
    assert set(stored["train/targets"]) == {0, 1, 3}
    assert set(stored["test/targets"]) == {0, 1, 2, 3}
    predictions = pq.read_table(run_dir / "tables/predictions.parquet")
    assert [name for name in predictions.column_names if name.startswith("score_")] == [f"score_{t}" for t in range(4)]
    assert (run_dir / "report/index.html").stat().st_size > 10_000
