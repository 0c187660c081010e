"""Weighted kernels through the pipeline: the library's numbers from training rows alone, for every way to run; the
weighting in the store, the plan and the page; and refusals.
"""

import json
import re
import sys
import textwrap

import numpy as np
import pytest
import ray
import torch

import nntk_dist.estimators.weight
import pipeline.decisions.layout
import pipeline.work.stages
from nntk_dist import nonlocal_kernel
from nntk_dist.models.evaluation import prepare_model
from pipeline.config.schema import config_from_dict, load_config
from pipeline.decisions.build import build_dataset, build_model, build_spec
from pipeline.decisions.stored_run import stored_job
from pipeline.decisions.weighting_reference import reference_batch, reference_rows
from pipeline.records.manifest import read_manifest
from pipeline.storage.run_storage import RunStorage
from tests.harness.grids import all_but
from tests.pipeline.tools import arguments, arrays, assert_same_bits, config_file, finished, nntk, run, snapshot

SMALL = (
    "data.train=29", "data.test=11", "compute.tile=16", "model.args={widths: [4]}", "compute.dtype=float64",
    "kernel.draws=64", "kernel.distribution.gamma=0.3",
)  # fmt: skip
WEIGHTINGS = {
    "parameter": "{name: parameter, temperature: 0.05, dimension: 3}",
    "output": "{name: output, temperature: 0.2, reference: 7}",
    "output, own": "{name: output, temperature: 0.2, per_example: true, reference: 7}",
    "loss": "{name: loss, temperature: 0.1}",
    "function": "{name: 'python:weighting_scores:nearness', temperature: 0.5, per_example: true, reference: 7}",
}
MODULE = """
    from torch import nn

    def narrow():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def nearness(theta, moved, base, outputs):
        return -(outputs - base).abs().sum(2)

    def wrong(theta, moved, base, outputs):
        return base
"""


@pytest.fixture(autouse=True)
def scores(tmp_path, monkeypatch):
    """A module of scores on the import path, like the folder of a configuration."""
    (tmp_path / "weighting_scores.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("weighting_scores", None)


def weighted(name: str) -> tuple[str, ...]:
    return (*SMALL, f"kernel.weighting={WEIGHTINGS[name]}")


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("parameter", False),
        ("loss", True),
        *(
            pytest.param(name, means, marks=pytest.mark.process)
            for name, means in [
                ("parameter", True),
                ("output", False),
                ("output, own", True),
                ("output, own", False),
                ("loss", False),
                ("function", False),
                ("function", True),
            ]
        ),
    ],
)
def test_runs_give_the_librarys_numbers(name, means, tmp_path, monkeypatch):
    sets = weighted(name)
    if means:  # explicit block means of gradients
        monkeypatch.setattr(nntk_dist.estimators.weight, "METRIC_DRAWS", 0)
        sets = (*sets, "kernel.blocks=4", "kernel.parameters=['*.bias']", "model.args={widths: [2]}")
    place = finished(tmp_path / "run", *sets)
    stored = arrays(place)
    assert ("train/features/dense" in stored) == means
    config = config_from_dict(read_manifest(RunStorage(str(place))).config)
    dataset, spec = build_dataset(config), build_spec(config.kernel)
    model = prepare_model(build_model(config, dataset), dtype=torch.float64, device="cpu")
    x1, x2 = (torch.from_numpy(split.inputs).double() for split in (dataset.train, dataset.test))
    reference = reference_batch(spec, dataset, torch.float64, "cpu")
    given = {} if reference is None else {"reference": reference.inputs, "targets": reference.targets}
    section = {key: value for key, value in config.kernel.weighting.model_dump().items() if key != "reference"}
    options = {"gamma": 0.3, "draws": 64, "blocks": spec.blocks, "parameters": spec.parameters, "statistic": "both"}
    options["batch"] = pipeline.decisions.layout.choose_batch(config, model, x1, len(x1))
    for split, inputs in (("train", (x1,)), ("test", (x2, x1))):
        estimate = nonlocal_kernel(model, *inputs, weighting=section | given, **options)
        largest = float(estimate.plugin.abs().max())
        for suffix, values in (("", estimate.plugin), ("_unbiased", estimate.unbiased), ("_stderr", estimate.stderr)):
            found = stored[f"{split}/gram{suffix}"]
            np.testing.assert_allclose(found, values, rtol=0, atol=1e-10 * largest, err_msg=f"{split}{suffix}")
    fixed = nonlocal_kernel(model, x1, estimator="weight", **options)
    assert not np.allclose(stored["train/gram"], fixed.plugin, rtol=1e-3)


@pytest.fixture(scope="module")
def two_cpus():
    """One Ray for the tests of this file."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.process
def test_ray_gives_the_bits_of_a_serial_run(tmp_path, two_cpus):
    """Workers rebuild the reference batch and its targets."""
    serial = finished(tmp_path / "serial", *weighted("loss"))
    on_ray = finished(tmp_path / "ray", *weighted("loss"), "compute.executor=ray", "compute.workers=2")
    assert_same_bits(serial, on_ray)


@pytest.mark.process
@pytest.mark.parametrize("name", ["loss", "output, own"])
def test_tiles_change_rounding_at_most(name, tmp_path):
    """A row's weights do not depend on tiles: features are the same bit for bit."""
    serial = finished(tmp_path / "serial", *weighted(name))
    wide = arrays(finished(tmp_path / "wide", *weighted(name), "compute.tile=64"))
    for path, values in arrays(serial).items():
        if "gram" in path or "diagonal" in path:
            np.testing.assert_allclose(wide[path], values, rtol=0, atol=1e-12 * np.abs(wide["train/gram"]).max())
        else:
            assert wide[path].tobytes() == values.tobytes(), path


@pytest.mark.process
@pytest.mark.parametrize("stage", ["features", "gram"])
def test_a_stopped_run_goes_on_with_the_same_bits(stage, tmp_path, monkeypatch):
    whole = finished(tmp_path / "whole", *weighted("loss"), "kernel.draws=128")
    stage_class = pipeline.work.stages.STAGES.get(stage)
    execute, calls = stage_class.execute, []

    def interrupted(self, context, task):
        calls.append(task.tile)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return execute(self, context, task)

    monkeypatch.setattr(stage_class, "execute", interrupted)
    assert run(tmp_path / "run", *weighted("loss"), "kernel.draws=128").code == 130
    monkeypatch.undo()
    assert_same_bits(whole, finished(tmp_path / "run", *weighted("loss"), "kernel.draws=128", resume=True))


@pytest.mark.process
def test_a_finished_run_is_recognised_verified_and_another_weighting_refused(tmp_path):
    """The manifest can also store infinity."""
    sets = (*SMALL, "kernel.weighting={name: loss, temperature: .inf}")
    place = finished(tmp_path / "run", *sets)
    before = snapshot(place)
    assert "nothing was done" in run(place, *sets, resume=True).out
    assert nntk("verify", place, "--recompute", 100).code == 0
    assert stored_job(read_manifest(RunStorage(str(place)))).spec.weighting.tau == float("inf")
    refused = run(place, *weighted("loss"), resume=True)
    assert refused.code == 2
    assert "kernel.weighting.temperature: None -> 0.1" in refused.err
    assert snapshot(place) == before
    fixed = arrays(finished(tmp_path / "fixed", *SMALL, "kernel.estimator=weight"))
    assert arrays(place)["train/features"].tobytes() == fixed["train/features"].tobytes()
    assert arrays(place)["train/gram"].tobytes() == fixed["train/gram"].tobytes()


def test_a_score_that_was_rewritten_is_another_kernel(tmp_path):
    place = finished(tmp_path / "run", *weighted("function"))
    assert "nothing was done" in run(place, *weighted("function")).out
    (tmp_path / "weighting_scores.py").write_text(textwrap.dedent(MODULE.replace(".abs()", ".square()")))
    sys.modules.pop("weighting_scores")
    before = snapshot(place)
    result = run(place, *weighted("function"), resume=True)
    assert result.code == 2
    assert (
        "the code of python:weighting_scores:nearness has changed since: the weighting gives other scores" in result.err
    )
    assert snapshot(place) == before


def test_the_reference_batch_is_a_seeded_choice_of_training_rows(tmp_path):
    config = load_config(config_file(tmp_path / "run"), weighted("output"))
    dataset, spec = build_dataset(config), build_spec(config.kernel)
    rows = reference_rows(spec, 29)
    assert len(rows) == 7
    assert (np.diff(rows) > 0).all()
    assert rows[-1] < 29
    assert not np.array_equal(rows, np.arange(7))
    batch = reference_batch(spec, dataset, torch.float32, "cpu")
    assert np.array_equal(batch.inputs.numpy(), dataset.train.inputs[rows])
    assert np.array_equal(batch.targets.numpy(), dataset.train.targets[rows])
    other = build_spec(config.kernel.model_copy(update={"seed": 1}))
    assert not np.array_equal(reference_rows(other, 29), rows)
    assert np.array_equal(reference_rows(spec, 5), np.arange(5))  # no more than exist
    config = load_config(config_file(tmp_path / "run"), weighted("parameter"))
    assert reference_batch(build_spec(config.kernel), dataset, torch.float32, "cpu") is None


@pytest.mark.parametrize("name", all_but(["loss"], {name: name for name in WEIGHTINGS}, pytest.mark.process))
def test_store_plan_and_page_name_the_weighting(name, tmp_path):
    label = name.partition(",")[0] if name != "function" else "python:weighting_scores:nearness"
    place = finished(tmp_path / "run", *weighted(name))
    attributes = json.loads((place / "kernel.zarr" / "zarr.json").read_text())["attributes"]
    section = {key: value for key, value in attributes.items() if key.startswith("weighting")}
    expected = {"weighting": label, "weighting_per_example": "own" in name or name == "function"}
    expected["weighting_temperature"] = {"parameter": 0.05, "loss": 0.1, "function": 0.5}.get(name, 0.2)
    expected["weighting_reference"] = {"parameter": 0, "loss": 29}.get(name, 7)
    assert section == expected | ({"weighting_dimension": 3} if name == "parameter" else {})
    page = " ".join(re.sub(r"<[^>]*>", " ", (place / "report" / "index.html").read_text()).split())
    assert f"Weighting softmax of the score {label}" in page
    assert "a ratio estimator: consistent, but not unbiased" in page
    assert ("7 reference examples" in page) == (expected["weighting_reference"] == 7)
    plan = nntk(*arguments("plan", tmp_path / "other", *weighted(name)))
    assert f"draws weighted by softmax of the score {label}" in plan.out
    assert "a ratio estimator, consistent but not unbiased" in plan.out


def test_a_run_without_weights_says_fixed(good_run):
    attributes = json.loads((good_run / "kernel.zarr" / "zarr.json").read_text())["attributes"]
    assert {key: value for key, value in attributes.items() if "weighting" in key} == {"weighting": "fixed"}
    assert "Weighting" not in (good_run / "report" / "index.html").read_text()


@pytest.mark.process
def test_the_plan_counts_the_passes_over_the_reference_batch(tmp_path):
    """64 draws and θ itself; two operations a weight, example and pass; of the score parameter, w and its products."""
    counted = {}
    for weighting in ("fixed", *WEIGHTINGS):
        sets = (*SMALL, "kernel.estimator=weight") if weighting == "fixed" else weighted(weighting)
        counted[weighting] = read_manifest(RunStorage(str(finished(tmp_path / weighting, *sets)))).projection
    plain = counted.pop("fixed")
    more = {name: each["operations"]["features"] - plain["operations"]["features"] for name, each in counted.items()}
    one_pass = 2 * (64 * 4 + 4 * 10)
    assert more["output"] == 65 * 7 * one_pass
    assert more["loss"] == 65 * 29 * one_pass
    assert more["output, own"] == more["function"] == 7 * one_pass
    assert more["parameter"] == 2 * 310 * (64 + 2 * 3)
    assert all(each["worker_bytes"] > plain["worker_bytes"] for each in counted.values())


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ("kernel.weighting.name=outputs",),
            r"kernel.weighting is 'outputs'.*allowed: fixed, parameter, output, loss,",
        ),
        (
            ("kernel.weighting={name: output, temperature: 0}",),
            r"kernel.weighting.temperature is 0; .* above 0, or .inf or",
        ),
        (("kernel.weighting={name: loss, per_example: true}",), r"kernel.weighting.per_example is True; .* loss: Fals"),
        (("kernel.weighting={per_example: true}",), r"kernel.weighting.per_example is True; allowed for weighting fix"),
        (("kernel.weighting={name: output, reference: 0}",), r"kernel.weighting.reference is 0; allowed: a whole numb"),
        (("kernel.weighting={name: output, dimensions: 3}",), r"unknown key kernel.weighting.dimensions; .*'dimension"),
        (("kernel={kind: averaged, weighting: {name: output}}",), r"kernel.weighting is 'output'; allowed for kind av"),
        (("kernel={estimator: autodiff, weighting: {name: output}}",), r"kernel.estimator is 'autodiff'; .*auto, weig"),
        (("kernel.weighting.name=output", "kernel.contraction=means"), r"contraction is 'means', but .* weight \(only"),
        (("kernel.weighting.name=python:weighting_scores:none",), r"'weighting_scores' has no 'none'"),
        (("kernel.weighting.name=python:weighting_scores:wrong",), r"the score python:.* returned a tensor of shape"),
        (
            ("model.builder=python:weighting_scores:narrow", "model.args={}", "kernel.weighting.name=loss"),
            r"weighting.targets are labels from 0 to 9, and the model has 3 outputs; allowed: 0 to 2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_weighted_is_refused_in_one_line(sets, message, tmp_path):
    result = run(tmp_path / "run", *SMALL, *sets)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert re.search(message, result.err), result.err
    assert not (tmp_path / "run").exists()
