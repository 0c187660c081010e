"""The laws of the radius |z|, from `scipy.stats`, and the kernels of single units under them, by quadrature.

Written from the definitions: r² = γ²/2·χ²_P (gaussian), γ√(P/2) (sphere), R·B with B ~ Beta(P, 1) (ball) or
Beta(1 − α, 1) (fractional), and r²·2ν/(γ²(ν−2)P) ~ F(P, ν) (student).

Linear and quadratic units depend on a law only through E|z|², which all laws share, so the Gaussian's closed forms
hold.

Axes: n examples, P parameters, m nodes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from tests.oracles.closed_forms import unit_value

Array = np.ndarray


def radius_law(name: str, gamma: float, num_parameters: int, alpha: float = 0.5, nu: float = 5.0) -> Any:
    """A frozen distribution of `scipy.stats` (cdf, pdf, ppf), or the one radius of the sphere."""
    if name == "sphere":
        return gamma * np.sqrt(num_parameters / 2)
    if name == "gaussian":
        return stats.chi(num_parameters, scale=gamma / np.sqrt(2))
    if name == "ball":
        return stats.beta(num_parameters, 1, scale=gamma * np.sqrt((num_parameters + 2) / 2))
    if name == "fractional":
        reach = gamma * np.sqrt(num_parameters * (3 - alpha) / (2 * (1 - alpha)))
        return stats.beta(1 - alpha, 1, scale=reach)
    if name == "student":
        return _RootF(stats.f(num_parameters, nu), gamma * np.sqrt((nu - 2) * num_parameters / (2 * nu)))
    raise ValueError(f"no law of the radius called '{name}'")


@dataclass(frozen=True)
class _RootF:
    """scale · √F."""

    square: Any
    scale: float

    def cdf(self, r: Array) -> Array:
        return self.square.cdf((r / self.scale) ** 2)

    def pdf(self, r: Array) -> Array:
        return self.square.pdf((r / self.scale) ** 2) * 2 * r / self.scale**2

    def ppf(self, level: Array) -> Array:
        return self.scale * np.sqrt(self.square.ppf(level))


def radii(law: Any, count: int) -> Array:
    """Radii that represent the law: its quantiles at the midpoints of m equal intervals, (m,)."""
    return np.array([law]) if isinstance(law, float) else law.ppf((np.arange(count) + 0.5) / count)


def nonlocal_kernel(unit: str, theta: Array, x: Array, law: Any) -> Array:
    """g(x)·g(x') of a sign or relu unit."""
    gradients = nonlocal_gradient(unit, theta, x, law)
    return gradients @ gradients.T


def nonlocal_gradient(unit: str, theta: Array, x: Array, law: Any) -> Array:
    """g(x) = P·E[Δ z/|z|²], (n, P), of a sign or relu unit; relative accuracy 1e-5, for P ≥ 2.

    At a fixed radius R, with T one coordinate of a uniform direction (density c·(1−T²)^((P−3)/2)) and τ = |a|/(R|x|):
    sign: x · 2P/(R|x|) · c·(1−τ²)^((P−1)/2)/(P−1); relu: x · the part of a uniform ball in which a + z·x > 0.
    """
    num_parameters, radius = len(theta), radii(law, 40_001)
    a, lengths = x @ theta, np.linalg.norm(x, axis=1)
    reach = np.minimum(1.0, np.abs(a)[:, None] / (radius * lengths[:, None]))
    if unit == "sign":
        constant = special.gamma(num_parameters / 2) / (np.sqrt(np.pi) * special.gamma((num_parameters - 1) / 2))
        mean = constant * (1 - reach**2) ** ((num_parameters - 1) / 2) / (num_parameters - 1)
        slope = (2 * num_parameters * mean / (radius * lengths[:, None])).mean(1)
    elif unit == "relu":
        half = (num_parameters + 1) / 2
        slope = stats.beta(half, half).cdf(0.5 + 0.5 * np.sign(a)[:, None] * reach).mean(1)
    else:
        raise ValueError(f"unit is '{unit}'; those of other units don't depend on the law: see closed_forms")
    return slope[:, None] * x


def covariance_kernel(unit: str, theta: Array, x: Array, law: Any) -> Array:
    """P·E[Δ Δ'/|z|²] for two parameters, over a grid of radii and angles; relative accuracy 2e-4."""
    radius, directions = radii(law, 4001), _circle(2000)
    total = np.zeros((len(x), len(x)))
    for r in radius:
        change = (unit_value(unit, theta + r * directions, x) - unit_value(unit, theta, x)) / r
        total += change.T @ change / len(directions)
    return 2 * total / len(radius)


def averaged_relu_kernel(theta: Array, x: Array, law: Any) -> Array:
    """x·x' times the probability that both units are on at θ + √U z, for two parameters; accurate to 2e-4.

    √U z at a fixed radius is uniform on the disc: along each ray both are on between two squared radii.
    """
    directions, squares = _circle(4000), radii(law, 1001) ** 2
    a, slopes = x @ theta, directions @ x.T
    crossing = np.where(a * slopes < 0, -a / np.where(slopes == 0, 1, slopes), np.inf) ** 2
    begin, end = np.where(a > 0, 0.0, crossing), np.where(a > 0, crossing, np.inf)
    result = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        for j in range(len(x)):
            low, high = np.maximum(begin[:, i], begin[:, j]), np.minimum(end[:, i], end[:, j])
            part = np.minimum(high, squares[:, None]) - np.minimum(low, squares[:, None])
            result[i, j] = (np.maximum(part, 0) / squares[:, None]).mean()
    return result * (x @ x.T)


def _circle(count: int) -> Array:
    angle = 2 * np.pi * (np.arange(count) + 0.5) / count
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)
