"""A two-layer relu network whose weights are rounded to a grid, and its nonlocal gradient by enumeration of the grid.

f = q(v)·relu(q(W) x̃) + q(c), x̃ = (x, 1), q the nearest multiple of a step. Given σ = (γ/√2) s, s = U^{1/P}, the
perturbed parameters are independent and each rounds to a grid value with a probability that is a difference of normal
distribution functions. A unit's mean is a sum over all grid values of its row; derivatives of the probabilities give
the gradient of the smoothed network. The integral over s, of density P s^(P−1), is done by quadrature. Gaussian
perturbations of all parameters, rows of three numbers at most.

Axes: n examples, u hidden units, i numbers of a row of W, g grid values, P parameters.
"""

import itertools

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn

Array = np.ndarray
STEP = 0.5
_NODES = 40


class QuantisedNetwork(nn.Module):
    """Three hidden units on two inputs; 13 parameters, none of them near the middle of two grid values."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [[0.7, -0.4, 0.1], [-0.55, 0.9, 0.3], [0.35, 0.65, -0.6]]
        self.hidden = nn.Parameter(torch.tensor(hidden, dtype=torch.float64))
        self.readout = nn.Parameter(torch.tensor([0.9, -0.6, 1.1], dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor([0.15], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        extended = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        units = torch.relu(extended @ _rounded(self.hidden).T)
        return (units @ _rounded(self.readout) + _rounded(self.offset))[:, None]


def _rounded(values: Tensor) -> Tensor:
    return torch.round(values / STEP) * STEP


def nonlocal_gradient(
    x: Float[Array, "n _"], hidden: Float[Array, "u i"], readout: Float[Array, " u"], offset: Array, gamma: float
) -> Float[Array, "n 1 P"]:
    """g(x) with respect to (W, v, c), W flattened by rows."""
    extended = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    num_parameters = hidden.size + readout.size + offset.size

    node, weight = np.polynomial.legendre.leggauss(_NODES)
    node, weight = (node + 1.0) / 2.0, weight / 2.0
    parts = [
        share
        * num_parameters
        * s ** (num_parameters - 1)
        * _gradient(extended, hidden, readout, offset, s * gamma / np.sqrt(2.0))
        for s, share in zip(node, weight, strict=True)
    ]
    return np.sum(parts, axis=0)[:, None, :]


def _gradient(extended: Array, hidden: Array, readout: Array, offset: Array, sigma: float) -> Float[Array, "n P"]:
    """The gradient of E f(θ + σ n)."""
    grid, chance, slope = _chances(hidden, sigma)
    v_grid, v_chance, v_slope = _chances(readout, sigma)
    _, _, c_slope = _chances(offset, sigma)
    width = hidden.shape[1]
    index = np.array(list(itertools.product(range(len(grid)), repeat=width)))
    values = np.maximum(grid[index] @ extended.T, 0.0)  # (g^i, n)
    part = np.stack([chance[:, i, index[:, i]] for i in range(width)], axis=1)  # u i g^i
    moved = np.stack([slope[:, i, index[:, i]] for i in range(width)], axis=1)
    mean = part.prod(1) @ values  # u n
    v_mean = v_chance @ v_grid
    rows = []
    for i in range(width):
        others = part[:, [j for j in range(width) if j != i]].prod(1)
        rows.append((others * moved[:, i]) @ values * v_mean[:, None])
    first = np.stack(rows, axis=1).reshape(-1, len(extended)).T
    second = (mean * (v_slope @ v_grid)[:, None]).T
    third = np.broadcast_to(c_slope @ _chances(offset, sigma)[0], (len(extended), len(offset)))
    return np.concatenate([first, second, third], axis=1)


def _chances(values: Array, sigma: float) -> tuple[Array, Array, Array]:
    """The grid around all values, the probability that each value plus σ n rounds to it, and its derivative."""
    reach = np.abs(values).max() + 8.0 * sigma
    steps = int(np.ceil(reach / STEP))
    grid = STEP * np.arange(-steps, steps + 1)
    edges = (np.append(grid, grid[-1] + STEP) - STEP / 2.0 - values[..., None]) / sigma
    return grid, np.diff(stats.norm.cdf(edges)), -np.diff(stats.norm.pdf(edges)) / sigma
