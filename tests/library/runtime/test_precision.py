"""Models are evaluated and differentiated in full float32 under any torch settings, which are restored afterwards."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from nntk_dist import NNTKRegressor, covariance_kernel, local_kernel, nonlocal_kernel
from nntk_dist.runtime.precision import full_precision, multiplying
from tests.pipeline.tools import finished

CUDNN = torch.backends.cudnn
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
FULL = ("highest", False, True)


def settings():
    return torch.get_float32_matmul_precision(), CUDNN.allow_tf32, CUDNN.deterministic


@pytest.fixture
def coarse():
    """TF32 allowed everywhere, as a user may have set it."""
    before = settings()
    torch.set_float32_matmul_precision("high")
    CUDNN.allow_tf32, CUDNN.deterministic = True, False
    yield settings()
    torch.set_float32_matmul_precision(before[0])
    CUDNN.allow_tf32, CUDNN.deterministic = before[1:]


class Noting(nn.Module):
    """Records the settings at every pass."""

    seen: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        self.seen.append(settings())
        return torch.tanh(self.layer(x.reshape(len(x), -1)[:, :3]))


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(Noting, "seen", [])
    return Noting.seen


@pytest.mark.parametrize(
    "compute",
    [
        lambda model: local_kernel(model, X),
        lambda model: nonlocal_kernel(model, X, gamma=0.1, draws=8, blocks=4),
        lambda model: nonlocal_kernel(model, X, gamma=0.1, draws=64, blocks=4, estimator="weight"),
        lambda model: covariance_kernel(model, X, gamma=0.1, draws=8, blocks=4),
        lambda model: (
            NNTKRegressor(model.double(), gamma=0.1, draws=8, blocks=4)
            .fit(np.asarray(X), np.zeros((6, 2)))
            .predict(np.asarray(X))
        ),
    ],
    ids=["local", "autodiff", "weight", "covariance", "regressor"],
)
def test_the_library_evaluates_at_full_precision(compute, coarse, seen):
    compute(Noting())
    assert set(seen) == {FULL}
    assert settings() == coarse


def test_a_run_evaluates_at_full_precision(tmp_path, coarse, seen):
    finished(tmp_path / "run", "model.builder=python:tests.library.runtime.test_precision:build", "model.args={}")
    assert set(seen) == {FULL}
    assert settings() == coarse


def build(input_shape, num_outputs):
    return Noting()


def test_a_precision_is_set_and_set_back():
    before = settings()
    with multiplying("medium"):
        assert settings() == ("medium", *before[1:])
        with full_precision():
            assert settings() == FULL
        assert settings() == ("medium", *before[1:])
    assert settings() == before


def by_backend():
    cuda: Any = torch.backends.cuda
    mkldnn: Any = torch.backends.mkldnn
    cudnn: Any = CUDNN
    backends = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return {backend: backend.fp32_precision for backend in backends}


MIXTURES = {
    "by backend": ("highest", ("tf32", "ieee", "tf32", "ieee", "bf16", "none")),
    "finer than the switch": ("high", ("ieee", "tf32", "tf32", "tf32", "none", "none")),
    "coarser than the switch": ("highest", ("tf32", "tf32", "tf32", "bf16", "bf16", "bf16")),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_settings_by_backend_are_overruled_and_put_back(mixture):
    before = by_backend()
    switch, values = MIXTURES[mixture]
    try:
        torch.set_float32_matmul_precision(switch)
        for backend, value in zip(before, values, strict=True):
            backend.fp32_precision = value
        asked = by_backend()
        with full_precision():
            assert set(by_backend().values()) == {"ieee"}
            assert settings() == FULL
        assert by_backend() == asked
        with multiplying("medium"):
            cuda, mkldnn = (by_backend()[backend.matmul] for backend in (torch.backends.cuda, torch.backends.mkldnn))
            assert (cuda, mkldnn) == ("tf32", "bf16")
        assert by_backend() == asked
    finally:
        torch.set_float32_matmul_precision("highest")
        CUDNN.allow_tf32 = True
        for backend, value in before.items():
            backend.fp32_precision = value
