"""The smooth pieces of a function: where it or one of its first derivatives jumps, found by bisection.

An interval is smooth if a polynomial of degree 7 fits, and fits much better than in the interval that it is half of: a
jump in a derivative of low order cannot do so. Nothing is smoothed here.

Axes: p intervals.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from nntk_dist.smoothing.elementwise import OFFSET, Function
from nntk_dist.smoothing.piecewise_linear import distinct

REACH = 32.0  # breaks are searched for up to here; farther out only if the function is not curved at every scale
_FAR_REACH, _FAR_INTERVALS = 16384.0, 512
WIDEST = 1.0 / 32
_SHIFT = (0.37 + OFFSET) * WIDEST  # a break at a round number is well inside an interval
_MOST_INTERVALS = 1 << 13  # that are not smooth at one time
_MOST_BREAKS = 256
_FITS = 1e-9  # relative to the size of the function
_ROUNDING = 1e-13
_IMPROVES = 1.0 / 30  # a jump in the third derivative gives 1/8 when an interval is halved, a smooth function 1/256
_NARROWEST = 1e-13
_NUM_SHARPEST = 128


@dataclass(frozen=True)
class Pieces:
    """How a function is made of smooth pieces.

    Attributes:
        breaks: where it is not smooth, ascending.
        sharpest: the places where the narrowest intervals were needed.
        width: of the narrowest of them: within it, the function is a polynomial of degree 7 to rounding.
    """

    breaks: tuple[float, ...]
    sharpest: tuple[float, ...]
    width: float


def find_pieces(function: Function) -> Pieces | None:
    """Return the smooth pieces of an elementwise function; None if it has none, or no end of them."""
    grid = torch.arange(-REACH, REACH + WIDEST, WIDEST, dtype=torch.float64) + _SHIFT
    near = _searched(function, grid)
    if near is None:
        return None
    far = REACH * (_FAR_REACH / REACH) ** torch.linspace(0.0, 1.0, _FAR_INTERVALS, dtype=torch.float64)
    breaks = list(near.breaks)
    for side in (-far.flip(0) + _SHIFT, far + _SHIFT):
        found = _searched(function, side)
        breaks += found.breaks if found is not None else ()
    return Pieces(tuple(distinct(breaks)), near.sharpest, near.width)


def _searched(function: Function, grid: Float64[Tensor, " p"]) -> Pieces | None:
    left, right = grid[:-1], grid[1:]
    size = float(function(torch.linspace(-1.0, 1.0, 65, dtype=torch.float64) + OFFSET).abs().max())
    breaks, sharpest, width = list[float](), list[float](), WIDEST
    error, floor = _misfit(function, left, right, size)
    rough = error > _FITS * floor
    left, right, error = left[rough], right[rough], error[rough]
    while len(left):
        if len(left) > _MOST_INTERVALS or len(breaks) > _MOST_BREAKS:
            return None
        middle, quarter = 0.5 * (left + right), 0.25 * (right - left)
        halves = [(left, middle), (middle, right), (middle - quarter, middle + quarter)]
        fits, rounds = [], []
        for low, high in halves:
            own, floor = _misfit(function, low, high, size)
            fits.append((own <= _FITS * floor) & (own <= _IMPROVES * error))
            rounds.append(own <= _ROUNDING * floor)
        smooth = fits[0] & fits[1] & fits[2]
        fine = [fit | small for fit, small in zip(fits, rounds, strict=True)]
        narrow = right - left < _NARROWEST * middle.abs().clamp(min=1.0)
        ended = ~smooth & (narrow | (fine[0] & fine[1] & fine[2]))
        breaks += middle[ended].tolist()
        sharpest += middle[smooth].tolist()[: 2 * _NUM_SHARPEST]
        if bool(smooth.any()):
            width = min(width, float((right - left)[smooth].min()))
        going = ~smooth & ~ended
        kept = [
            going & ~fine[0],
            going & ~fine[1],
            going & fine[0] & fine[1],
        ]  # a break in the middle: its neighbourhood
        pairs = [(low[keep], high[keep]) for (low, high), keep in zip(halves, kept, strict=True)]
        left, right = (torch.cat(ends) for ends in zip(*pairs, strict=True))
        error = _misfit(function, left, right, size)[0] if len(left) else left
    return Pieces(tuple(distinct(breaks)), tuple(sharpest[-_NUM_SHARPEST:]), width)


def _interpolation() -> tuple[Float64[Tensor, " k"], Float64[Tensor, " m"], Float64[Tensor, "m k"]]:
    """Chebyshev points of [0, 1], points in between and at the ends, and the matrix from values at one to the other."""
    nodes = 0.5 - 0.5 * torch.cos((torch.arange(8, dtype=torch.float64) + 0.5) * (torch.pi / 8))
    checks = torch.cat([torch.zeros(1), 0.5 * (nodes[1:] + nodes[:-1]), torch.ones(1)])
    powers = torch.linalg.solve(torch.vander(2 * nodes - 1).T, torch.vander(2 * checks - 1, 8).T).T
    return nodes, checks, powers


def _misfit(
    function: Function, left: Float64[Tensor, " p"], right: Float64[Tensor, " p"], size: float
) -> tuple[Float64[Tensor, " p"], Float64[Tensor, " p"]]:
    """By how much a polynomial of degree 7 misses the function in each interval, and the function's size."""
    nodes, checks, matrix = _interpolation()
    points = left[:, None] + torch.cat([nodes, checks]) * (right - left)[:, None]
    values = function(points)
    misses = (values[:, 8:] - values[:, :8] @ matrix.T).abs().amax(1)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("not finite")
    return misses, values.abs().amax(1).clamp(min=size)
