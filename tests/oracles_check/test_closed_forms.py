"""Closed forms against quadrature (P ≤ 3), against plain Monte Carlo (any P) and against limits that are known.

Axes: S draws, n examples, P parameters.
"""

from functools import partial

import numpy as np
import pytest
from scipy import special

from tests.oracles import closed_forms, quadrature, statistics
from tests.oracles.cases import unit_problem

Array = np.ndarray
# Quadratures that take seconds; the fast tests compare these units in fewer dimensions and with Monte Carlo.
COSTLY = (("relu", 2), ("sign", 3), ("relu", 3))


def problem(num_parameters: int, n: int = 3, seed: int = 0) -> tuple[Array, Array]:
    theta, x = unit_problem(num_parameters, n, seed)
    return theta.numpy(), x.numpy()


def assert_close(value: Array, expected: Array, relative: float) -> None:
    """Equal to within `relative` times the largest expected entry."""
    np.testing.assert_allclose(value, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.mark.parametrize("order", [1, 2, 3, 7, 40])
def test_tail_moment_of_order_zero_is_the_exponential_integral(order: int):
    start = np.array([1e-3, 0.1, 1.0, 3.0, 8.0])
    expected = 0.5 * special.expn(order, start**2 / 2.0)
    np.testing.assert_allclose(closed_forms.tail_moment(0, 2 * order - 3, start), expected, rtol=1e-11)


@pytest.mark.parametrize("power", [1, 2])
def test_tail_moments_satisfy_their_recurrence_by_parts(power: int):
    # d/dσ of σ^(m) Γ(1 + power/2, y/σ²) integrates to its value at 1; the derivative of Γ is elementary.
    start, exponent = np.array([0.2, 1.0, 3.0]), 1.0
    m, y = exponent + power + 1.0, start**2 / 2.0
    boundary = 2 ** (power / 2) * special.gamma(1 + power / 2) * special.gammaincc(1 + power / 2, y)
    rest = start ** (power + 2) * closed_forms.tail_moment(0, exponent - 2, start)
    np.testing.assert_allclose(m * closed_forms.tail_moment(power, exponent, start), boundary - rest, rtol=1e-11)


@pytest.mark.parametrize(
    # The closed forms are accurate to 1e-12; the cost of quadrature in three dimensions limits the comparison.
    ("unit", "num_parameters", "quadrature_tolerance", "relative"),
    [
        pytest.param(unit, *accuracy, marks=pytest.mark.statistical if (unit, accuracy[0]) in COSTLY else ())
        for unit in closed_forms.UNITS
        for accuracy in ((1, 1e-10, 1e-10), (2, 1e-9, 1e-8), (3, 1e-3, 5e-4))
    ],
)
def test_closed_forms_against_quadrature(unit: str, num_parameters: int, quadrature_tolerance: float, relative: float):
    theta, x = problem(num_parameters)
    options = {"gamma": 0.9, "vectorized": True, "tolerance": quadrature_tolerance}

    def function(points: Array) -> Array:
        return closed_forms.unit_value(unit, points, x)

    gradient = quadrature.nonlocal_gradient(function, theta, **options)
    assert_close(gradient, closed_forms.nonlocal_gradient(unit, theta, x, 0.9), relative)
    covariance = quadrature.covariance_kernel(function, theta, **options)
    assert_close(covariance, closed_forms.covariance_kernel(unit, theta, x, x, 0.9), relative)
    assert_close(gradient @ gradient.T, closed_forms.nonlocal_kernel(unit, theta, x, x, 0.9), 3 * relative)
    if unit in closed_forms.LIPSCHITZ_UNITS:
        averaged = quadrature.averaged_kernel(
            lambda points: closed_forms.local_gradient(unit, points, x), theta, **options
        )
        assert_close(averaged, closed_forms.averaged_kernel(unit, theta, x, x, 0.9), relative)


@pytest.mark.parametrize("num_parameters", [10, 1000])
@pytest.mark.parametrize("unit", closed_forms.UNITS)
def test_closed_forms_against_monte_carlo(unit: str, num_parameters: int):
    # z enters only through z·x, z·x' and |z|², so that P = 1000 needs no more random numbers than P = 10.
    theta, x = problem(num_parameters)
    gamma, num_draws = 1.5, 100_000
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(x.T)[0]  # collinear inputs need one column less, but it does no harm
    inside = rng.normal(size=(num_draws, basis.shape[1])) * gamma / np.sqrt(2.0)
    outside = rng.chisquare(num_parameters - basis.shape[1], size=num_draws) * gamma**2 / 2.0
    squares = (inside**2).sum(1) + outside
    reduced_theta, reduced_x = theta @ basis, x @ basis  # coordinates in the span of the inputs: θ·x is the same
    change = closed_forms.unit_value(unit, reduced_theta + inside, reduced_x) - closed_forms.unit_value(unit, theta, x)
    gradients = num_parameters * change[:, :, None] * (inside / squares[:, None])[:, None, :]
    expected = closed_forms.nonlocal_gradient(unit, theta, x, gamma) @ basis
    np.testing.assert_allclose(expected @ basis.T, closed_forms.nonlocal_gradient(unit, theta, x, gamma), atol=1e-12)
    check_mean(gradients, expected)
    products = num_parameters * change[:, :, None] * change[:, None, :] / squares[:, None, None]
    check_mean(products, closed_forms.covariance_kernel(unit, theta, x, x, gamma))
    if unit in closed_forms.LIPSCHITZ_UNITS:
        shrink = rng.uniform(size=(num_draws, 1)) ** (1.0 / num_parameters)
        local = closed_forms.local_gradient(unit, reduced_theta + shrink * inside, reduced_x)
        check_mean(local, expected)
        check_mean(np.einsum("sip,sjp->sij", local, local), closed_forms.averaged_kernel(unit, theta, x, x, gamma))


def check_mean(samples: Array, expected: Array) -> None:
    """Samples that are constant (gradients of the linear unit) may differ from their mean by rounding."""
    statistics.assert_mean_agrees(samples, expected, rounding=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("num_parameters", [1, 2, 7])
@pytest.mark.parametrize("unit", closed_forms.UNITS)
def test_small_ranges_give_local_kernels(unit: str, num_parameters: int):
    theta, x = problem(num_parameters, seed=3)
    local = closed_forms.local_kernel(unit, theta, x, x)
    for kernel in (closed_forms.nonlocal_kernel, closed_forms.covariance_kernel, closed_forms.averaged_kernel):
        if unit == "sign" and kernel is closed_forms.averaged_kernel:
            continue
        np.testing.assert_allclose(kernel(unit, theta, x, x, 1e-4), local, atol=1e-6 * max(1.0, local.max()))


def test_large_ranges_leave_the_local_kernel_far_behind():
    theta, x = problem(5)
    for unit in ("sign", "relu"):
        local = closed_forms.local_kernel(unit, theta, x, x)
        assert np.abs(closed_forms.nonlocal_kernel(unit, theta, x, x, 1.5) - local).max() > 0.1


def test_exact_units():
    theta, x = problem(4)
    for unit in ("linear", "quadratic"):
        local = closed_forms.local_kernel(unit, theta, x, x)
        np.testing.assert_allclose(closed_forms.nonlocal_kernel(unit, theta, x, x, 1.5), local, rtol=1e-12)
    inner = x @ x.T
    np.testing.assert_allclose(closed_forms.covariance_kernel("linear", theta, x, x, 1.5), inner)
    np.testing.assert_allclose(closed_forms.averaged_kernel("linear", theta, x, x, 1.5), inner)


def test_slopes_of_relu_on_both_sides_of_the_kink_sum_to_one():
    # relu(u) − relu(−u) = u
    for num_parameters in (1, 2, 3, 10, 1000):
        theta, x = problem(num_parameters)
        both = [closed_forms.nonlocal_gradient("relu", theta, side, 0.8) for side in (x, -x)]
        np.testing.assert_allclose(both[0] - both[1], x, rtol=1e-12)


def test_units_at_their_kink_and_at_zero_inputs():
    x = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 0.0]])
    theta, gamma = np.array([0.0, 0.0, 2.0]), 1.2
    spread = gamma / np.sqrt(2.0)
    sign = closed_forms.nonlocal_gradient("sign", theta, x, gamma)  # P/(P−1) · 2 N(0; 0, s²)
    np.testing.assert_allclose(sign, x * 1.5 * 2.0 / (np.sqrt(2.0 * np.pi) * spread), rtol=1e-12)
    np.testing.assert_allclose(closed_forms.nonlocal_gradient("relu", theta, x, gamma), 0.5 * x, rtol=1e-12)
    # arc-cosine kernels: the two units' signs agree with probability 1 − angle/π; here 1/|z|² is independent of them.
    angle = np.arccos(np.clip(x[:2] @ x[:2].T, -1.0, 1.0))
    inverse_square = 1.0 / ((3 - 2) * spread**2)  # E[1/|z|²]
    covariance = closed_forms.covariance_kernel("sign", theta, x, x, gamma)
    np.testing.assert_allclose(covariance[:2, :2], 3.0 * inverse_square * (1.0 - 2.0 * angle / np.pi), atol=1e-10)
    averaged = closed_forms.averaged_kernel("relu", theta, x, x, gamma)
    np.testing.assert_allclose(averaged[:2, :2], x[:2] @ x[:2].T * (0.5 - angle / (2.0 * np.pi)), atol=1e-10)
    arc_cosine = (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2.0 * np.pi)
    covariance_relu = closed_forms.covariance_kernel("relu", theta, x, x, gamma)
    np.testing.assert_allclose(covariance_relu[:2, :2], arc_cosine, atol=1e-10)
    assert not covariance[2].any()
    assert not averaged[:, 2].any()


def test_what_closed_forms_refuse():
    theta, x = problem(3)
    with pytest.raises(ValueError, match="unit is 'tanh'; allowed: linear, quadratic, sign, relu"):
        closed_forms.nonlocal_gradient("tanh", theta, x, 1.0)
    with pytest.raises(ValueError, match="an averaged kernel has only: linear, quadratic, relu"):
        closed_forms.averaged_kernel("sign", theta, x, x, 1.0)
    with pytest.raises(ValueError, match="quadrature is for 1, 2 or 3 parameters, not 4"):
        quadrature.nonlocal_gradient(lambda theta: theta.sum(), np.zeros(4), 1.0)


# Quadrature beyond single units ---------------------------------------------------------------------------------------


def test_quadrature_of_a_product_that_closed_forms_do_not_know():
    # f = θ₁θ₂θ₃: P·E[Δ z/|z|²] = E[∇f(θ + U^(1/3) z)], and coordinates stay uncorrelated: the local gradient again.
    theta = np.array([0.4, -1.1, 0.7])
    gradient = quadrature.nonlocal_gradient(lambda points: points.prod(1), theta, 0.8, vectorized=True)
    np.testing.assert_allclose(gradient[0], theta.prod() / theta, rtol=1e-9)


def _jumps_at(step: float, point: np.ndarray) -> np.ndarray:
    return point[0] > step


def test_quadrature_of_a_step_that_does_not_pass_near_the_nodes():
    # One parameter, f = 1[θ > t]: g = P E[Δ/z] is an exponential integral, wherever the step lies.
    for step in (0.003, 0.0101, 1.1249, 1.1251, 4.0):
        gradient = quadrature.nonlocal_gradient(partial(_jumps_at, step), np.zeros(1), np.sqrt(2.0))
        expected = special.exp1(step**2 / 2.0) / (2.0 * np.sqrt(2.0 * np.pi))
        np.testing.assert_allclose(gradient[0, 0], expected, rtol=1e-7)
