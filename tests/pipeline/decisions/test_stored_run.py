"""Starting in a directory that holds a run: nothing to do, continue, repeat later stages, or a refusal that changes no
file.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

import pipeline.driver.run
import pipeline.work.stages
from pipeline.config.schema import config_from_dict
from pipeline.decisions.build import build_dataset, build_model
from pipeline.decisions.stored_run import stored_job
from pipeline.planning.plan import make_plan
from pipeline.records.manifest import read_manifest
from pipeline.storage.run_storage import RunStorage
from tests.pipeline.tools import assert_same_bits, finished, ledger, nntk, run, snapshot

KERNEL_STAGES = {"features", "calibration", "gram", "test"}


def started(run_dir):
    return {key: row["started"] for key, row in ledger(run_dir).items()}


def test_a_manifest_restores_an_equal_job(good_run):
    manifest = read_manifest(RunStorage(str(good_run)))
    config = config_from_dict(manifest.config)
    dataset = build_dataset(config)
    assert (
        stored_job(manifest) == make_plan(config, dataset, build_model(config, dataset), job=stored_job(manifest)).job
    )
    planned = make_plan(config, dataset, build_model(config, dataset)).job
    measured = {"stacked": planned.decision.stacked, "stacking": planned.decision.stacking}
    restored = stored_job(manifest)
    assert replace(restored, decision=replace(restored.decision, **measured)) == planned


def test_a_finished_run_is_left_alone(own_run):
    before = snapshot(own_run)
    for resume in (False, True):
        result = run(own_run, resume=resume)
        assert result.code == 0
        assert "nothing was done" in result.out
        assert "test accuracy" in result.out
    assert snapshot(own_run) == before


@pytest.mark.parametrize("change", ["name=other", "compute.workers=7", "compute.executor=ray", "report.plots=true"])
def test_names_places_and_workers_do_not_count(change, own_run):
    before = snapshot(own_run)
    result = run(own_run, change)
    assert (result.code, snapshot(own_run)) == (0, before)


@pytest.mark.parametrize(
    ("change", "stage", "table"),
    [("regression.ridge=[0.5, 0.25]", "regression", "regression"), ("spectrum.top_k=2", "spectrum", "eigenvectors")],
)
def test_a_changed_later_section_reruns_its_stage_alone(change, stage, table, own_run):
    before, rows = snapshot(own_run), started(own_run)
    refused = run(own_run, change)
    assert refused.code == 2
    assert f"resume=True) reruns only {stage}" in refused.err
    assert snapshot(own_run) == before

    assert run(own_run, change, resume=True).code == 0
    now = started(own_run)
    assert now.keys() == rows.keys()
    assert {key[0] for key in rows if now[key] != rows[key]} == {stage}
    changed = {path for path, content in snapshot(own_run).items() if before.get(path) != content}
    assert f"tables/{table}.parquet" in changed
    assert [path for path in changed if path.startswith("kernel.zarr") and not path.endswith("zarr.json")] == []
    assert "nothing was done" in run(own_run, change).out
    assert run(own_run).code == 2  # the first configuration now counts as changed


OTHERS = {
    "kernel.distribution.gamma=0.1": "kernel.distribution.gamma: 0.05 -> 0.1",
    "kernel.seed=1": "kernel.seed: 0 -> 1",
    "kernel.outputs=2": "kernel.outputs: 'trace' -> 2",
    "kernel.statistic=plugin": "kernel.statistic: 'both' -> 'plugin'",
    "data.train=150": "data.train: 149 -> 150",
    "data.seed=1": "data.seed: 0 -> 1",
    "data.normalize=false": "data.normalize: True -> False",
    "model.seed=1": "model.seed: 0 -> 1",
    "model.args.widths=[32]": "model.args.widths.1: 32 -> absent",
    "compute.dtype=float64": "compute.dtype: 'float32' -> 'float64'",
    "compute.tile=128": "compute.tile 64, the configuration says 128",
    "compute.batch=64": "compute.batch 256, the configuration says 64",
    "compute.threads=2": "compute.threads 1, the configuration says 2",
    "compute.stderr=sample": "compute.stderr entry, the configuration says sample",
}


@pytest.mark.parametrize(
    ("change", "difference", "resume"),
    [(change, difference, number % 2 == 0) for number, (change, difference) in enumerate(OTHERS.items())],
)
def test_another_kernel_is_refused_by_name(change, difference, resume, good_run):
    before = snapshot(good_run)
    result = run(good_run, change, resume=resume)
    assert result.code == 2
    assert difference in result.err
    assert "choose another run_dir" in result.err
    assert snapshot(good_run) == before


def test_data_that_changed_under_the_same_name(tmp_path):
    values = np.random.default_rng(0).standard_normal((60, 5))
    np.savez(tmp_path / "data.npz", x=values, y=values[:, 0])
    sets = (f"data.source=npz:{tmp_path / 'data.npz'}", "data.train=40", "data.test=20")
    run_dir = finished(tmp_path / "run", *sets)
    values[3, 3] += 1
    np.savez(tmp_path / "data.npz", x=values, y=values[:, 0])
    before = snapshot(run_dir)
    for result in (run(run_dir, *sets, resume=True), nntk("verify", run_dir)):
        assert result.code == 2
        assert "data." in result.err
        assert "holds another kernel" in result.err
    assert snapshot(run_dir) == before


@pytest.mark.parametrize(
    "stage",
    [
        "gram",
        *(pytest.param(each, marks=pytest.mark.process) for each in ("features", "test", "spectrum", "regression")),
    ],
)
def test_an_unfinished_run_goes_on_where_it_stopped(stage, good_run, tmp_path, monkeypatch):
    stage_class = pipeline.work.stages.STAGES.get(stage)
    execute, calls = stage_class.execute, []

    def interrupted(self, context, task):
        calls.append(task.tile)
        if len(calls) == (2 if stage in ("features", "gram", "test") else 1):
            raise KeyboardInterrupt
        return execute(self, context, task)

    monkeypatch.setattr(stage_class, "execute", interrupted)
    stopped = run(tmp_path / "run")
    assert stopped.code == 130
    assert re.search(r"continue with: \S+( -m pipeline)? run \S+ .*--resume", " ".join(stopped.err.split()))
    monkeypatch.undo()
    kept = started(tmp_path / "run")

    refused = run(tmp_path / "run")
    assert refused.code == 2
    assert "to continue it, add --resume" in refused.err
    assert nntk("report", tmp_path / "run").code == 2
    assert "stopped" in nntk("status", tmp_path / "run").out

    finished(tmp_path / "run", resume=True)
    now = started(tmp_path / "run")
    assert kept == {key: now[key] for key in kept}
    assert_same_bits(good_run, tmp_path / "run")


def test_results_without_a_manifest_are_not_taken_over(own_run):
    (own_run / "manifest.json").unlink()
    before = snapshot(own_run)
    for change in ("name=same", "kernel.seed=1"):
        result = run(own_run, change, resume=True)
        assert result.code == 2
        assert "no manifest.json that describes them" in result.err
    assert snapshot(own_run) == before


def test_a_driver_that_was_overtaken_gives_up(own_run, monkeypatch):
    """It plans before another driver takes the directory, and locks after that."""
    prepare = pipeline.driver.run.prepare

    def overtaken(config, *, resume):
        prepared = prepare(config, resume=resume)
        manifest = own_run / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"name": "small"', '"name": "another"'))
        return prepared

    monkeypatch.setattr("pipeline.driver.run.prepare", overtaken)
    before = snapshot(own_run / "kernel.zarr")
    result = run(own_run, "spectrum.top_k=2", resume=True)
    assert result.code == 2
    assert "was written by another driver just now" in result.err
    assert snapshot(own_run / "kernel.zarr") == before
    assert {stage for stage, _ in ledger(own_run)} > KERNEL_STAGES


def test_a_changed_report_is_written_again_on_resume_and_nothing_else(own_run):
    page = own_run / "report/index.html"
    before, rows = page.read_bytes(), ledger(own_run)
    result = run(own_run, "report.plots=true", resume=True)
    assert result.code == 0
    assert "nothing was done" not in result.out
    assert page.read_bytes() != before
    assert ledger(own_run) == rows
