"""Kernels of which the draws saw nothing, or only in one block: an error of 0 is never stated for them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from nntk_dist import covariance_kernel, nonlocal_kernel
from tests.harness.grids import few_and_many
from tests.oracles import closed_forms

CALLS = {
    "activation": (nonlocal_kernel, {"estimator": "activation", "variance_reduction": "none"}),
    "weight": (nonlocal_kernel, {"estimator": "weight"}),
    "covariance": (covariance_kernel, {}),
}
FORMS = {"formed means": 1, "differences": 200}  # of the estimator `weight`, by the number of inputs


class Sign(nn.Module):
    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return torch.sign(a)


def sign_unit(num_inputs: int = 1) -> nn.Module:
    """f(x) = sign(w·x + 1) with w = 0."""
    linear = nn.Linear(num_inputs, 1).double()
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(1.0)
    return nn.Sequential(linear, Sign())


@pytest.mark.filterwarnings("ignore:nothing is known of the kernel", "ignore:the kernel is mostly noise")
@pytest.mark.parametrize("seeds", few_and_many(3, 12))
@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_an_entry_that_one_block_alone_changed_has_no_error_of_zero(estimator: str, seeds: range) -> None:
    x = torch.tensor([[0.5]], dtype=torch.float64)
    for seed in seeds:
        found = nonlocal_kernel(
            sign_unit(), x, gamma=0.45, draws=256, seed=seed, estimator=estimator, variance_reduction="none"
        )
        value, stderr = float(found.kernel), float(found.stderr)
        assert math.isnan(stderr) or stderr > 0
        assert math.isnan(stderr) == (abs(value) < 1e-12)


@pytest.mark.filterwarnings("ignore:nothing is known of the kernel")
def test_the_case_that_was_stated_as_exactly_zero() -> None:
    x = torch.tensor([[0.5]], dtype=torch.float64)
    row = np.array([[0.5, 1.0]])
    exact = closed_forms.nonlocal_kernel("sign", np.array([0.0, 1.0]), row, row, 0.45).item()
    assert exact == pytest.approx(8.51e-5, rel=1e-2)
    found = nonlocal_kernel(
        sign_unit(), x, gamma=0.45, draws=256, seed=2, estimator="activation", variance_reduction="none"
    )
    assert abs(float(found.unbiased)) < 1e-12
    assert float(found.plugin) > 0.0, "one block is to have seen the jump"
    assert math.isnan(float(found.stderr))
    assert math.isnan(found.relative_error)
    assert found.relative_error_bound == math.inf


@pytest.mark.filterwarnings("ignore:rtol 0.5 is not reached")
@pytest.mark.parametrize("num_inputs", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_with_nothing_resolved_no_accuracy_is_reached(name: str, num_inputs: int) -> None:
    kernel, options = CALLS[name]
    x = torch.full((2, num_inputs), 0.5 / num_inputs**0.5, dtype=torch.float64)
    found = kernel(sign_unit(num_inputs), x, gamma=1e-3, rtol=0.5, max_draws=512, **options)
    assert found.stderr.isnan().all()
    assert math.isnan(found.relative_error)
    assert found.relative_error_bound == math.inf
    assert found.reached is False
    assert found.draws == 512


def test_gradients_without_scatter_are_exact() -> None:
    """By gradients, no scatter means no error."""
    x = torch.tensor([[0.5]], dtype=torch.float64)
    found = nonlocal_kernel(nn.Linear(1, 1).double(), x, gamma=0.1, estimator="autodiff")
    assert float(found.kernel) == 1.25
    assert float(found.stderr) == found.relative_error == 0.0
