"""Models with noise from configuration to store: the library's numbers, the same bits for every way to run."""

import json
import shutil

import pytest
import ray
import torch

import pipeline.work.stages
from nntk_dist import covariance_kernel, nonlocal_kernel
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.noise import MEAN_FUNCTIONS, fixed_noise
from pipeline.config.schema import config_from_dict
from pipeline.decisions.build import build_dataset, build_model
from pipeline.records.manifest import read_manifest
from pipeline.storage.run_storage import RunStorage
from tests.harness.grids import all_but
from tests.pipeline.runs.test_equality import assert_equal
from tests.pipeline.tools import arrays, assert_same_bits, finished, ledger, nntk, run, snapshot

SMALL = ("data.train=23", "data.test=7", "compute.dtype=float64", "kernel.seed=4")
DROPOUT = "model.args={widths: [8, 8], dropout: 0.25}"
BROWNIAN = "model.args={widths: [4], activation: {name: brownian, sigma: 0.05}}"
RUNS = {
    "weight": ((DROPOUT, "kernel.estimator=weight", "kernel.draws=64", "kernel.design=antithetic"), "weight"),
    "autodiff": ((DROPOUT, "kernel.draws=16"), "autodiff"),
    "covariance": ((DROPOUT, "kernel.kind=covariance", "kernel.draws=32", "kernel.design=orthogonal"), "weight"),
    "brownian": ((BROWNIAN, "kernel.draws=16"), "activation"),
}


@pytest.fixture(scope="module")
def two_cpus():
    """One Ray for all tests of this file; executors leave it running."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(("sets", "estimator"), all_but([], RUNS, pytest.mark.process, unpack=True))
def test_the_same_bits_however_a_run_is_carried_out(sets, estimator, tmp_path, shared_run):
    """Tiles, verification, resume."""
    first = shutil.copytree(shared_run(*SMALL, *sets, "compute.tile=16"), tmp_path / "first")
    decision = json.loads((first / "manifest.json").read_text())["decision"]
    assert decision["estimator"] == estimator
    assert "is part of the expectation" in decision["reason"]
    assert nntk("verify", first).code == 0
    before = snapshot(first / "kernel.zarr")
    assert run(first, *SMALL, *sets, "compute.tile=16", resume=True).code == 0
    assert snapshot(first / "kernel.zarr") == before
    assert_equal(first, finished(tmp_path / "wide", *SMALL, *sets, "compute.tile=512"))


@pytest.mark.process
@pytest.mark.parametrize("name", ["weight", "brownian"])
def test_ray_gives_the_bits_of_a_serial_run(name, tmp_path, two_cpus):
    sets, workers = (*SMALL, *RUNS[name][0]), ("compute.executor=ray", "compute.workers=2")
    assert_same_bits(finished(tmp_path / "serial", *sets), finished(tmp_path / "ray", *sets, *workers))


@pytest.mark.parametrize("name", ["weight", pytest.param("covariance", marks=pytest.mark.process)])
def test_numbers_are_the_library_s_and_outputs_are_mean_outputs(name, shared_run):
    place = shared_run(*SMALL, *RUNS[name][0])
    stored = arrays(place)
    config = config_from_dict(read_manifest(RunStorage(str(place))).config)
    dataset = build_dataset(config)
    model = prepare_model(build_model(config, dataset), dtype=torch.float64, device="cpu")
    x = torch.from_numpy(dataset.train.inputs).double()
    kernel, words = config.kernel, {} if name == "covariance" else {"estimator": "weight", "statistic": "both"}
    function = covariance_kernel if name == "covariance" else nonlocal_kernel
    ours = function(
        model, x, gamma=kernel.distribution.gamma, draws=kernel.draws, design=kernel.design, seed=4, **words
    )
    scale = float(ours.kernel.abs().max())
    expected = {"train/gram": ours.kernel, "train/gram_stderr": ours.stderr}
    for path, values in (expected | ({} if words == {} else {"train/gram_unbiased": ours.unbiased})).items():
        torch.testing.assert_close(torch.from_numpy(stored[path]), values, rtol=0, atol=1e-10 * scale)
    outputs = []
    for group in MEAN_FUNCTIONS:
        with fixed_noise(model, 4, group), torch.no_grad():
            outputs.append(model(x))
    mean = torch.stack(outputs).mean(0)
    torch.testing.assert_close(torch.from_numpy(stored["train/outputs"]), mean, rtol=1e-12, atol=1e-12)


@pytest.mark.process
def test_recomputed_features_have_the_same_noise(tmp_path, monkeypatch):
    sets = (*SMALL, DROPOUT, "kernel.draws=16", "kernel.contraction=layered")
    first = finished(tmp_path / "first", *sets)
    monkeypatch.setattr("pipeline.decisions.layout._STORED_FEATURE_BYTES", 0)
    monkeypatch.setattr("pipeline.decisions.layout._OUTPUT_BYTES", 1)
    assert_equal(first, finished(tmp_path / "again", *sets), features=False)


def test_an_interrupted_run_goes_on_with_the_same_noise(tmp_path, shared_run, monkeypatch):
    """Stopped after the first chunk of draws."""
    sets = (*SMALL, *RUNS["weight"][0], "compute.tile=16")
    stage_class = pipeline.work.stages.STAGES.get("features")
    execute, calls = stage_class.execute, []

    def interrupted(self, context, task):
        calls.append(task.tile)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return execute(self, context, task)

    monkeypatch.setattr(stage_class, "execute", interrupted)
    assert run(tmp_path / "stopped", *sets).code == 130
    monkeypatch.undo()
    done = set(ledger(tmp_path / "stopped"))
    assert ("features", "train/0/0") in done
    assert ("features", "train/0/1") not in done
    assert_same_bits(shared_run(*sets), finished(tmp_path / "stopped", *sets, resume=True))


@pytest.mark.process
def test_projected_passes_count_the_base_passes(tmp_path):
    """A draw of a pair needs half a base pass besides its own pass, an independent draw a whole one."""
    operations = {}
    for design in ("iid", "antithetic"):
        for args in ("{widths: [8, 8]}", "{widths: [8, 8], dropout: 0.25}"):
            place = tmp_path / f"{design}{len(args)}"
            sets = (f"model.args={args}", "kernel.estimator=weight", "kernel.draws=16", f"kernel.design={design}")
            manifest = json.loads((finished(place, *SMALL, *sets) / "manifest.json").read_text())
            operations[design, "dropout" in args] = manifest["projection"]["operations"]["features"]
    assert operations["iid", True] == 2 * operations["iid", False]
    assert operations["antithetic", True] == 1.5 * operations["antithetic", False]


def test_the_local_kernel_of_a_model_with_noise_is_refused(tmp_path):
    result = run(tmp_path / "run", *SMALL, DROPOUT, "kernel.kind=local")
    assert result.code == 2
    assert "kind is 'local', but the model draws noise (module 'dropout0')" in result.err
    assert "Traceback" not in result.err


def test_a_dropout_out_of_range_is_refused(tmp_path):
    result = run(tmp_path / "run", *SMALL, "model.args={dropout: 1}")
    assert result.code == 2
    assert "dropout is 1; allowed: a number from 0 to below 1" in result.err
