"""Functions that are smooth but for some breaks: φ̃(a, s) by quadrature, with as many nodes as a trial asks for.

Means are E φ(a + s ξ), and slopes E φ(a + s ξ) ξ/s. If no break lies within the window |ξ| < 7, a plain rule computes
both. Otherwise the window is cut into panels at the breaks. If s is too small for differences of φ, φ is a polynomial
around a. The number of nodes depends on s, by half octaves.

Axes: m means, k nodes.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from nntk_dist.smoothing.elementwise import Function
from nntk_dist.smoothing.rules import WINDOW, Rule, panel_rule, plain_rule

LEVELS = 2  # in an octave of s
# Arguments of φ at one time. On a CPU always as many, a multiple of what one instruction takes, and by one thread: then
# the rounding of a result depends neither on its place nor on other means.
_NUMBERS_ON_CPU, _COLUMNS_ON_CPU, _NUMBERS_ON_GPU = 1 << 15, 1 << 6, 1 << 25
_STENCIL = 7
_MOST_NODES = 1 << 20
_MOST_LEVELS = 128
_NARROWEST = 1e-12  # of s relative to a, below which it is 0
# In float32, φ ξ/s has an error of about 2e-8·φ/s: φ is computed in float64 if that is too much.
_LEAST_SINGLE, _FARTHEST_SINGLE, _FARTHEST_SPREADS = 0.25, 4.0, 8.0

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PiecewiseSmooth:
    """A function that is smooth but for some breaks.

    Attributes:
        function: φ, which computes in float64.
        breaks: where it is not smooth, ascending.
        spacing: of the stencil in which φ is a polynomial.
        first_level: s = 2^(level/2) of the least level that has a rule; below it φ is a polynomial.
        plain: nodes of the plain rule, for every level from the first one on; beyond the last one they grow like s.
        panel: nodes of a panel, for every level.
    """

    function: Function
    breaks: tuple[float, ...]
    spacing: float
    first_level: int
    plain: tuple[int, ...]
    panel: tuple[int, ...]

    @property
    def is_line(self) -> bool:
        """It is curved."""
        return False

    @property
    def text(self) -> str:
        """What it is, in words."""
        return f"smooth but for {len(self.breaks)} breaks, by quadrature" if self.breaks else "smooth, by quadrature"

    @cached_property
    def _single(self) -> Function:
        """The function in float32."""
        return copy.deepcopy(self.function).float() if isinstance(self.function, nn.Module) else self.function

    @cached_property
    def _rules(self) -> dict[tuple[bool, int], Rule]:
        """The rules of all levels that were tried."""
        plain = {(False, size): plain_rule(size) for size in set(self.plain)}
        return plain | {(True, size): panel_rule(size) for size in set(self.panel)}

    @torch.no_grad()
    def values(
        self, a: Float[Tensor, "*shape"], s: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return φ̃(a, s) and φ̃'(a, s); see `Smoothing.values`.

        For means in float32, φ is computed in float32 unless a is far from 0 or s is small.
        """
        for function in (self.function, self._single):
            if isinstance(function, nn.Module):
                function.to(a.device)
        mean, spread = a.flatten(), s.expand(a.shape).flatten()
        smooth, slope = torch.empty_like(mean), torch.empty_like(mean)
        keys = self._keys(mean, spread)
        for key in torch.bincount(keys).nonzero()[:, 0].tolist():
            chosen, step = (keys == key).nonzero()[:, 0], self._step(key, mean.device)
            if mean.device.type == "cpu":
                chosen = torch.cat([chosen, chosen[:1].expand(-len(chosen) % step)])
            dtype = torch.float32 if key % 2 else torch.float64
            for part in chosen.split(step):
                smooth[part], slope[part] = (
                    result.to(a.dtype) for result in self._computed(key, mean[part].to(dtype), spread[part].to(dtype))
                )
        return smooth.reshape(a.shape), slope.reshape(a.shape)

    def _keys(self, mean: Float[Tensor, " m"], spread: Float[Tensor, " m"]) -> Int64[Tensor, " m"]:
        """What is computed in one go: 4 times the level, from 1 on, 2 if breaks are near, and 1 in float32."""
        level = torch.ceil(LEVELS * torch.log2(spread)) - (self.first_level - 1)
        level = level.clamp(0, _MOST_LEVELS).long()
        key = 4 * level
        if self.breaks:
            none = spread <= _NARROWEST * mean.abs().clamp(min=1.0)
            ends = torch.tensor(self.breaks, dtype=torch.float64, device=mean.device)
            reach = WINDOW * spread.double()
            near = torch.searchsorted(ends, mean - reach) != torch.searchsorted(ends, mean + reach)
            key = torch.where(near & ~none, 4 * level.clamp(min=1) + 2, key)
        if mean.dtype == torch.float32:
            single = (spread > _LEAST_SINGLE) & (mean.abs() < _FARTHEST_SINGLE + _FARTHEST_SPREADS * spread)
            key += (single & (level > 0)).long()
        return key

    def _rule(self, key: int) -> Rule:
        near, place = key // 2 % 2 == 1, key // 4 - 1
        sizes = self.panel if near else self.plain
        beyond = place + 1 - len(sizes)
        if beyond <= 0:
            return self._rules[near, sizes[place]]
        size = min(math.ceil(sizes[-1] * 2.0 ** (beyond / LEVELS)), _MOST_NODES)
        return panel_rule(size) if near else plain_rule(size)

    def _step(self, key: int, device: torch.device) -> int:
        count = _STENCIL if key == 0 else len(self._rule(key).nodes)
        if device.type != "cpu":
            return max(1, _NUMBERS_ON_GPU // count)
        return max(1, _NUMBERS_ON_CPU // count // _COLUMNS_ON_CPU) * _COLUMNS_ON_CPU

    def _computed(self, key: int, mean: Float[Tensor, " m"], spread: Float[Tensor, " m"]) -> Pair:
        if key == 0:
            return self._by_polynomials(mean, spread)
        function, rule = self._single if key % 2 else self.function, self._rule(key).like(mean)
        if key // 2 % 2:
            return by_panels(function, self.breaks, rule, mean, spread)
        return by_rule(function, rule, mean, spread)

    def _by_polynomials(self, mean: Float64[Tensor, " m"], spread: Float64[Tensor, " m"]) -> Pair:
        """With φ as a polynomial of degree 6, in a stencil that no break divides."""
        spacing, centre = torch.full_like(mean, self.spacing), mean
        half = _STENCIL // 2
        if self.breaks:
            ends = torch.tensor([-math.inf, *self.breaks, math.inf], dtype=torch.float64, device=mean.device)
            place = torch.searchsorted(ends, mean, right=True).clamp(1, len(ends) - 1)
            low, high = ends[place - 1], ends[place]
            spacing = torch.minimum(spacing, (high - low) / (2 * half + 1))
            centre = torch.minimum(torch.maximum(mean, low + 1.01 * half * spacing), high - 1.01 * half * spacing)
        places = torch.arange(-half, half + 1, dtype=torch.float64, device=mean.device)[:, None]
        values = self.function(centre + places * spacing)
        middle = values[half]
        inverse = torch.linalg.inv(torch.vander(places[:, 0], increasing=True))
        coefficients = _weighted_sums(inverse, values - middle)
        rule = plain_rule(5)
        smooth, slope = torch.zeros_like(mean), torch.zeros_like(mean)
        for node, weight in zip(rule.nodes.tolist(), rule.weights.tolist(), strict=True):
            t = (mean - centre + node * spread) / spacing
            value, derivative = torch.zeros_like(t), torch.zeros_like(t)
            for coefficient in coefficients.flip(0):
                derivative = derivative * t + value
                value = value * t + coefficient
            smooth += weight * value
            slope += weight * derivative
        return middle + smooth, slope / spacing


def by_rule(function: Function, rule: Rule, mean: Float[Tensor, " m"], spread: Float[Tensor, " m"]) -> Pair:
    """Return Σ w φ(a + s ξ) and Σ w φ(a + s ξ) ξ/s."""
    values = function(torch.addcmul(mean, rule.nodes[:, None], spread))
    smooth, slope = _weighted_sums(torch.stack([rule.weights, rule.weights * rule.nodes]), values)
    return smooth, slope / spread


def by_panels(
    function: Function,
    breaks: tuple[float, ...],
    rule: Rule,
    mean: Float[Tensor, " m"],
    spread: Float[Tensor, " m"],
) -> Pair:
    """Return the same integrals, panel by panel between the breaks in the window."""
    smooth, slope = torch.zeros_like(mean), torch.zeros_like(mean)
    nodes, weights = rule.nodes[:, None], rule.weights[None] / math.sqrt(2.0 * math.pi)
    for low, high in _panels(breaks, mean, spread):
        width = (high - low).clamp_(min=0.0)
        t = torch.addcmul(low, nodes, width)
        weighted = function(torch.addcmul(mean, spread, t)) * torch.exp(t.square().mul_(-0.5))
        smooth += width * _weighted_sums(weights, weighted)[0]
        slope += width * _weighted_sums(weights, t.mul_(weighted))[0]
    return smooth, slope / spread


def _weighted_sums(weights: Float[Tensor, "w k"], values: Float[Tensor, "k m"]) -> Float[Tensor, "w m"]:
    """Return weights @ values; on a GPU, whose products depend on shapes by their rounding, in turn."""
    if values.device.type == "cpu":
        return weights @ values
    total = values.new_zeros(len(weights), values.shape[1])
    for k, row in enumerate(values):
        total += weights[:, k : k + 1] * row
    return total


def _panels(breaks: tuple[float, ...], mean: Float[Tensor, " m"], spread: Float[Tensor, " m"]) -> Iterator[Pair]:
    """Ends of the panels in standard deviations from the means; those that are outside of the window are empty."""
    low = torch.full_like(mean, -WINDOW)
    for place in breaks:
        high = ((place - mean) / spread).clamp(-WINDOW, WINDOW)
        if bool((high > low).any()):
            yield low, high
        low = high
    yield low, torch.full_like(mean, WINDOW)
