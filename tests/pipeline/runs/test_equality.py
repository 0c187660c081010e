"""The same numbers for every way to run (tiles, executors, workers, features stored or recomputed), and the same as the
library's functions in memory.

The way a run is executed may change the order of sums. Rounding here means: at most √65 ≈ 8 float32 units of the
largest kernel entry, 65 being the longest sum (the inputs of the first layer, with the bias).
"""

import math

import numpy as np
import pytest
import ray
import torch

import pipeline.decisions.layout
import pipeline.work.context
from nntk_dist import averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel, prepare_kernel
from nntk_dist.models.evaluation import prepare_model
from pipeline.config.schema import load_config
from pipeline.decisions.build import build_dataset, build_model
from tests.harness.grids import all_but
from tests.pipeline.tools import arrays, assert_same_bits, config_file, finished

LONGEST_SUM = 65
ROUNDING = math.sqrt(LONGEST_SUM) * float(np.finfo(np.float32).eps)

ESTIMATORS = {
    "autodiff": (),
    "weight": ("kernel.estimator=weight", "kernel.draws=64"),
    "full": ("kernel.outputs=full", "data.train=23", "data.test=7"),
    "covariance": ("kernel.kind=covariance", "kernel.draws=64"),
    "sketch": ("kernel.contraction=sketch", "kernel.sketch=64"),
    "control variates": ("kernel.estimator=activation", "kernel.variance_reduction=auto", "kernel.draws=16"),
    "quantised weights": (
        "model.builder=python:tests.pipeline.runs.jumping_models:signed_weights",
        "model.args={}",
        "kernel.estimator=weight",
        "kernel.variance_reduction=all",
        "kernel.draws=64",
    ),
    "fitted control variates": (
        "model.builder=python:tests.pipeline.runs.jumping_models:decision_rule",
        "model.args={}",
        "kernel.variance_reduction=all",
        "kernel.draws=128",
        "kernel.distribution.gamma=0.3",
    ),
}


@pytest.fixture(scope="module")
def two_cpus():
    """One Ray for all tests of this file; executors leave it running."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def recomputed(monkeypatch):
    """No memory for features: every tile computes its own, one output at a time."""
    monkeypatch.setattr(pipeline.decisions.layout, "_STORED_FEATURE_BYTES", 0)
    monkeypatch.setattr(pipeline.decisions.layout, "_OUTPUT_BYTES", 1)


def assert_equal(first, second, *, features=True):
    """Check that per-row arrays are equal bit for bit, and kernels to rounding."""
    left, right = arrays(first), arrays(second)
    kernels = {path for path in left if "gram" in path or "diagonal" in path}
    assert len(kernels) >= 6
    rest = {path for path in left | right if path not in kernels and (features or "features" not in path)}
    assert {path for path in rest if "features" in path} or not features
    assert [path for path in sorted(rest) if left[path].tobytes() != right[path].tobytes()] == []
    largest = np.abs(left["train/gram"]).max()
    for path in kernels:
        np.testing.assert_allclose(right[path], left[path], rtol=0, atol=ROUNDING * largest, err_msg=path)


@pytest.mark.parametrize("sets", all_but([], ESTIMATORS, pytest.mark.process))
def test_tiles_change_rounding_at_most(sets, tmp_path, shared_run):
    small = finished(tmp_path / "small", *sets, "compute.tile=17")
    for other in (shared_run(*sets), finished(tmp_path / "wide", *sets, "compute.tile=512")):
        assert_equal(small, other)


def test_stored_features_are_never_computed_again(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("features of stored rows were computed")

    monkeypatch.setattr(pipeline.work.context.Context, "compute", refuse)
    assert "train/gram" in arrays(finished(tmp_path / "run", "compute.stderr=sample"))


@pytest.mark.process
def test_ray_gives_the_bits_of_a_serial_run(tmp_path, two_cpus):
    serial = finished(tmp_path / "serial")
    for workers in (1, 2):
        place = tmp_path / f"ray{workers}"
        assert_same_bits(serial, finished(place, "compute.executor=ray", f"compute.workers={workers}"))
    assert_equal(serial, finished(tmp_path / "wide", "compute.executor=ray", "compute.tile=512"))


@pytest.mark.process
def test_tiles_computed_while_others_are_written_have_the_same_bits(tmp_path, two_cpus, monkeypatch):
    serial = finished(tmp_path / "serial", "compute.tile=17")
    monkeypatch.setattr("pipeline.driver.run.overlaps_writing", lambda job: True)
    sets = ("compute.tile=17", "compute.executor=ray", "compute.workers=2")
    assert_same_bits(serial, finished(tmp_path / "ray", *sets))


MODELS = {
    "mlp": ("data.train=149",),
    "cnn": ("model.builder=cnn", "model.args={channels: [4, 4]}"),
    "transformer": ("model.builder=transformer", "model.args={dim: 8, depth: 1, heads: 2, hidden: 8}"),
    "full": ("kernel.outputs=full", "data.train=19", "data.test=7"),
    "sketch": ESTIMATORS["sketch"],
}


@pytest.mark.parametrize("sets", all_but([], MODELS, pytest.mark.process))
def test_recomputed_features_give_the_stored_ones_kernel(sets, tmp_path, request):
    sets = ("data.train=31", "data.test=11", "compute.tile=16", *sets)
    stored = finished(tmp_path / "stored", *sets)
    request.getfixturevalue("recomputed")
    anew = finished(tmp_path / "recomputed", *sets)
    assert not any("features" in path for path in arrays(anew))
    assert_equal(stored, anew, features=False)


@pytest.mark.process
def test_recomputed_features_on_ray(tmp_path, two_cpus, recomputed):
    sets = ("data.train=31", "data.test=11", "compute.tile=16")
    serial = finished(tmp_path / "serial", *sets)
    assert_same_bits(serial, finished(tmp_path / "ray", *sets, "compute.executor=ray", "compute.workers=2"))


def in_memory(run_dir, function, *sets, **options):
    """A function of the library on the data and the model of a run, train by train and test by train."""
    config = load_config(config_file(run_dir), [f"run_dir={run_dir}", *sets])
    dataset = build_dataset(config)
    model = prepare_model(build_model(config, dataset), dtype=torch.float32, device="cpu")
    train, test = torch.from_numpy(dataset.train.inputs), torch.from_numpy(dataset.test.inputs)
    options |= {"batch": pipeline.decisions.layout.choose_batch(config, model, train, len(train))}
    return function(model, train, **options), function(model, test, train, **options)


def sketched_local_kernel(model, x1, x2=None, **options):
    """The local kernel with its error: `local_kernel` returns a tensor alone."""
    return prepare_kernel(model, x1, kind="local", **options)(x1, x2)


FUNCTIONS = {
    "autodiff": ((), nonlocal_kernel, {"gamma": 0.05, "statistic": "both"}),
    "weight": (ESTIMATORS["weight"], nonlocal_kernel, {"gamma": 0.05, "estimator": "weight", "draws": 64}),
    "sketch": (ESTIMATORS["sketch"], nonlocal_kernel, {"gamma": 0.05, "contraction": "sketch", "sketch": 64}),
    "projected outputs": (
        (*ESTIMATORS["sketch"], "kernel.output_projections=32"),
        nonlocal_kernel,
        {"gamma": 0.05, "contraction": "sketch", "sketch": 64, "output_projections": 32},
    ),
    "quantised weights": (
        ESTIMATORS["quantised weights"],
        nonlocal_kernel,
        {"gamma": 0.05, "estimator": "weight", "draws": 64, "variance_reduction": "all", "statistic": "both"},
    ),
    "fitted control variates": (
        ESTIMATORS["fitted control variates"],
        nonlocal_kernel,
        {"gamma": 0.3, "draws": 128, "variance_reduction": "all", "statistic": "both"},
    ),
    "local": (("kernel.kind=local", "kernel.sketch=64"), sketched_local_kernel, {"sketch": 64}),
    "covariance": (ESTIMATORS["covariance"], covariance_kernel, {"gamma": 0.05, "draws": 64}),
    "averaged": (("kernel.kind=averaged", "kernel.seed=3"), averaged_kernel, {"gamma": 0.05, "seed": 3}),
}


@pytest.mark.parametrize(
    ("sets", "function", "options"), all_but(["weight", "covariance"], FUNCTIONS, pytest.mark.process, unpack=True)
)
def test_the_pipeline_computes_the_librarys_kernels(sets, function, options, shared_run):
    place = shared_run(*sets)
    stored = arrays(place)
    for split, estimate in zip(("train", "test"), in_memory(place, function, *sets, **options), strict=True):
        assert ("variance_reduction" in options) == ("control variates" in estimate.reason)
        plugin = estimate.kernel if estimate.plugin is None else estimate.plugin
        expected = {"gram": plugin, "gram_unbiased": estimate.unbiased, "gram_stderr": estimate.stderr}
        largest = float(plugin.abs().max())
        for name, values in expected.items():
            assert (values is None) == (f"{split}/{name}" not in stored)
            if values is not None:
                found = stored[f"{split}/{name}"]
                np.testing.assert_allclose(found, values.numpy(), rtol=0, atol=ROUNDING * largest, err_msg=name)


def test_the_pipeline_computes_the_local_kernel(tmp_path):
    stored = arrays(finished(tmp_path / "run", "kernel.kind=local"))
    train, test = in_memory(tmp_path / "run", local_kernel)
    largest = float(train.abs().max())
    np.testing.assert_allclose(stored["train/gram"], train.numpy(), rtol=0, atol=ROUNDING * largest)
    np.testing.assert_allclose(stored["test/gram"], test.numpy(), rtol=0, atol=ROUNDING * largest)
