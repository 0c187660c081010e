"""The laws of the radius |z|, from `scipy.stats`, and how quadrature runs over them.

Written from the definitions: r² = γ²/2·χ²_P (gaussian), γ√(P/2) (sphere), R·B with B ~ Beta(P, 1) (ball) or
Beta(1 − α, 1) (fractional), and r²·2ν/(γ²(ν−2)P) ~ F(P, ν) (student).

Axes: P parameters, m nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

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


def line_coordinates(law: Any) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """r(t) and the density of t for 0 ≤ t ≤ 1, for laws other than the Gaussian: r = t/(1 − t) times the median, or r
    of full support at once where that is bounded.
    """
    if isinstance(law, float):
        return (lambda t: np.full_like(t, law)), np.ones_like
    if isinstance(law, _RootF):
        median = float(law.ppf(np.array(0.5)))
        return (lambda t: median * t / (1 - t)), (lambda t: law.pdf(median * t / (1 - t)) * median / (1 - t) ** 2)
    a, reach = law.args[0], law.kwds["scale"]
    if a >= 1:  # the density of the ball vanishes at 0
        return (lambda t: reach * t), (lambda t: law.pdf(reach * t) * reach)
    return (lambda t: reach * t ** (1 / a)), np.ones_like  # t is the level itself
