"""Two-layer networks, rounded weights and sampling: against each other, closed forms and finite differences.

Axes: n examples, P parameters.
"""

import numpy as np
import pytest
import torch

from tests.oracles import closed_forms, quantised, radial, sampling, two_layer
from tests.oracles.cases import case, unit_module, unit_problem
from tests.oracles.statistics import assert_agrees

GAMMA = 1.2
BLOCKS = 16


def two_layer_problem(unit: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Inputs of the network, and W, b, V."""
    entry = case(f"{unit}_mlp")
    return entry.inputs(4).numpy(), [parameter.detach().numpy() for parameter in entry.build().parameters()][:3]


@pytest.mark.parametrize("unit", ["sign", "relu"])
def test_gaussian_radii_give_the_gaussian_gradient(unit):
    """Quadrature over radii against the Gaussian's formula."""
    x, parameters = two_layer_problem(unit)
    radii = radial.radii(radial.radius_law("gaussian", GAMMA, 51), 4001)
    expected = two_layer.nonlocal_gradient(unit, x, *parameters, GAMMA)
    ours = two_layer.radial_gradient(unit, x, *parameters, radii)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("law", ["sphere", "ball", "fractional", "student"])
@pytest.mark.parametrize("unit", ["sign", "relu"])
def test_one_unit_with_a_fixed_readout_is_the_unit_of_the_radial_oracle(unit, law):
    """The gradient in W of a network of one unit, which its other parameters do not affect."""
    rng = np.random.default_rng(1)
    w, b, v, x = rng.normal(size=(1, 2)), rng.normal(size=1), np.ones((1, 1)), rng.normal(size=(3, 2))
    count = 5  # all parameters: the law is for five numbers, three of which affect the unit
    radii = radial.radii(radial.radius_law(law, GAMMA, count), 10_001)
    ours = two_layer.radial_gradient(unit, x, w, b, v, radii)[:, 0, :2]
    theta = np.concatenate([w[0], b, np.zeros(2)])
    extended = np.concatenate([x, np.ones((3, 1)), np.zeros((3, 2))], axis=1)
    expected = radial.nonlocal_gradient(unit, theta, extended, radial.radius_law(law, GAMMA, count))[:, :2]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("law", ["gaussian", "sphere", "ball", "fractional", "student"])
def test_sampling_agrees_with_the_quadrature_of_units(law):
    theta, x = unit_problem(3)
    model = unit_module("relu", theta)
    means = sampling.block_means(model, x, law, GAMMA, draws=1 << 15, blocks=BLOCKS, seed=3)[:, :, 0]
    if law == "gaussian":
        exact = closed_forms.nonlocal_gradient("relu", theta.numpy(), x.numpy(), GAMMA)
    else:
        exact = radial.nonlocal_gradient("relu", theta.numpy(), x.numpy(), radial.radius_law(law, GAMMA, 3))
    stderr = means.std(0, ddof=1) / np.sqrt(BLOCKS)
    assert_agrees(means.mean(0), exact, stderr, BLOCKS)
    assert stderr.max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("unit", ["linear", "quadratic", "sign", "relu"])
def test_sampling_agrees_with_the_smoothed_unit_under_low_rank(unit):
    """A vector of parameters is Gaussian."""
    theta, x = unit_problem(3)
    model = unit_module(unit, theta)
    means = sampling.block_means(model, x, "lowrank", GAMMA, draws=1 << 16, blocks=BLOCKS, seed=3)[:, :, 0]
    exact = closed_forms.gaussian_gradient(unit, theta.numpy(), x.numpy(), GAMMA)
    stderr = means.std(0, ddof=1) / np.sqrt(BLOCKS)
    assert_agrees(means.mean(0), exact, stderr, BLOCKS)
    assert stderr.max() < 0.02 * np.abs(exact).max()


def test_matrices_under_low_rank_have_rank_one_and_the_same_mean_square():
    z = sampling.perturbations(np.random.default_rng(0), "lowrank", GAMMA, [(3, 2, 2), (4,)], 20_000)
    assert (np.linalg.matrix_rank(z[:50, :12].reshape(50, 3, 4)) == 1).all()
    squares = z**2
    stderr = squares.std(0, ddof=1) / np.sqrt(len(z))
    assert_agrees(squares.mean(0), np.full(16, GAMMA**2 / 2), stderr, len(z))


def test_the_kernel_of_sampling_tells_its_own_error():
    theta, x = unit_problem(4)
    options = {"draws": 1 << 14, "blocks": BLOCKS}
    kernel, stderr = sampling.nonlocal_kernel(unit_module("sign", theta), x, "gaussian", GAMMA, seed=5, **options)
    exact = closed_forms.nonlocal_kernel("sign", theta.numpy(), x.numpy(), x.numpy(), GAMMA)
    assert_agrees(kernel, exact, stderr, BLOCKS)


def test_rounded_weights_against_sampling():
    model = quantised.QuantisedNetwork()
    x = torch.tensor([[0.8, 0.6], [-0.5, 0.9], [1.0, -0.7]], dtype=torch.float64)
    parameters = [parameter.detach().numpy() for parameter in model.parameters()]
    exact = quantised.nonlocal_gradient(x.numpy(), *parameters, 0.9)[:, 0]
    means = sampling.block_means(model, x, "gaussian", 0.9, draws=1 << 16, blocks=BLOCKS, seed=2)[:, :, 0]
    stderr = means.std(0, ddof=1) / np.sqrt(BLOCKS)
    assert_agrees(means.mean(0), exact, stderr, BLOCKS)
    assert stderr.max() < 0.02 * np.abs(exact).max()
    assert not torch.allclose(model(x), model(x + 0.3))


def test_chances_of_grid_values_are_chances_and_have_their_derivatives():
    values, sigma, step = np.array([[0.7, -0.4]]), 0.3, 1e-6
    grid, chance, slope = quantised._chances(values, sigma)
    np.testing.assert_allclose(chance.sum(-1), 1.0, atol=1e-14)
    assert np.array_equal(grid, -grid[::-1])
    moved = quantised._chances(values + step, sigma)[1] - quantised._chances(values - step, sigma)[1]
    np.testing.assert_allclose(moved / (2 * step), slope, atol=1e-8)
