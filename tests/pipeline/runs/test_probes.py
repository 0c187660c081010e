"""Probes through the pipeline: in the manifest, with the plan, on the page, and kept by a resumed run."""

import json

import pytest

from tests.pipeline.tools import arguments, assert_same_bits, finished, nntk, run

COVARIANCE = ("kernel.kind=covariance", "kernel.draws=16")


def stored(run_dir):
    return json.loads((run_dir / "manifest.json").read_text())


def rewrite(run_dir, change):
    document = stored(run_dir)
    change(document)
    (run_dir / "manifest.json").write_text(json.dumps(document))


def test_a_run_keeps_its_probes(good_run):
    probes = stored(good_run)["decision"]["probes"]
    assert probes["repeat_change"] == 0
    assert 0 <= probes["batch_change"] < 1e-5
    assert 0 < probes["jump_residual"] <= 0.01
    assert 1e-8 < probes["noise_size"] / probes["change_size"] < 1e-5
    assert (probes["noise_measured"], probes["training_modules"], probes["cautions"]) == (True, [], [])


@pytest.mark.process
def test_a_plan_and_a_page_show_them(good_run, tmp_path):
    text = " ".join(nntk(*arguments("plan", tmp_path / "run")).out.split())
    page = (good_run / "report/index.html").read_text()
    for label in ("Same again", "Other batch", "Jumps in θ", "Noise floor", "Training mode"):
        assert f"probe {label[:1].lower()}{label[1:]}: " in text
        assert f"<td>{label}<" in page
    assert "probe same again: change 0; deterministic" in text
    assert "caution" not in text


def test_noise_is_cautioned_of_before_a_run_and_on_its_page(tmp_path):
    sets = (*COVARIANCE, "kernel.distribution.gamma=1e-7")
    words = "ounding in float32 on cpu is"
    assert f"caution: r{words}" in nntk(*arguments("plan", tmp_path / "run", *sets)).out
    result = run(tmp_path / "run", *sets)
    assert result.code == 0
    assert f"caution: r{words}" in result.out
    assert f"<p>R{words}" in (tmp_path / "run/report/index.html").read_text()


@pytest.mark.process
def test_a_stopped_run_goes_on_with_its_probes(good_run, tmp_path, monkeypatch):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.work.stages.gram.Gram.execute", stop)
    assert run(tmp_path / "run").code == 130
    monkeypatch.undo()
    before = stored(tmp_path / "run")["decision"]
    monkeypatch.setattr("pipeline.planning.plan.decide", stop)  # nothing is probed again
    finished(tmp_path / "run", resume=True)
    assert stored(tmp_path / "run")["decision"] == before == stored(good_run)["decision"]
    assert_same_bits(good_run, tmp_path / "run")


@pytest.mark.parametrize("damage", [{}, {"unheard": "of"}, 5])
def test_probes_that_are_not_whole_are_named(damage, own_run):
    rewrite(own_run, lambda document: document["decision"].update(probes=damage))
    for result in (nntk("status", own_run), run(own_run, resume=True), nntk("report", own_run)):
        assert result.code == 2
        assert "manifest.json is broken at decision.probes" in result.err
