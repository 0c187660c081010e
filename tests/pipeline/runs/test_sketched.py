"""A run with sketched gradients, from the plan to verification: what it reports, stores, resumes and checks."""

import json
from typing import Any

import numpy as np
import pytest

import pipeline.work.stages
from nntk_dist.planning.decision import Decision
from tests.pipeline.tools import arrays, assert_same_bits, finished, nntk, run

SETS = ("data.train=31", "data.test=11", "compute.tile=16", "kernel.contraction=sketch", "kernel.sketch=64")


@pytest.mark.process
@pytest.mark.parametrize(("kind", "blocks", "unbiased"), [("nonlocal", 8, "_unbiased"), ("local", 1, "")])
def test_a_sketched_run_is_planned_resumed_and_verified(kind, blocks, unbiased, tmp_path, monkeypatch):
    sets = (*SETS, f"kernel.kind={kind}")
    whole = finished(tmp_path / "whole", *sets)
    stored = arrays(whole)
    assert stored["train/features"].shape == (31, blocks, 64)
    assert np.array_equal(stored["metric"], np.full((blocks, blocks), blocks**-2))
    manifest = json.loads((whole / "manifest.json").read_text())
    decision = Decision.from_plain(manifest["decision"])
    plan: Any = decision.plan
    assert plan.contraction.num_columns == 64
    assert plan.contraction.sketched.names() == set(decision.space.names)
    assert "sketch (k = 64): " in decision.contraction
    # The sketch's own error, √(2/64) or more of a diagonal entry, is in the error bars.
    relative = stored["train/gram_stderr"].diagonal() / stored[f"train/gram{unbiased}"].diagonal()
    assert 0.05 < np.median(relative) < 0.4

    stage_class = pipeline.work.stages.STAGES.get("gram")
    execute, calls = stage_class.execute, []

    def interrupted(self, context, task):
        calls.append(task.tile)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return execute(self, context, task)

    monkeypatch.setattr(stage_class, "execute", interrupted)
    assert run(tmp_path / "resumed", *sets).code == 130
    monkeypatch.undo()
    assert_same_bits(whole, finished(tmp_path / "resumed", *sets, resume=True))
    assert nntk("verify", whole).code == 0
    assert f"8 independent {'groups of' if kind == 'local' else 'blocks of draws'}" in (
        whole / "report/index.html"
    ).read_text().replace("&#39;", "'")


@pytest.mark.process
@pytest.mark.parametrize(("kind", "draws", "products"), [("nonlocal", 8, 8 + 1 + 8), ("local", 1, 1)])
def test_the_projection_counts_the_sketch(kind, draws, products, tmp_path):
    run_dir = finished(tmp_path / "run", *SETS, f"kernel.kind={kind}")
    stored, projection = arrays(run_dir), json.loads((run_dir / "manifest.json").read_text())["projection"]
    assert projection["disk_bytes"]["features"] == sum(
        stored[f"{split}/features"].nbytes for split in ("train", "test")
    )
    entries = 31 * (31 + 16) / 2  # tiles up to the diagonal; products are of blocks, their mean, and groups
    assert projection["operations"]["gram"] == 2 * products * 64 * entries  # all outputs share the columns
    widths = ((64, 32), (32, 32), (32, 10))
    passes = 3 * sum(i * o for i, o in widths)  # forwards and backwards, at least
    # both sides of every weight, δ for every output; in the layer before the readout, the outputs share δ
    projections = 64 * sum(i + (o if (i, o) == (32, 32) else 10 * o) for i, o in widths)
    assert projection["operations"]["features"] > 2 * (31 + 11) * draws * (passes + projections)
    assert projection["operations"]["features"] < 10 * 2 * (31 + 11) * draws * (passes + projections)
