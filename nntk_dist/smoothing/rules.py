"""Quadrature rules for means under a standard normal distribution: nodes ξ and weights w with Σ w f(ξ) ≈ E f(ξ).

Gauss–Hermite rules with few nodes are exact for polynomials. The trapezoid rule with more nodes is as good for
functions that are analytic in a strip. Panels are for functions that jump in between.

Axes: k nodes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

WINDOW = 7.0  # standard deviations, beyond which 3e-12 of the probability lies
_REFERENCE_WINDOW = 9.0
_GAUSS = (5, 7, 9, 12)
_TRAPEZOID = tuple(round(15 * 1.18**k) for k in range(34))
PLAIN_SIZES = _GAUSS + _TRAPEZOID
_PANEL = 8  # nodes of the shortest panel
PANEL_SIZES = tuple(_PANEL * k for k in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96))
_LONGEST_PANEL = 48


@dataclass(frozen=True)
class Rule:
    """Nodes and weights.

    Attributes:
        nodes: the nodes.
        weights: their weights.
    """

    nodes: Float[Tensor, " k"]
    weights: Float[Tensor, " k"]

    def like(self, values: Tensor) -> "Rule":
        """Return it in the dtype and on the device of some numbers."""
        return Rule(self.nodes.to(values), self.weights.to(values))


def plain_rule(size: int) -> Rule:
    """Return a rule for E f(ξ) with this number of nodes, for smooth f."""
    if size <= max(_GAUSS):
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(size))
        return Rule(nodes, weights / weights.sum())
    return _trapezoid(size, WINDOW)


def reference_rule(size: int) -> Rule:
    """Return a trapezoid rule in a wider window, with which others are compared."""
    return _trapezoid(size, _REFERENCE_WINDOW)


def _trapezoid(size: int, window: float) -> Rule:
    nodes = torch.linspace(-window, window, size, dtype=torch.float64)
    weights = torch.exp(-0.5 * nodes.square())
    return Rule(nodes, weights / weights.sum())


def panel_rule(size: int) -> Rule:
    """Return a Gauss–Legendre rule for the integral over [0, 1], in equal parts if it has many nodes."""
    parts = max(1, size // _LONGEST_PANEL)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(size // parts))
    starts = torch.arange(parts, dtype=torch.float64)[:, None]
    return Rule(((starts + 0.5 + 0.5 * nodes) / parts).flatten(), (0.5 * weights / parts).repeat(parts))
