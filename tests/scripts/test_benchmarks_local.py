"""The benchmarks of the local kernel: their arithmetic and protocol on small sizes, with a peer written here.

Axes: n examples.
"""

import os
import sys
from dataclasses import replace

import pytest
import torch

from nntk_dist import NNTKError, local_kernel
from scripts.benchmarks import SECTIONS, local, peers
from scripts.benchmarks.local import LOCAL, QUICK
from tests.harness.tools import assert_equal

# Answers like the peer: the kernel of the problem's network times a factor that makes it wrong or right.
PEER = """
import sys
from pathlib import Path
import numpy as np
folder, factor = Path(sys.argv[2]), float(sys.argv[1])
p = np.load(folder / "problem.npz")
h, inputs, masks = p["x"].astype(float), [], []
count = sum(name.startswith("weight_") for name in p)
for l in range(count):
    inputs.append(np.hstack([h, np.ones((len(h), 1))]))
    a = h @ p[f"weight_{l}"].T + p[f"bias_{l}"]
    masks.append(np.ones_like(a) if l == count - 1 else a > 0)
    h = a * masks[-1]
delta = np.broadcast_to(np.eye(h.shape[1]), (len(h), h.shape[1], h.shape[1]))
kernel = np.zeros((len(h), len(h)))
for l in reversed(range(count)):
    delta = delta * masks[l][:, None]
    kernel += (inputs[l] @ inputs[l].T) * np.einsum("nco,mco->nm", delta, delta)
    delta = delta @ p[f"weight_{l}"]
np.save(folder / "kernel.npy", factor * kernel)
for _ in sys.stdin:
    print("done", flush=True)
"""


@pytest.mark.bench
def test_every_question_is_answered_by_ratios_of_the_same_kernel():
    cells = {cell.key: cell for cell in local.cells(quick=True)}
    assert set(cells) == {f"{name}, 1 threads" for name in ("local", "nonlocal", "crossover", "sketch")}
    for cell in cells.values():
        figures = cell.compute()["figures"]
        assert figures
        assert all(figure["value"] > 0 for figure in figures)
    recipe, _ = cells["local, 1 threads"].compute()["figures"]
    assert recipe["details"]["relative difference"] < 1e-5
    assert recipe["least"] == 50.0


def test_what_is_prepared_is_the_public_kernel():
    model, x = local.problem(QUICK, 20)
    _, compute = local.prepared(model, x, LOCAL)
    assert_equal(compute().float(), local_kernel(model, x), 1e-5)


def test_the_recipe_takes_what_fits(monkeypatch):
    model, _ = local.problem(QUICK, 4)
    numbers = 10 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(local.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 24 * numbers * 40}))
    assert local.num_fitting(model, 512) == 32
    assert local.num_fitting(model, 8) == 8


@pytest.mark.bench
def test_a_peer_answers_for_the_same_kernel_and_another_is_refused():
    command = (sys.executable, "-c", PEER)
    prepared, products, whole = peers.compare(QUICK, 12, 1, (*command, "1"))["figures"]
    assert prepared["details"]["relative difference"] < 1e-5
    assert products["value"] > whole["value"] > 0
    assert prepared["value"] > whole["value"]
    with pytest.raises(NNTKError, match=r"the peer's kernel differs from ours by 1; allowed: 1e-4"):
        peers.compare(QUICK, 12, 1, (*command, "2"))
    with pytest.raises(NNTKError, match=r"the peer has ended: .*no peer; remove"):
        peers.compare(QUICK, 12, 1, (sys.executable, "-c", "import sys; sys.exit('no peer')"))


def test_a_measurement_holds_its_processors_and_lets_them_go():
    before = os.sched_getaffinity(0)
    with peers.on_processors(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_peers_are_not_for_quick_runs_and_say_what_they_need(monkeypatch, tmp_path):
    assert peers.cells(quick=True) == []
    assert len(SECTIONS["peers"](quick=False)) == 6
    monkeypatch.setattr(peers, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(peers.venv, "create", lambda *_, **__: None)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    with pytest.raises(NNTKError, match=r"neural-tangents==0\.6\.5, jax==0\.4\.23\) cannot be installed .*no network"):
        peers.peer_python()
    (tmp_path / "complete").touch()
    assert peers.peer_python() == tmp_path / "bin" / "python"


def test_whole_effort_is_what_the_page_speaks_of():
    assert (local.FULL.num_inputs, local.FULL.widths, local.FULL.num_examples) == (784, (512, 512), 512)
    model, x = local.problem(replace(local.FULL, widths=(8,)), 3)
    assert model(x).shape == torch.Size([3, 10])
