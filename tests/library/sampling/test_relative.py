"""Ranges relative to each tensor's size: the scales themselves, kernels by definition and by closed forms.

With z = D·u the model is h(φ) = f(D·φ) at φ = D⁻¹θ, perturbed by u; its nonlocal gradient is D·g.

Axes: s draws, n examples, P parameters.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import NNTKError, averaged_kernel, covariance_kernel, nonlocal_kernel
from nntk_dist.models.parameters import select_parameters
from nntk_dist.spec import KernelSpec
from tests.harness.tools import assert_equal
from tests.oracles import brute_force, closed_forms, radial
from tests.oracles.cases import UNIT_ACTIVATIONS, case
from tests.oracles.statistics import assert_agrees, assert_power


class TwoTensors(nn.Module):
    """φ(a·x + b·y), tensors of very different sizes."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.activation = UNIT_ACTIVATIONS[unit]
        self.a = nn.Parameter(torch.tensor([0.9, -0.5], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.05], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x @ torch.cat([self.a, self.b]))


def scales(model: nn.Module) -> np.ndarray:
    return np.concatenate([np.full(p.numel(), float(p.detach().square().mean().sqrt())) for p in model.parameters()])


X = torch.tensor([[0.5, 0.4, 4.0], [-0.3, 1.0, 6.0], [0.6, 0.9, -3.0]], dtype=torch.float64)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("unit", "estimator", "distribution"),
    [
        ("sign", "weight", "gaussian"),
        ("sign", "weight", "sphere"),
        ("relu", "weight", "gaussian"),
        ("relu", "weight", "sphere"),
        ("relu", "autodiff", "gaussian"),
    ],
)
def test_unit_against_its_rescaled_self(unit, estimator, distribution):
    model, gamma = TwoTensors(unit), 1.2
    d = scales(model)
    theta, x = torch.cat([model.a, model.b]).detach().numpy() / d, X.numpy() * d
    if distribution == "gaussian":
        stretched = closed_forms.nonlocal_gradient(unit, theta, x, gamma)
    else:
        stretched = radial.nonlocal_gradient(unit, theta, x, radial.radius_law(distribution, gamma, 3))
    gradients = stretched / d
    exact = gradients @ gradients.T
    options = {"gamma": gamma, "distribution": distribution, "gamma_scale": "relative", "estimator": estimator}
    draws, blocks = (1 << 20, 32) if estimator == "weight" else (8192, 32)
    one = nonlocal_kernel(model, X, draws=draws, blocks=blocks, **options)
    assert_agrees(one.unbiased, exact, one.stderr, blocks)
    local = closed_forms.local_kernel(unit, theta * d, X.numpy(), X.numpy())
    assert_power(one.stderr, exact, local)


@pytest.mark.parametrize(
    ("estimator", "design"),
    [
        ("weight", "iid"),
        ("weight", "orthogonal"),
        ("autodiff", "antithetic"),
        pytest.param("weight", "antithetic", marks=pytest.mark.statistical),
        pytest.param("autodiff", "iid", marks=pytest.mark.statistical),
        pytest.param("autodiff", "orthogonal", marks=pytest.mark.statistical),
    ],
)
def test_kernel_is_its_definition(estimator, design):
    """weight: P·Δ·D⁻¹u/|u|²; autodiff: the gradient at θ + U^{1/P} D u, without any factor."""
    model, x = case("relu_mlp").build(), case("relu_mlp").inputs(3)
    spec = KernelSpec(gamma=0.7, gamma_scale="relative", estimator=estimator, design=design, draws=16, blocks=4)
    drawing = spec.drawing(estimator, select_parameters(model), model)
    z = drawing.perturbations(range(16), dtype=torch.float64)
    absolute = KernelSpec(gamma=0.7, design=design, draws=16, blocks=4)
    d, u = scales(model), absolute.drawing(estimator, select_parameters(model), model)
    assert_equal(z, u.perturbations(range(16), dtype=torch.float64).numpy() * d, 1e-13)
    if estimator == "weight":
        function, theta = brute_force.function_of_parameters(model, x)
        each = []
        for one in z.numpy():
            change = function(theta + one) - function(theta)
            each.append(len(d) * change[:, :, None] * (one / d**2) / np.sum((one / d) ** 2))
        stacked = np.stack(each)
    else:
        stacked = brute_force.gradient_draws(model, x, (z * drawing.shrinkage(range(16))[:, None]).numpy())
    means = brute_force.block_means(stacked, np.arange(16) // 4)
    ours = nonlocal_kernel(model, x, gamma=0.7, gamma_scale="relative", estimator=estimator, design=design, draws=16,
                           blocks=4, statistic="both")  # fmt: skip
    assert_equal(ours.unbiased, brute_force.unbiased(brute_force.block_products(means, means)))
    assert_equal(ours.plugin, brute_force.plugin(means, means))
    assert not np.allclose(ours.plugin, nonlocal_kernel(model, x, gamma=0.7, estimator=estimator, design=design,
                                                        draws=16, blocks=4, statistic="both").plugin)  # fmt: skip


def test_averaged_kernel_has_no_factor_either():
    model, x = case("relu_mlp").build(), case("relu_mlp").inputs(3)
    spec = KernelSpec(kind="averaged", gamma=0.7, gamma_scale="relative", draws=8, blocks=4)
    drawing = spec.drawing("autodiff", select_parameters(model), model)
    z = drawing.perturbations(range(8), dtype=torch.float64) * drawing.shrinkage(range(8))[:, None]
    draws = brute_force.gradient_draws(model, x, z.numpy())
    expected = np.mean([brute_force.kernel_of(one, one) for one in draws], axis=0)
    ours = averaged_kernel(model, x, gamma=0.7, gamma_scale="relative", draws=8, blocks=4)
    assert_equal(ours.kernel, expected)


def test_scales_are_root_mean_squares_and_a_zero_tensor_takes_its_weights():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([1.0, -7.0]))
        model[1].weight.fill_(-2.0)
    found = select_parameters(model).scales(model)
    np.testing.assert_allclose(found, [np.sqrt(25 / 6), 5.0, 2.0, 2.0], rtol=1e-15)
    only_bias = select_parameters(model, ["1.bias"]).scales(model)  # the weight need not be selected
    np.testing.assert_allclose(only_bias, [2.0], rtol=1e-15)


def test_a_tensor_without_a_scale_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).double()
    nn.init.zeros_(model[1].weight)
    for patterns, name in ((("*",), "1.weight"), (("1.bias",), "1.bias")):
        with pytest.raises(NNTKError, match=rf"'relative', but parameter '{name}' is zero .* gamma_scale: absolute"):
            nonlocal_kernel(model, X, gamma=0.1, gamma_scale="relative", parameters=patterns)
    root = TwoTensors("relu")
    nn.init.zeros_(root.b)
    with pytest.raises(NNTKError, match="parameter 'b' is zero and its module has no other weight"):
        nonlocal_kernel(root, X, gamma=0.1, gamma_scale="relative")


def test_what_has_no_meaning_is_refused():
    with pytest.raises(NNTKError, match=r"gamma_scale is 'relative'; allowed for kind covariance: absolute"):
        covariance_kernel(TwoTensors("relu"), X, gamma=0.1, gamma_scale="relative")
    with pytest.raises(NNTKError, match=r"gamma_scale is 'relativ'; allowed: absolute, relative; did you mean"):
        nonlocal_kernel(TwoTensors("relu"), X, gamma=0.1, gamma_scale="relativ")
