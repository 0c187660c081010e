"""Distributions, relative ranges and orthogonal designs through the pipeline: the library's numbers, kept in the
manifest, planned, resumed and refused.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import pipeline.decisions.layout
from nntk_dist import covariance_kernel, nonlocal_kernel
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.spec import KernelSpec
from pipeline.config.schema import config_from_dict
from pipeline.decisions.build import build_dataset, build_model
from pipeline.decisions.stored_run import stored_job
from pipeline.records.manifest import read_manifest
from pipeline.storage.run_storage import RunStorage
from tests.harness.grids import all_but
from tests.pipeline.tools import arrays, assert_same_bits, finished, run, snapshot

SMALL = ("data.train=23", "data.test=11", "compute.tile=16", "model.args={widths: [4]}", "compute.dtype=float64")
RUNS = {
    "student": (
        ("kernel.distribution={name: student, nu: 4, gamma_scale: relative}", "kernel.draws=64"),
        {"distribution": {"name": "student", "nu": 4}, "gamma_scale": "relative", "draws": 64},
    ),
    "lowrank": (
        ("kernel.distribution={name: lowrank, rank: 2}", "kernel.draws=64", "kernel.design=antithetic"),
        {"distribution": {"name": "lowrank", "rank": 2}, "draws": 64, "design": "antithetic"},
    ),
    "orthogonal": (
        ("kernel.design=orthogonal", "kernel.distribution.name=sphere", "kernel.estimator=weight"),
        {"distribution": "sphere", "design": "orthogonal", "estimator": "weight"},
    ),
    "orthogonal, one block": (
        ("kernel.design=orthogonal", "kernel.blocks=1", "kernel.statistic=plugin", "kernel.estimator=weight"),
        {"design": "orthogonal", "blocks": 1, "statistic": "plugin", "estimator": "weight"},
    ),
    "orthogonal, two blocks of gradients": (
        ("kernel.design=orthogonal", "kernel.blocks=2", "kernel.distribution.gamma_scale=relative"),
        {"design": "orthogonal", "blocks": 2, "statistic": "both", "gamma_scale": "relative"},
    ),
    "fractional covariance": (
        ("kernel.kind=covariance", "kernel.distribution={name: fractional, alpha: 0.25}", "kernel.draws=64"),
        {"distribution": {"name": "fractional", "alpha": 0.25}, "draws": 64},
    ),
}


@pytest.mark.parametrize(("sets", "options"), all_but(["lowrank"], RUNS, pytest.mark.process, unpack=True))
def test_runs_give_the_librarys_numbers_and_keep_their_words(sets, options, tmp_path, shared_run):
    place = shutil.copytree(shared_run(*SMALL, *sets), tmp_path / "run")
    stored = arrays(place)
    manifest = read_manifest(RunStorage(str(place)))
    config = config_from_dict(manifest.config)
    dataset = build_dataset(config)
    model = prepare_model(build_model(config, dataset), dtype=torch.float64, device="cpu")
    x = torch.from_numpy(dataset.train.inputs).double()
    function = covariance_kernel if config.kernel.kind == "covariance" else nonlocal_kernel
    batch = pipeline.decisions.layout.choose_batch(config, model, x, len(x))
    estimate = function(model, x, gamma=0.05, batch=batch, **options)
    plugin = estimate.kernel if estimate.plugin is None else estimate.plugin
    largest = float(plugin.abs().max())
    expected = {"gram": plugin, "gram_unbiased": estimate.unbiased, "gram_stderr": estimate.stderr}
    for name, values in expected.items():
        assert (values is None) == (f"train/{name}" not in stored), name
        if values is not None:
            np.testing.assert_allclose(stored[f"train/{name}"], values, rtol=0, atol=1e-10 * largest, err_msg=name)
    spec = stored_job(manifest).spec
    named = {"statistic": "both", "kind": config.kernel.kind} | options
    assert spec == KernelSpec(gamma=0.05, **named)
    few = spec.blocks < 4
    assert (manifest.layout["stderr"] == "none") == few
    assert ("train_relative_error" not in manifest.results) == few
    before = snapshot(place / "kernel.zarr")
    finished(place, *SMALL, *sets, resume=True)
    assert snapshot(place / "kernel.zarr") == before


@pytest.mark.process
def test_tiles_and_chunks_give_the_same_features(tmp_path):
    """Chunks of draws are whole blocks, so whole groups: features do not depend on how rows are divided."""
    sets = (*SMALL, *RUNS["orthogonal"][0])
    first, second = (finished(tmp_path / str(tile), *sets, f"compute.tile={tile}") for tile in (16, 512))
    for path in ("train/features", "test/features", "metric"):
        assert arrays(first)[path].tobytes() == arrays(second)[path].tobytes()
    assert_same_bits(first, finished(tmp_path / "again", *sets))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("kernel.design=orthogonal", "kernel.draws=2576", "kernel.estimator=weight"), r"multiples of 2480 .*is 2480"),
        (
            ("kernel.design=orthogonal", "kernel.blocks=2", "kernel.draws=200"),
            r"blocks is 2; allowed: 4 or more, .* \(1 or more without error bars",
        ),
        (
            ("kernel.distribution={name: student}", "model.args={widths: [4, 4, 4]}"),
            r"nu is 5, but 4 layers of weights .* allowed: above 6",
        ),
    ],
)
def test_what_only_the_model_can_tell_is_refused_in_one_line(sets, message, tmp_path):
    result = run(tmp_path / "run", *SMALL, *sets)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert re.search(message, result.err), result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_the_plan_counts_the_groups_that_are_held(tmp_path):
    """An orthogonal group holds 310 draws of 310 parameters and intermediate arrays; the rest is the same for both."""
    peaks = []
    for design in ("iid", "orthogonal"):
        sets = (*SMALL, "kernel.estimator=weight", "kernel.draws=2480", f"kernel.design={design}")
        manifest = read_manifest(RunStorage(str(finished(tmp_path / design, *sets))))
        peaks.append(manifest.projection["worker_bytes"])
    assert peaks[1] - peaks[0] == 3 * 8 * 310**2


def test_the_report_names_the_law(shared_run):
    place = shared_run(*SMALL, *RUNS["student"][0])
    page = (place / "report" / "index.html").read_text()
    assert "student, nu = 4, γ = 0.05 (relative per tensor)" in page
    attributes = json.loads((place / "kernel.zarr" / "zarr.json").read_text())["attributes"]
    assert (attributes["distribution"], attributes["nu"], attributes["gamma_scale"]) == ("student", 4, "relative")
