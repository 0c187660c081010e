"""Which parameters reach a model through an elementwise function of them alone, and in which calls: found by trial.

A weight may be quantised by a parametrization, in a module's own forward pass, or behind a straight-through gradient:
what a call gets is compared under changes of each parameter, and the function is found by bisection. A parameter that
nothing quantises has the function φ(θ) = θ. No draws of a kernel are used here.

Axes: n examples, s draws, k pieces of a function, p numbers of a tensor.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from nntk_dist.estimators.weight_noise.weight_calls import BIAS, WEIGHT, WeightCall, pass_with
from nntk_dist.models.evaluation import Evaluator, in_float64
from nntk_dist.sampling.draws import Drawing
from nntk_dist.smoothing import PiecewiseLinear, find_piecewise_linear

_IDENTITY = PiecewiseLinear((), (), (), 0.0, 1.0)
_REACH = 16.0  # the numbers of a tensor are scaled to ±16, where breaks are searched for finely
_FARTHEST = 10.0  # standard deviations
_AGREEMENT = 1e-7  # in float64
_FEWEST_FILLED = 16  # numbers of a parameter into which points are put


@dataclass(frozen=True)
class NoisyWeight:
    """A parameter that enters one call of a pass as a function of itself.

    Attributes:
        name: the parameter.
        call: the number of the call.
        argument: the call's weight, or its bias.
        transposed: whether the call gets the transpose.
        function: the function, right for all values that draws can reach.
        conditioned: whether the model depends on it through the function alone.
    """

    name: str
    call: int
    argument: str
    transposed: bool
    function: PiecewiseLinear
    conditioned: bool = False

    @property
    def is_quantised(self) -> bool:
        """Whether it is not passed on as it is."""
        return self.function != _IDENTITY

    def placed(self, values: Float[Tensor, "*lead p q"]) -> Tensor:
        """Return numbers of the parameter's shape in the shape of the call's argument, or the reverse."""
        return values.mT if self.transposed else values


@dataclass(frozen=True)
class NoisyWeights:
    """All of them.

    Attributes:
        weights: the parameters; each lies in one call.
        num_calls: the calls of a pass.
    """

    weights: tuple[NoisyWeight, ...]
    num_calls: int

    @property
    def by_call(self) -> dict[int, dict[str, NoisyWeight]]:
        """The parameters of each call, by its arguments."""
        found: dict[int, dict[str, NoisyWeight]] = {}
        for each in self.weights:
            found.setdefault(each.call, {})[each.argument] = each
        return found

    @property
    def text(self) -> str:
        """How many tensors, and how many of them are quantised."""
        quantised = sum(each.is_quantised for each in self.weights)
        return f"{len(self.weights)} tensors, {quantised} of them quantised"


def find_noisy_weights(evaluator: Evaluator, drawing: Drawing, x: Tensor) -> NoisyWeights | None:
    """Return the parameters whose noise enters a call through a known function; None without a quantised one.

    A call must have a row for each example, and its input must not depend on the parameter itself.

    Args:
        evaluator: the model and its parameters.
        drawing: the draws, Gaussian.
        x: a few examples.
    """
    exact, x = in_float64(evaluator.model, x[:3])
    x = x if len(x) > 1 else x.repeat(2, *[1] * (x.ndim - 1))
    theta = {name: value.detach() for name, value in evaluator.space.values(exact).items()}
    first = _recorded(exact, x, {})
    second = _recorded(exact, x.flip(0)[: len(x) - 1], {})
    if first is None or second is None or len(first) != len(second):
        return None
    generator, scales = torch.Generator().manual_seed(0), dict(zip(theta, _scales(drawing, len(theta)), strict=True))
    valid = _valid(first, second)
    changed, moved = dict[str, list[tuple[int, str]]](), dict[str, Tensor]()
    looped = set[str]()  # parameters on which the input of a call that gets them depends
    for name, values in theta.items():
        size = float(values.square().mean().sqrt()) + drawing.distribution.gamma * scales[name]
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values.device)
        moved[name] = values + size * noise
        calls = _recorded(exact, x, {name: moved[name]})
        if calls is None or len(calls) != len(first):
            return None
        changed[name] = _changes(first, calls, valid)
        if not all(_same(first[index].h, calls[index].h) for index, _ in changed[name]):
            looped.add(name)
    found = []
    for name, places in changed.items():
        users = [each for each in changed.values() if set(each) & set(places)]
        if len(places) != 1 or len(users) != 1 or name in looped:
            continue
        sigma = drawing.distribution.gamma / math.sqrt(2.0) * scales[name]
        own = _found(exact, x, name, places[0], theta[name], moved[name], sigma)
        if own is not None:
            found.append(own)
    if not any(each.is_quantised for each in found):
        return None
    return NoisyWeights(_conditioned(exact, x, found, theta, drawing, scales), len(first))


def _scales(drawing: Drawing, count: int) -> Sequence[float]:
    return drawing.scales or (1.0,) * count


@dataclass(frozen=True)
class _Seen:
    """A call without its graph, and whether it has a row for each example."""

    h: Tensor
    arguments: Mapping[str, Tensor | None]
    by_row: bool


def _recorded(model: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]) -> list[_Seen] | None:
    """The calls of a pass; None if there is none."""
    seen = list[_Seen]()

    def keep(_: int, call: WeightCall) -> Tensor:
        result = call.result(call.weight, call.bias)
        by_row = result.ndim > 0 and len(result) == len(x) == len(call.h)
        copies = {
            name: None if own is None else own.clone() for name in (WEIGHT, BIAS) for own in [call.argument(name)]
        }
        seen.append(_Seen(call.h.clone(), copies, by_row))
        return result

    with torch.no_grad():
        pass_with(model, x, keep, parameters)
    return seen or None


def _valid(first: Sequence[_Seen], second: Sequence[_Seen]) -> set[tuple[int, str]]:
    """The arguments of calls with a row for each example that do not depend on the examples: their numbers differ."""
    return {
        (index, name)
        for index, (one, other) in enumerate(zip(first, second, strict=True))
        for name in (WEIGHT, BIAS)
        if one.by_row and other.by_row and _same(one.arguments[name], other.arguments[name])
    }


def _changes(first: Sequence[_Seen], second: Sequence[_Seen], valid: set[tuple[int, str]]) -> list[tuple[int, str]]:
    """The valid arguments that changed."""

    def changed(index: int, name: str) -> bool:
        return not _same(first[index].arguments[name], second[index].arguments[name])

    return [each for each in sorted(valid) if changed(*each)]


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


class _Stopped(Exception):
    """A pass has shown what it was made for."""


def _argument(model: nn.Module, x: Tensor, name: str, place: tuple[int, str], values: Tensor) -> Tensor:
    """What a call gets if a parameter has these values, of any shape."""
    found = list[Tensor]()

    def take(index: int, call: WeightCall) -> None:
        if index == place[0]:
            argument = call.argument(place[1])
            assert argument is not None
            found.append(argument.clone())
            raise _Stopped

    with suppress(_Stopped), torch.no_grad():  # the rest of the pass is not needed
        pass_with(model, x, take, {name: values})
    return found[0]


@dataclass(frozen=True)
class _Probe:
    """What a call gets as a function of one parameter, within the numbers that draws can reach.

    Its numbers are scaled to ±16.
    """

    model: nn.Module
    x: Tensor
    name: str
    place: tuple[int, str]
    theta: Tensor
    sigma: float

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest number."""
        reach = _FARTHEST * self.sigma
        return float(self.theta.min()) - reach, float(self.theta.max()) + reach

    @property
    def unit(self) -> float:
        """One of the scaled numbers."""
        return max(map(abs, self.limits)) / _REACH

    def argument(self, values: Tensor, *, transposed: bool) -> Tensor:
        """What the call gets, in the shape of the parameter."""
        found = _argument(self.model, self.x[:1], self.name, self.place, values.clamp(*self.limits))
        return found.mT if transposed else found

    def at_points(self, points: Tensor, *, transposed: bool, filled: bool) -> Tensor:
        """The function at some points: as a parameter of their shape, or as numbers of parameters of the true shape."""
        values = points.flatten() * self.unit
        if not filled:
            return self.argument((points * self.unit), transposed=transposed) / self.unit
        count = self.theta.numel()
        parts = []
        for part in values.split(count):
            whole = torch.cat([part, self.theta.flatten()[len(part) :]]).reshape(self.theta.shape)
            parts.append(self.argument(whole, transposed=transposed).flatten()[: len(part)])
        return torch.cat(parts).reshape(points.shape) / self.unit

    def function(self, *, transposed: bool, filled: bool) -> PiecewiseLinear | None:
        """The function, if it is elementwise and piecewise linear."""
        found = find_piecewise_linear(lambda points: self.at_points(points, transposed=transposed, filled=filled))
        if not isinstance(found, PiecewiseLinear):
            return None
        breaks, jumps = (tuple(self.unit * each for each in part) for part in (found.breaks, found.jumps))
        return replace(found, breaks=breaks, jumps=jumps, intercept=self.unit * found.intercept)

    def agrees(self, function: PiecewiseLinear | None, values: Sequence[Tensor], *, transposed: bool) -> bool:
        """Whether it is the function at parameters of the true shape."""
        if function is None:
            return False
        for each in values:
            inside = each.clamp(*self.limits)
            got = self.argument(inside, transposed=transposed)
            expected = function.values(inside, inside.new_zeros(()))[0]
            size = _AGREEMENT * self.unit
            if got.shape != inside.shape or not torch.allclose(got, expected, rtol=_AGREEMENT, atol=size):
                return False
        return True


def _found(
    model: nn.Module, x: Tensor, name: str, place: tuple[int, str], theta: Tensor, moved: Tensor, sigma: float
) -> NoisyWeight | None:
    """The function of a parameter; None if it is not elementwise and piecewise linear."""
    probe, orders = _Probe(model, x, name, place, theta, sigma), (False, True) if theta.ndim == 2 else (False,)
    for transposed in orders:
        if probe.agrees(_IDENTITY, (theta, moved), transposed=transposed):
            return NoisyWeight(name, *place, transposed, _IDENTITY)
    for filled in (False, True):  # the function may use the shape, and small parameters take many passes to fill
        for transposed in orders if theta.numel() >= _FEWEST_FILLED or not filled else ():
            function = probe.function(transposed=transposed, filled=filled)
            if function is not None and probe.agrees(function, (theta, moved), transposed=transposed):
                return NoisyWeight(name, *place, transposed, function)
    return None


def _conditioned(
    model: nn.Module,
    x: Tensor,
    found: Sequence[NoisyWeight],
    theta: Mapping[str, Tensor],
    drawing: Drawing,
    scales: Mapping[str, float],
) -> tuple[NoisyWeight, ...]:
    """Note for which quantised parameters the model stays the same if they move within the flat pieces."""
    generator, same = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for each in found:
        pieces = Pieces.of(each.function)
        if each.is_quantised and any(pieces.flat):
            spread = drawing.distribution.gamma / math.sqrt(2.0) * scales[each.name]
            share = torch.rand(theta[each.name].shape, generator=generator, dtype=torch.float64)
            same[each.name] = pieces.moved_within(theta[each.name], spread, share.to(theta[each.name].device))

    def unchanged(names: Sequence[str]) -> bool:
        own = {name: same[name] for name in names}
        with torch.no_grad():
            first, _ = pass_with(model, x, lambda _, __: None)
            second, _ = pass_with(model, x, lambda _, __: None, own)
        return torch.allclose(first, second, rtol=1e-9, atol=1e-9 * float(first.abs().max()))

    names = list(same) if unchanged(list(same)) else [name for name in same if unchanged([name])]
    return tuple(replace(each, conditioned=each.name in names) for each in found)


@dataclass(frozen=True)
class Pieces:
    """The pieces of a piecewise linear function.

    Attributes:
        breaks: between them.
        flat: which of the pieces, one more than breaks, are constant.
    """

    breaks: tuple[float, ...]
    flat: tuple[bool, ...]

    @classmethod
    def of(cls, function: PiecewiseLinear) -> "Pieces":
        """Return the pieces of a function."""
        slope, slopes = function.slope - 0.5 * sum(function.bends), list[float]()
        for bend in (0.0, *function.bends):
            slope += bend
            slopes.append(slope)
        size = max(map(abs, slopes)) + abs(function.slope)
        return cls(function.breaks, tuple(abs(each) <= 1e-9 * max(size, 1.0) for each in slopes))

    def _bounds(
        self, theta: Float64[Tensor, "*p"], values: Float64[Tensor, "*s p"], spread: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The standardised ends of the piece of each value, and whether it is flat."""
        breaks = torch.tensor(self.breaks, dtype=torch.float64, device=theta.device)
        ends = torch.cat([breaks.new_tensor([-math.inf]), breaks, breaks.new_tensor([math.inf])])
        piece = torch.bucketize(values, breaks)
        flat = torch.tensor(self.flat, device=theta.device)[piece]
        return (ends[piece] - theta) / spread, (ends[piece + 1] - theta) / spread, flat

    def moved_within(self, theta: Float64[Tensor, "*p"], spread: float, share: Float64[Tensor, "*p"]) -> Tensor:
        """Move values on flat pieces within them, by at most three standard deviations."""
        low, high, flat = self._bounds(theta, theta, spread)
        low, high = 0.99 * low.clamp(min=-3.0), 0.99 * high.clamp(max=3.0)
        return torch.where(flat, theta + spread * (low + share * (high - low)), theta)

    def conditional_normals(
        self, theta: Float64[Tensor, "*p"], normals: Float64[Tensor, "s *p"], spread: float
    ) -> Float64[Tensor, "s *p"]:
        """Return E[n | the function's value at θ + spread·n]: the mean of n over a flat piece, n on any other piece.

        Args:
            theta: θ.
            normals: n.
            spread: the standard deviation.
        """
        low, high, flat = self._bounds(theta, theta + spread * normals, spread)
        mass = torch.where(
            low > 0,
            torch.special.ndtr(-low) - torch.special.ndtr(-high),
            torch.special.ndtr(high) - torch.special.ndtr(low),
        )
        means = (torch.exp(-0.5 * low * low) - torch.exp(-0.5 * high * high)) / (math.sqrt(2.0 * math.pi) * mass)
        means = torch.minimum(torch.maximum(means, low), high)  # of narrow pieces, whose mass has few digits
        return torch.where(flat & (mass > 0), means, normals)
