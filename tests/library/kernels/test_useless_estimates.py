"""Kernels that are mostly noise: a warning that says what helps, and names no option that the function lacks."""

import inspect
import math
import warnings

import pytest
import torch
from torch import nn

from nntk_dist import NNTKWarning, averaged_kernel, covariance_kernel, nonlocal_kernel, prepare_kernel
from nntk_dist.spec import KernelSpec, useless_estimate

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))


def test_too_few_draws_are_warned_of() -> None:
    with pytest.warns(
        NNTKWarning, match=r"mostly noise: with 16 draws .* is (infinite|\d+ %); take more draws"
    ) as caught:
        found = nonlocal_kernel(network(), X, gamma=0.1, estimator="weight", draws=16)
    assert found.relative_error >= 0.5
    assert caught[0].filename == __file__
    assert "estimator auto" in str(caught[0].message)


def test_a_good_estimate_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NNTKWarning)
        assert nonlocal_kernel(network(), X, gamma=0.1).relative_error < 0.5
        assert math.isnan(nonlocal_kernel(network(), X, gamma=0.1, blocks=2, design="orthogonal").relative_error)


def test_a_prepared_kernel_warns_at_every_call() -> None:
    kernel = prepare_kernel(network(), X, gamma=0.1, estimator="weight", draws=16)
    for _ in range(2):
        with pytest.warns(NNTKWarning, match="mostly noise"):
            kernel(X)


def test_nothing_resolved_is_warned_of() -> None:
    class Sign(nn.Module):
        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return torch.sign(a)

    model = nn.Sequential(nn.Linear(3, 1), Sign())
    nn.init.ones_(model[0].bias)
    with pytest.warns(NNTKWarning, match="nothing is known of the kernel: with 256 draws .* larger gamma"):
        assert math.isnan(covariance_kernel(model, 0.1 * X, gamma=1e-4).relative_error)


@pytest.mark.parametrize("function", [nonlocal_kernel, covariance_kernel, averaged_kernel])
@pytest.mark.parametrize("error", [0.5, math.inf, math.nan])
def test_the_advice_can_be_followed(function, error) -> None:
    kind = function.__name__.removesuffix("_kernel")
    options = inspect.signature(function).parameters
    given = {"estimator": "weight"} if "estimator" in options else {}
    text = useless_estimate(KernelSpec(kind=kind, **given), error, 16)
    named = {name for name in ("draws", "rtol", "gamma", "estimator", "design", "sketch") if name in text.split()}
    assert "draws" in text
    assert named <= set(options)
    assert ("estimator" in named) == ("estimator" in options)


@pytest.mark.parametrize(
    "options",
    [
        {},  # auto has already taken the best one
        {"estimator": "weight", "weighting": "loss"},
        {"estimator": "weight", "distribution": "lowrank"},
    ],
)
def test_another_estimator_is_not_advised_if_there_is_none(options) -> None:
    assert "estimator" not in useless_estimate(KernelSpec(**options), 1.0, 16)


def test_a_requested_accuracy_has_its_own_verdict() -> None:
    assert useless_estimate(KernelSpec(rtol=0.7), 0.6, 16) == ""
