"""The estimator `activation` from configuration to store: a sign network, and one with parameters beside its layers."""

import json

import numpy as np
import pytest
import torch

from nntk_dist import open_kernel
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.statistics.standard_errors import Calibration
from nntk_dist.statistics.tile_estimates import tile_estimates
from pipeline.config.schema import load_config
from pipeline.decisions.build import build_dataset, build_model, build_spec
from tests.harness.grids import all_but
from tests.pipeline.runs.test_equality import assert_equal
from tests.pipeline.tools import arrays, config_file, finished, nntk, run

SIGN = ("model.args={widths: [32, 32], activation: sign}", "data.train=23", "data.test=7", "kernel.draws=32")
TRANSFORMER = (
    "model={builder: transformer, args: {dim: 8, depth: 1, heads: 2, hidden: 8, patch: 4, activation: sign}}",
    "data.train=13", "data.test=5", "kernel.draws=32", "kernel.estimator=activation", "kernel.outputs=3",
)  # fmt: skip
SKETCHED = (*SIGN, "kernel.contraction=sketch", "kernel.sketch=64", "kernel.parameters=['hidden*']")
MODELS = {"sign": SIGN, "transformer": TRANSFORMER, "sketched": SKETCHED}


def in_memory(run_dir, *sets):
    """The train kernel by the library's functions, with the data set's example ids."""
    config = load_config(config_file(run_dir), [*sets, f"run_dir={run_dir}"])
    dataset, spec = build_dataset(config), build_spec(config.kernel)
    model = prepare_model(build_model(config, dataset), dtype=torch.float32, device="cpu")
    x = torch.from_numpy(dataset.train.inputs)
    decision = decide(model, x, spec, batch=64)
    features = make_feature_map(model, x, spec, decision)
    draws, ids = range(features.num_draws), torch.from_numpy(dataset.train.ids)
    rows = features.compute(x, ids, draws, features.columns, batch=64)
    return tile_estimates(features, [(rows, rows)], spec.meeting, Calibration(1.0, 0.0, 1), spec.scale)


@pytest.mark.parametrize("sets", all_but([], MODELS, pytest.mark.process))
def test_a_run_is_the_library_s_kernel_however_it_is_carried_out(sets, tmp_path, monkeypatch):
    first = finished(tmp_path / "first", *sets, "compute.tile=17")
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest["decision"]["estimator"] == "activation"
    assert "are reached by noise in the pre-activations of" in manifest["decision"]["reason"]
    assert nntk("verify", first).code == 0
    kernel, expected = arrays(first), in_memory(first, *sets)
    scale = float(expected["plugin"].max())
    for path, name in (("train/gram", "plugin"), ("train/gram_unbiased", "unbiased")):
        torch.testing.assert_close(torch.from_numpy(kernel[path]), expected[name].float(), rtol=0, atol=1e-5 * scale)
    assert open_kernel(str(first)).gram.shape == kernel["train/gram"].shape
    before = {path: values.tobytes() for path, values in kernel.items()}
    assert run(first, *sets, "compute.tile=17", resume=True).code == 0
    assert {path: values.tobytes() for path, values in arrays(first).items()} == before
    monkeypatch.setattr("pipeline.decisions.layout._STORED_FEATURE_BYTES", 0)
    monkeypatch.setattr("pipeline.decisions.layout._OUTPUT_BYTES", 1)
    assert_equal(first, finished(tmp_path / "recomputed", *sets), features=False)


@pytest.mark.process
def test_examples_of_train_and_test_have_noise_of_their_own(tmp_path):
    """Both sets count rows from 0 and hold the same inputs: shared noise would show on the diagonal."""
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((40, 16)).astype(np.float32), np.arange(40) % 3
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    sets = (
        f"data.source=npz:{tmp_path / 'data.npz'}",
        "data.train=null",
        "data.test=40",
        "kernel.estimator=activation",
    )
    run_dir = finished(tmp_path / "run", *SIGN[:1], *sets, "kernel.draws=64")
    kernel = arrays(run_dir)
    train, test = (dict(zip(kernel[f"{name}/id"], range(40), strict=True)) for name in ("train", "test"))
    assert train.keys() == test.keys()
    pairs = [(test[each], train[each]) for each in train]

    def excess(name, places):
        rows, columns = zip(*places, strict=True)
        return float((kernel[f"{name}/gram"] - kernel[f"{name}/gram_unbiased"])[rows, columns].mean())

    own = excess("train", [(i, i) for i in range(40)])
    assert own > 0
    assert abs(excess("test", pairs)) < 0.1 * own


@pytest.mark.process
def test_a_plan_says_how_the_parameters_are_treated(tmp_path):
    result = nntk("plan", config_file(tmp_path / "run"), "--set", f"run_dir={tmp_path / 'run'}",
                  *[part for change in SIGN for part in ("--set", change)])  # fmt: skip
    assert result.code == 0
    words = " ".join(result.out.split())
    assert "estimator activation: autodiff is unavailable: the model jumps in its parameters" in words
    assert "of 3466 parameters 3136 are reached by noise in the pre-activations of 2 layers, 330 lie in" in words


def test_other_kernels_refuse_it(tmp_path):
    result = run(tmp_path / "run", "kernel.estimator=activation", "kernel.kind=covariance")
    assert result.code == 2
    assert (
        "kernel.estimator is 'activation'; allowed for kind covariance, which uses differences of outputs" in result.err
    )
