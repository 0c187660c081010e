"""Piecewise linear functions, with jumps and kinks: found by bisection, and smoothed in closed form.

With breaks b, jumps J_b, changes of slope D_b, and the mean α + β x of the first and the last line,

    φ(x) = α + β x + ½ Σ_b (J_b + D_b (x − b)) sign(x − b),
    φ̃(a, s) = α + β a + ½ Σ_b [(J_b + D_b (a − b)) erf(t_b/√2) + 2 D_b s ϕ(t_b)],    t_b = (a − b)/s,
    φ̃'(a, s) = β + ½ Σ_b [D_b erf(t_b/√2) + 2 J_b ϕ(t_b)/s],

ϕ the standard normal density. Sign, step, ReLU, hard tanh and quantisers are such functions.

Axes: b breaks.
"""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.smoothing.elementwise import OFFSET, Function, in_double, is_elementwise

_REACH = 1 << 14  # breaks are searched for from −reach to reach, finely within ±32
_FINE_REACH, _FINE_STEP = 32.0, 1.0 / 128
_MOST_BREAKS = 1024
_MOST_INTERVALS = 4096  # that are not linear at one time: a curved function has no end of them
_LINEAR = 1e-7  # deviation from a line, relative to the extent of the numbers
_ROUNDING = 1e-14
_NARROWEST, _ONE_BREAK = 1e-13, 1e-10  # relative to the distance from 0, or to 1
_INNER = (0.11, 0.29, 0.5, 0.63, 0.87)  # where an interval is compared with the line through its ends


@dataclass(frozen=True)
class PiecewiseLinear:
    """A piecewise linear function; see the module for the symbols.

    Attributes:
        breaks: b, ascending.
        jumps: J.
        bends: D, the changes of slope.
        intercept: α.
        slope: β.
    """

    breaks: tuple[float, ...]
    jumps: tuple[float, ...]
    bends: tuple[float, ...]
    intercept: float
    slope: float

    @property
    def is_line(self) -> bool:
        """Whether it has no breaks."""
        return not self.breaks

    @property
    def text(self) -> str:
        """What it is, in words."""
        jumps = sum(jump != 0.0 for jump in self.jumps)
        return f"piecewise linear, {jumps} jumps and {len(self.breaks) - jumps} kinks"

    @property
    def levels(self) -> tuple[float, ...]:
        """The values between the breaks, in their order; none if the function is not constant there."""
        if self.slope or any(self.bends):
            return ()
        first = self.intercept - 0.5 * sum(self.jumps)
        return tuple(accumulate(self.jumps, initial=first))

    def values(
        self, a: Float[Tensor, "*shape"], s: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return φ̃(a, s) and φ̃'(a, s), computed in float64 and rounded to the dtype of a.

        With s = 0 they are φ(a), at a break the mean of both sides, and the slope there.

        Args:
            a: means.
            s: standard deviations, 0 or more, of a shape that broadcasts to that of a.
        """
        mean, spread = a.double(), s.double().expand(a.shape)
        smooth, slope = self.slope * mean + self.intercept, torch.full_like(mean, self.slope)
        wide = spread > 0
        scale = torch.where(wide, spread, 1.0)
        for place, jump, bend in zip(self.breaks, self.jumps, self.bends, strict=True):
            distance = mean - place
            t = distance / scale
            sides = torch.where(wide, torch.erf(t / math.sqrt(2.0)), distance.sign())
            density = torch.where(wide, torch.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi), 0.0)
            if bend:
                smooth += 0.5 * bend * distance * sides + bend * spread * density
                slope += 0.5 * bend * sides
            if jump:
                smooth += 0.5 * jump * sides
                slope += jump * density / scale
        return smooth.to(a.dtype), slope.to(a.dtype)


def find_piecewise_linear(function: Function) -> PiecewiseLinear | None:
    """Return a function as a piecewise linear one; None if it is not, not elementwise, or not deterministic.

    Breaks are searched for within ±16,384, more finely within ±32, where several of them may lie within 1/128. Beyond,
    one in an interval of 1/200 of its distance from 0 may hide another.

    Args:
        function: takes and returns a tensor; a module is copied to float64.

    Example:
        >>> find_piecewise_linear(torch.nn.ReLU())
        PiecewiseLinear(breaks=(0.0,), jumps=(0.0,), bends=(1.0,), intercept=0.0, slope=0.5)
    """
    function = in_double(function)
    try:
        with torch.no_grad():
            if not is_elementwise(function):
                return None
            breaks = linear_breaks(function, _grid())
            if breaks is None or len(breaks) > _MOST_BREAKS:
                return None
            found = with_lines(function, breaks, -float(_REACH), float(_REACH))
            return found if _agrees(found, function) else None
    except Exception:  # a module's code may raise anything: it is then not the function that is searched for
        return None


def _grid() -> Float64[Tensor, " p"]:
    fine = torch.arange(-_FINE_REACH, _FINE_REACH, _FINE_STEP, dtype=torch.float64) + OFFSET * _FINE_STEP
    far = _FINE_REACH * (_REACH / _FINE_REACH) ** torch.linspace(0.0, 1.0, 1250, dtype=torch.float64)
    return torch.cat([-far.flip(0), fine[(fine > -_FINE_REACH) & (fine < _FINE_REACH)], far])


def linear_breaks(function: Function, grid: Float64[Tensor, " p"]) -> list[float] | None:
    """Return the places between the points of a grid at which a function leaves a line; None if it is curved."""
    breaks = list[float]()
    left, right = grid[:-1], grid[1:]
    bent = ~is_linear(function, left, right)
    left, right = left[bent], right[bent]
    while len(left):
        if len(left) > _MOST_INTERVALS:
            return None
        middle = 0.5 * (left + right)
        in_left, in_right = ~is_linear(function, left, middle), ~is_linear(function, middle, right)
        narrow = right - left < _NARROWEST * torch.maximum(middle.abs(), torch.ones(()))
        ended = narrow | ~(in_left | in_right)  # halves that are linear to rounding, or to the break in the middle
        breaks += middle[ended].tolist()
        in_left, in_right = in_left & ~ended, in_right & ~ended
        left, right = torch.cat([left[in_left], middle[in_right]]), torch.cat([middle[in_left], right[in_right]])
    return distinct(breaks)


def distinct(breaks: list[float]) -> list[float]:
    """Return breaks in ascending order; neighbours that are one to rounding are one, and one at 0 is 0."""
    result = list[float]()
    for place in sorted(breaks):
        place = 0.0 if abs(place) < 1e-11 else place
        if not result or place - result[-1] > _ONE_BREAK * max(1.0, abs(place)):
            result.append(place)
    return result


def is_linear(function: Function, left: Float64[Tensor, " p"], right: Float64[Tensor, " p"]) -> Tensor:
    """Return whether the function lies on the line through its values at the ends of each interval."""
    shares = torch.tensor((0.0, *_INNER, 1.0), dtype=torch.float64)
    points = left[:, None] + shares * (right - left)[:, None]
    values = function(points)
    line = values[:, :1] + shares * (values[:, -1:] - values[:, :1])
    width, reach = (right - left)[:, None], torch.maximum(left.abs(), right.abs())[:, None]
    extent = values.amax(1, keepdim=True) - values.amin(1, keepdim=True)
    rounding = _ROUNDING * (values.abs().amax(1, keepdim=True).clamp(min=1.0) + extent * reach / width)
    return ((values - line).abs() <= _LINEAR * extent + rounding).all(1)


def with_lines(function: Function, breaks: list[float], low: float, high: float) -> PiecewiseLinear:
    """Return the piecewise linear function with given breaks between low and high, and the values of a function."""
    ends = torch.tensor([low, *breaks, high], dtype=torch.float64)
    first, last = ends[:-1] + 0.25 * ends.diff(), ends[:-1] + 0.75 * ends.diff()
    at_first, at_last = function(first[None])[0], function(last[None])[0]
    slopes = (at_last - at_first) / (last - first)
    slopes = torch.where(slopes.abs() < 1e-9, 0.0, slopes)
    middles = 0.5 * (at_first + at_last) - slopes * 0.5 * (first + last)  # the intercept of each line
    places = torch.tensor(breaks, dtype=torch.float64)
    bends = slopes.diff()
    jumps = middles.diff() + bends * places
    size = max(1.0, float(middles.abs().max()))
    bends, jumps = (torch.where(part.abs() < 1e-9 * size, 0.0, part) for part in (bends, jumps))
    intercept = 0.5 * float(middles[0] + middles[-1]) - 0.0
    slope = 0.5 * float(slopes[0] + slopes[-1])
    return PiecewiseLinear(tuple(breaks), tuple(jumps.tolist()), tuple(bends.tolist()), intercept, slope)


def _agrees(found: PiecewiseLinear, function: Function) -> bool:
    """Whether it has the function's values, also between the points that were tried and far out."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(4, 4096, generator=generator, dtype=torch.float64) * 2.0 - 1.0
    points = (unit * torch.tensor([[1.0], [8.0], [200.0], [1e6]])).flatten()
    for place in found.breaks[:: max(1, len(found.breaks) // 64)]:
        points = torch.cat([points, place + unit[0, :16] * 1e-3])
    values, expected = function(points[None])[0], found.values(points, torch.zeros(()))[0]
    size = values.abs().clamp(min=1.0) * (1.0 + points.abs() * 1e-3)
    return bool(torch.isfinite(values).all()) and bool(((values - expected).abs() <= 1e-7 * size).all())
