"""Staircases without end: a line plus a periodic piecewise linear function, found by bisection, smoothed exactly.

Rounding to multiples, floor, fractional parts and triangle waves are such functions. With the period p, the mean slope
β and, in each period, breaks b with jumps J_b and changes of slope D_b,

    φ(x) = β x + Σ_k q_k exp(iω_k x),   ω_k = 2πk/p,   q_k = −(1/p) Σ_b (D_b/ω_k² + i J_b/ω_k) exp(−iω_k b)  (k ≠ 0),
    φ̃(a, s) = β a + Σ_k q_k exp(iω_k a − ω_k² s²/2).

For s > p/4, four harmonics give it to rounding. For a smaller s only the breaks of the periods around a matter: a is
moved to the first period, and the closed form of piecewise linear functions is used.

Axes: b breaks of one period, k harmonics.
"""

import cmath
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nntk_dist.smoothing.elementwise import OFFSET, Function, in_double, is_elementwise
from nntk_dist.smoothing.piecewise_linear import PiecewiseLinear, is_linear, linear_breaks, with_lines

_COPIES = 2  # of a period on either side: for s = p/4 more than 8 s
_NARROW = 0.25  # of a period
_HARMONICS = 4  # the fifth is below 1e-13 of the jumps
_REGIONS = tuple(2.0**k for k in range(-8, 13))  # around 0, in which periods are searched for
_POINTS, _FEWEST, _MOST = 513, 8, 64  # of a region; breaks in it
_SAME = 1e-8


@dataclass(frozen=True)
class PeriodicPiecewiseLinear:
    """A line plus a periodic piecewise linear function; see the module for the symbols.

    Attributes:
        period: p.
        slope: β.
        mean: q_0.
        harmonics: q_k, k > 0.
        near: φ around its first period, [0, p).
        num_breaks: breaks in each period.
    """

    period: float
    slope: float
    mean: float
    harmonics: tuple[complex, ...]
    near: PiecewiseLinear
    num_breaks: int

    @property
    def is_line(self) -> bool:
        """It has breaks."""
        return False

    @property
    def text(self) -> str:
        """What it is, in words."""
        return f"periodic and piecewise linear, {self.num_breaks} breaks in each {self.period:.4g}"

    def values(
        self, a: Float[Tensor, "*shape"], s: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return φ̃(a, s) and φ̃'(a, s); see `Smoothing.values`."""
        mean, spread = a.double(), s.double().expand(a.shape)
        wide = spread > _NARROW * self.period
        periods = torch.floor(mean / self.period)
        small = torch.where(wide, 0.0, spread)
        smooth, slope = self.near.values(mean - periods * self.period, small)
        smooth = smooth + periods * (self.slope * self.period)
        if bool(wide.any()):
            large = torch.where(wide, spread, self.period)
            far, far_slope = self.mean + self.slope * mean, torch.full_like(mean, self.slope)
            for k, coefficient in enumerate(self.harmonics, start=1):
                frequency = 2.0 * math.pi * k / self.period
                size = 2.0 * torch.exp(-0.5 * (frequency * large).square())
                angle = frequency * (mean - periods * self.period)
                cosine, sine = size * angle.cos(), size * angle.sin()
                far += coefficient.real * cosine - coefficient.imag * sine
                far_slope -= frequency * (coefficient.real * sine + coefficient.imag * cosine)
            smooth, slope = torch.where(wide, far, smooth), torch.where(wide, far_slope, slope)
        return smooth.to(a.dtype), slope.to(a.dtype)


def find_periodic(function: Function) -> PeriodicPiecewiseLinear | None:
    """Return a function as a line plus a periodic piecewise linear one; None if it is not, or not elementwise.

    Periods from 1/1,000 to 1,000 are found.

    Args:
        function: takes and returns a tensor; a module is copied to float64.

    Example:
        >>> find_periodic(torch.round).text
        'periodic and piecewise linear, 1 breaks in each 1'
    """
    function = in_double(function)
    try:
        with torch.no_grad():
            found = _found(function) if is_elementwise(function) else None
            return found if found is not None and _agrees(found, function) else None
    except Exception:  # a module's code may raise anything: it is then not the function that is searched for
        return None


def _found(function: Function) -> PeriodicPiecewiseLinear | None:
    """Search regions around 0, each twice the one before, until one holds enough breaks that repeat."""
    for reach in _REGIONS:
        grid = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64) * (1.0 + OFFSET) + OFFSET * reach / _POINTS
        bent = int((~is_linear(function, grid[:-1], grid[1:])).sum())
        if bent < _FEWEST // 2:
            continue
        breaks = linear_breaks(function, grid)
        if breaks is None or len(breaks) > _MOST:
            return None
        if len(breaks) < _FEWEST:
            continue
        pieces = with_lines(function, breaks, float(grid[0]), float(grid[-1]))
        count = _breaks_of_a_period(pieces)
        if count is not None:
            return _with_period(function, pieces, count)
    return None


def _breaks_of_a_period(pieces: PiecewiseLinear) -> int | None:
    """After how many breaks they repeat, with their jumps and bends; None if they do not, at least three times."""
    rows = torch.tensor([pieces.breaks, pieces.jumps, pieces.bends], dtype=torch.float64)
    for count in range(1, rows.shape[1] // 3 + 1):
        distance = rows[0, count:] - rows[0, :-count]
        same = bool(((distance - distance[0]).abs() <= _SAME * distance[0]).all())
        size = rows[1:].abs().amax(1, keepdim=True)
        if same and bool(((rows[1:, count:] - rows[1:, :-count]).abs() <= _SAME * size).all()):
            return count
    return None


def _with_period(function: Function, pieces: PiecewiseLinear, count: int) -> PeriodicPiecewiseLinear:
    """The function whose breaks repeat after `count` of them."""
    places = torch.tensor(pieces.breaks, dtype=torch.float64)
    repeats = (len(places) - 1) // count
    period = float(places[repeats * count] - places[0]) / repeats
    middle = int(places.abs().argmin())
    first = min(max(middle, 0), len(places) - count - 1)
    own = places[first : first + count]
    jumps, bends = (
        torch.tensor(part, dtype=torch.float64)[first : first + count] for part in (pieces.jumps, pieces.bends)
    )
    # midpoints of the segments of one period, where φ has the mean of its line
    ends = torch.cat([own, own[:1] + period])
    middles = 0.5 * (ends[1:] + ends[:-1])
    now, later = function(middles[None])[0], function(middles[None] + period)[0]
    slope = float((later - now).mean()) / period
    mean = float(((now - slope * middles) * ends.diff()).sum()) / period
    harmonics = []
    for k in range(1, _HARMONICS + 1):
        frequency = 2.0 * math.pi * k / period
        terms = zip(own.tolist(), jumps.tolist(), bends.tolist(), strict=True)
        parts = (
            cmath.exp(-1j * frequency * b) * (bend / frequency**2 + 1j * jump / frequency) for b, jump, bend in terms
        )
        harmonics.append(-sum(parts) / period)
    start = own - torch.floor(own / period) * period
    copies = torch.arange(-_COPIES, _COPIES + 1, dtype=torch.float64)[:, None] * period
    around = sorted((start + copies).flatten().tolist())
    low, high = around[count - 1] - period, around[-count] + period
    near = with_lines(function, around, low, high)
    return PeriodicPiecewiseLinear(period, slope, mean, tuple(harmonics), near, count)


def _agrees(found: PeriodicPiecewiseLinear, function: Function) -> bool:
    """Whether it has the function's values in its first and in far periods."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(4, 4096, generator=generator, dtype=torch.float64) * 2.0 - 1.0
    points = (unit * torch.tensor([[1.0], [8.0], [200.0], [1e4]]) * found.period).flatten()
    values, expected = function(points[None])[0], found.values(points, torch.zeros(()))[0]
    size = values.abs() + max(abs(coefficient) for coefficient in found.harmonics)
    return bool(((values - expected).abs() <= 1e-7 * size).all())
