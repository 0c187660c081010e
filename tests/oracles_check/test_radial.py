"""The kernels of units under radial laws against the closed forms of the Gaussian, and against a plain average."""

import numpy as np
import pytest

from tests.oracles import closed_forms, radial

THETA = np.array([0.6, -0.8])
X = np.array([[0.9, 0.3], [-0.2, 1.1], [0.7, 0.1]])
GAUSSIAN = radial.radius_law("gaussian", 1.5, 2)


@pytest.mark.parametrize("unit", ["sign", "relu"])
def test_nonlocal_kernel_of_the_gaussian(unit):
    for theta, x in ((THETA, X), (np.array([0.6, -0.8, 0.2, 0.1]), np.hstack([X, X[::-1]]))):
        law = radial.radius_law("gaussian", 1.5, len(theta))
        expected = closed_forms.nonlocal_kernel(unit, theta, x, x, 1.5)
        np.testing.assert_allclose(radial.nonlocal_kernel(unit, theta, x, law), expected, atol=1e-5 * expected.max())


@pytest.mark.statistical
@pytest.mark.parametrize("unit", ["linear", "quadratic", "sign", "relu"])
def test_covariance_kernel_of_the_gaussian(unit):
    expected = closed_forms.covariance_kernel(unit, THETA, X, X, 1.5)
    found = radial.covariance_kernel(unit, THETA, X, GAUSSIAN)
    np.testing.assert_allclose(found, expected, atol=(2e-3 if unit == "quadratic" else 2e-4) * expected.max())


def test_averaged_kernel_of_the_gaussian():
    expected = closed_forms.averaged_kernel("relu", THETA, X, X, 1.5)
    found = radial.averaged_relu_kernel(THETA, X, GAUSSIAN)
    np.testing.assert_allclose(found, expected, atol=2e-4 * expected.max())


@pytest.mark.parametrize("name", ["sphere", "ball", "fractional", "student"])
@pytest.mark.parametrize("unit", ["sign", "relu"])
def test_nonlocal_gradients_by_a_plain_average(unit, name):
    """P·E[Δ z/|z|²] on a grid of radii and angles in the plane, directly from the definition."""
    law = radial.radius_law(name, 1.5, 2)
    angle = 2 * np.pi * (np.arange(4000) + 0.5) / 4000
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    radius = radial.radii(law, 1001)
    change = [closed_forms.unit_value(unit, THETA + r * directions, X) - closed_forms.unit_value(unit, THETA, X)
              for r in radius]  # fmt: skip
    gradients = 2 * np.mean(
        [(c.T @ directions) / (len(angle) * r) for c, r in zip(change, radius, strict=True)], axis=0
    )
    expected = gradients @ gradients.T
    found = radial.nonlocal_kernel(unit, THETA, X, law)
    np.testing.assert_allclose(found, expected, atol=5e-4 * expected.max())


@pytest.mark.parametrize("name", ["gaussian", "sphere", "ball", "fractional", "student"])
@pytest.mark.parametrize("num_parameters", [1, 2, 9])
def test_one_meaning_of_gamma(name, num_parameters):
    law = radial.radius_law(name, 0.7, num_parameters)
    radius = radial.radii(law, 200_001)
    assert np.mean(radius**2) == pytest.approx(num_parameters * 0.7**2 / 2, rel=3e-3 if name == "student" else 1e-4)
