"""Batches that do not fit: halved until they do, remembered, reported; and the refusal if even one example does not.

Axes: none.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nntk_dist import NNTKError
from nntk_dist.runtime.memory import is_out_of_memory
from pipeline.job.task import Outcome
from pipeline.records.ledger import Ledger
from pipeline.runtime.fitting_batch import FittingBatch, remembered_batch
from pipeline.storage.run_storage import RunStorage
from tests.pipeline.tools import arrays, finished, nntk, run

# A network that accepts at most a given number of examples at a time, like a full device.
HUNGRY = """
import torch
from torch import nn


class Hungry(nn.Sequential):
    most = 10**9

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} examples")
        return super().forward(x)


def build(input_shape, num_outputs, most):
    model = Hungry(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, num_outputs))
    model.most = most
    return model
"""
SETS = ("data.train=61", "data.test=13", "compute.tile=32", "compute.dtype=float64")


@pytest.fixture
def hungry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Settings for a network that accepts at most a given number of examples."""
    (tmp_path / "hungry.py").write_text(HUNGRY)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda most: ("model.builder=python:hungry:build", f"model.args={{most: {most}}}")


def test_a_model_that_writes_to_its_input_leaves_the_data_as_they_are(tmp_path, monkeypatch):
    """Verification takes the fingerprint of the data before any pass, the plan after its probes."""
    (tmp_path / "writes.py").write_text(
        "from torch import nn\n\n\ndef build(input_shape, num_outputs):\n"
        "    return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, num_outputs))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run_dir = finished(tmp_path / "run", "model={builder: 'python:writes:build'}", "data.train=61", "data.test=13")
    assert nntk("verify", run_dir).code == 0


def fails_above(most: int, kind: type[Exception] = torch.OutOfMemoryError, text: str = "no memory"):
    sizes: list[int] = []

    def action(batch: int) -> int:
        sizes.append(batch)
        if batch > most:
            raise kind(text)
        return batch

    return action, sizes


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (MemoryError, ""),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
        (RuntimeError, "CUDA driver error: out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (RuntimeError, "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_a_batch_is_halved_until_it_fits_and_stays_so(kind, text):
    action, sizes = fails_above(13, kind, text)
    fitting = FittingBatch(64)
    assert fitting.numbers() == {}
    assert fitting.run(action) == 8
    assert sizes == [64, 32, 16, 8]
    assert fitting.run(action) == 8
    assert sizes[4:] == [8]
    assert fitting.numbers() == {"batch": 8.0}


def test_other_errors_are_nobodys_reason_to_halve():
    action, sizes = fails_above(0, RuntimeError, "shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        FittingBatch(4).run(action)
    assert sizes == [4]
    assert not is_out_of_memory(ValueError("out of memory"))


def test_one_example_that_does_not_fit_is_refused():
    action, _ = fails_above(0)
    with pytest.raises(NNTKError, match=r"one example at a time does not fit into memory \(no memory\); use fewer"):
        FittingBatch(4).run(action)


def test_what_an_allocation_of_torch_says_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def row(tile: str, **numbers: float) -> Outcome:
    return Outcome("features", tile, "w", 0.0, 1.0, 1, 1, None, 1, numbers)


def test_the_smallest_batch_that_tasks_came_to_counts():
    assert remembered_batch([], 64) == 64
    assert remembered_batch([row("a", batch=16.0), row("b"), row("c", batch=32.0)], 64) == 16


def batches_of(run_dir: Path) -> set[float | None]:
    return {row.numbers.get("batch") for row in Ledger(RunStorage(str(run_dir))).rows("features")}


def planned_batch(run_dir: Path) -> int:
    return json.loads((run_dir / "manifest.json").read_text())["layout"]["batch"]


@pytest.mark.process
def test_a_run_goes_on_with_batches_that_fit_also_when_continued(tmp_path, hungry):
    """From batches of 256 to 64, as the model accepts at most 70; the numbers equal those from a run with 64."""
    small = finished(tmp_path / "small", *SETS, *hungry(10**9), "compute.batch=64")
    assert batches_of(small) == {None}
    sets = (*SETS, *hungry(70), "compute.batch=256")
    halved = finished(tmp_path / "halved", *sets)
    assert batches_of(halved) == {64.0}
    assert planned_batch(halved) == 256
    kept, expected = arrays(halved), arrays(small)
    for name in ("train/gram", "train/gram_unbiased", "test/gram", "train/outputs"):
        assert np.array_equal(kept[name], expected[name]), name
    finished(halved, *sets, "regression.ridge=[0.5]", resume=True)
    assert planned_batch(halved) == 64
    finished(halved, *sets, "regression.ridge=[0.1]", resume=True)  # with the requested batch, as before
    assert nntk("verify", halved).code == 0
    refused = run(halved, *sets, "compute.batch=128", resume=True)
    assert refused.code == 2
    assert "laid out with compute.batch 64, the configuration says 128" in " ".join(refused.err.split())


def test_what_does_not_fit_while_planning_is_planned_smaller(tmp_path, hungry):
    sets = ("kernel.estimator=weight", "kernel.draws=64", "compute.batch=256")
    run_dir = finished(tmp_path / "run", *SETS, *hungry(70), *sets)
    assert planned_batch(run_dir) == 64
    assert batches_of(run_dir) == {None}
    assert nntk("verify", run_dir).code == 0
