"""Brownian activations: relu(u) + σ·B(u), with one two-sided Brownian path B for every unit.

A path is computed at the points where it is evaluated, by Lévy's construction from counters: cells of a table whose
increments are independent normals, and below them bridges, halved twelve times. Each midpoint's normal is named by
unit, cell and place in the tree. So a path is one function for all examples, for both evaluations of a draw and for
all batches; nothing of it is kept. It scales as Brownian motion does, B(u) = √reach · W(u/reach), W on [−1, 1].

Axes: e evaluations (examples and units flattened), then 4 normals of a counter; s two sides of 0; k cells of a side.
"""

import math
from numbers import Real

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from nntk_dist.errors import ArgumentError, ModelError
from nntk_dist.models.noise import Noise, StochasticModule
from nntk_dist.sampling.philox import normal, normals_at
from nntk_dist.sampling.streams import BRIDGE_COUNTER, Stream

# Cells of the table on each side of 0, and pairs of halvings below them: 2^-8 of the reach, then 2^-20. Finer
# paths would be steeper than rounding in float32 allows.
_CELLS = 256
_PAIRS = 6
# A cell's tree: three normals of one counter for two halvings (middle, left and right quarter), then four subtrees.
_TREE = 1 << 11
_MOST_UNITS = 1 << 22
_EVALUATIONS_AT_ONCE = 1 << 12
_GPU_EVALUATIONS_AT_ONCE = 1 << 20


class BrownianActivation(StochasticModule):
    """relu(u) + σ·B(u) elementwise, with a separate Brownian path B for every number of an example, B(0) = 0.

    Over ω: E B(u) = 0, E B(u)B(v) = min(|u|, |v|) if u and v have the same sign, else 0, so the mean of the
    activation is relu, and E (B(u) − B(v))² = |u − v|. Exact in law at the multiples of h = reach·2^-20 (3e-5 at the
    default), linear between them; for |u| > reach the path stays at its value at ±reach. Choose the reach so that
    pre-activations stay below it, and not far above them. One module is one set of paths, however often it is called.

    B is nowhere differentiable: its derivative is given as 0, and kernels take differences, never gradients. Rounding
    of u by ε moves B(u) by up to about ε/√h, and more from layer to layer: evaluate deep networks in float64. In
    training mode every call has new paths. Cost: about 1,000 elementwise operations a number, 2 µs on one core.

    Raises:
        ArgumentError: σ or the reach is not a positive number.
    """

    differentiable = False

    def __init__(self, sigma: float = 0.1, reach: float = 32.0) -> None:
        super().__init__()
        for name, value in (("sigma", sigma), ("reach", reach)):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
                raise ArgumentError(f"activation brownian: {name} is {value!r}; give a positive number")
        self.sigma = float(sigma)
        self.reach = float(reach)

    def forward(self, u: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Apply it elementwise."""
        return torch.relu(u) + self.sigma * self.path(u)

    def path(self, u: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Return B(u), in the dtype of u and without its graph."""
        place = torch.nan_to_num(u.detach().to(torch.float64) / self.reach)  # relu keeps a NaN visible
        return (math.sqrt(self.reach) * brownian_paths(self.noise, place)).to(u.dtype)

    def extra_repr(self) -> str:
        """The settings, for printing the model."""
        return f"sigma={self.sigma}, reach={self.reach}"


def brownian_paths(noise: Noise, place: Float64[Tensor, "n ..."]) -> Float64[Tensor, "n ..."]:
    """Return W_j(t) for numbers t of every example and unit j, on [−1, 1]; outside, the value at the nearer end.

    Raises:
        ModelError: there are more than 2^22 units.
    """
    num_units = math.prod(place.shape[1:])
    if num_units > _MOST_UNITS:
        raise ModelError(f"a Brownian activation has {num_units} units; allowed: {_MOST_UNITS}")
    ends = _table(noise, num_units, place.device)
    units = torch.arange(num_units, device=place.device).expand(len(place), num_units).flatten()
    at_once = _GPU_EVALUATIONS_AT_ONCE if place.is_cuda else _EVALUATIONS_AT_ONCE
    parts = [
        _values(noise, ends, number, t)
        for number, t in zip(units.split(at_once), place.flatten().split(at_once), strict=True)
    ]
    return torch.cat(parts).reshape(place.shape)


def _table(noise: Noise, num_units: int, device: torch.device) -> Float64[Tensor, " e"]:
    """W at both ends of all cells: unit by unit, each side outwards from 0, flattened."""
    groups = torch.tensor([noise.group], dtype=torch.int64, device=device)
    increments = normal(noise.seed, Stream.MODEL, groups, 0, num_units * 2 * _CELLS, draw=noise.module)
    paths = increments.reshape(-1, _CELLS).cumsum(1).mul_(_CELLS**-0.5)
    return torch.cat([torch.zeros_like(paths[:, :1]), paths], dim=1).flatten()


def _values(
    noise: Noise, ends: Float64[Tensor, " k"], unit: Int64[Tensor, " e"], t: Float64[Tensor, " e"]
) -> Float64[Tensor, " e"]:
    """W at each t: from the ends of its cell down a tree of bridges."""
    line = 2 * unit + (t < 0).to(torch.int64)
    position = t.abs().clamp(max=1.0) * _CELLS
    cell = position.floor().clamp(max=_CELLS - 1)
    within = position - cell  # in [0, 1], exactly: cells are powers of two
    cell = cell.to(torch.int64)
    first = line * (_CELLS + 1) + cell
    left, right = ends[first], ends[first + 1]
    tree = (line * _CELLS + cell) * _TREE + BRIDGE_COUNTER
    # The nodes on the way down depend only on the place, so all their normals are generated together.
    nodes = [(4**pair - 1) // 3 + (within * 4**pair).to(torch.int64) for pair in range(_PAIRS)]
    counters = tree + torch.stack(nodes)
    middle, lower, upper, _ = normals_at(noise.seed, Stream.MODEL, noise.group, counters, draw=noise.module).unbind(-1)
    deviation = 0.5 * _CELLS**-0.5  # of the middle of a cell, given both ends
    for pair in range(_PAIRS):
        second = within >= 0.5
        left, right, within = _halve(left, right, within, second, deviation * middle[pair])
        quarter = torch.where(second, upper[pair], lower[pair])
        left, right, within = _halve(left, right, within, within >= 0.5, math.sqrt(0.5) * deviation * quarter)
        deviation *= 0.5
    return left + (right - left) * within


def _halve(
    left: Tensor, right: Tensor, within: Tensor, second: Tensor, bridge: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The half of an interval that holds the place looked for: its ends, and the place within it."""
    middle = 0.5 * (left + right) + bridge
    return (
        torch.where(second, middle, left),
        torch.where(second, right, middle),
        2.0 * within - second.to(within.dtype),
    )
