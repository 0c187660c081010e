"""The trial that finds how many nodes the quadrature of a piecewise smooth function takes for each s.

Rules of increasing size are compared with finer ones, at means where the function needs the finest resolution.

Axes: m means.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Float64
from torch import Tensor

from nntk_dist.smoothing.elementwise import OFFSET, Function, in_double, is_elementwise
from nntk_dist.smoothing.pieces import Pieces, find_pieces
from nntk_dist.smoothing.piecewise_smooth import LEVELS, Pair, PiecewiseSmooth, by_panels, by_rule
from nntk_dist.smoothing.rules import PANEL_SIZES, PLAIN_SIZES, WINDOW, Rule, panel_rule, plain_rule, reference_rule

_VALUE_ERROR, _SLOPE_ERROR = 1e-8, 3e-8  # relative: below the rounding of float32
_LEAST_SIZE = 0.01  # of a function near a mean, relative to that near others
_REFERENCE_SHARE = 0.01  # of these errors, by which references may differ
_COARSEST_REFERENCE = 40
_MEANS = 128
_STENCILS = 16  # in the width of the narrowest piece
_GROWTH = 2.0**4.5  # of a function over an octave, far out: not much more than x⁴
_LAST_OCTAVE = 5  # of log2 s, up to which rules are tried
_NEEDED_OCTAVE = -3  # of log2 s, up to which a rule must be found
_STEEP = 1e3  # a function near a break, relative to its size


def find_piecewise_smooth(function: Function) -> PiecewiseSmooth | None:
    """Return how to smooth a function by quadrature; None if it is not elementwise, not smooth, or grows too fast.

    Args:
        function: takes and returns a tensor; a module is copied to float64.

    Example:
        >>> find_piecewise_smooth(torch.nn.Hardswish()).text
        'smooth but for 2 breaks, by quadrature'
    """
    function = in_double(function)
    try:
        with torch.no_grad():
            if not is_elementwise(function) or not _is_tame(function):
                return None
            pieces = find_pieces(function)
            return None if pieces is None or _is_steep(function, pieces) else _with_rules(function, pieces)
    except Exception:  # a module's code may raise anything: it is then not the function that is searched for
        return None


def _is_tame(function: Function) -> bool:
    """Whether a function is finite and grows like a polynomial of low degree."""
    unit = torch.linspace(1.0, 2.0, 257, dtype=torch.float64) + OFFSET
    sides = torch.stack([unit, -unit])
    sizes = [function(sides * 2.0**k).abs().amax(1) for k in range(13, 20)]
    growing = [bool((later > _GROWTH * (size + 1e-3)).any()) for size, later in pairwise(sizes)]
    return bool(torch.isfinite(torch.stack(sizes)).all()) and not any(growing)


def _is_steep(function: Function, pieces: Pieces) -> bool:
    """Whether a function has a pole at one of its breaks."""
    if not pieces.breaks:
        return False
    places = torch.tensor(pieces.breaks, dtype=torch.float64)
    offsets = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    near, apart = (
        function(places + size * offsets * places.abs().clamp(min=1.0)).abs().amax(0) for size in (1e-10, 0.1)
    )
    return bool((near > _STEEP * (apart + 1.0)).any())


def _with_rules(function: Function, pieces: Pieces) -> PiecewiseSmooth | None:
    spacing = pieces.width / _STENCILS
    first = math.floor(LEVELS * math.log2(spacing / 4))
    plain, panel = list[int](), list[int]()
    rules = {size: panel_rule(size) for size in (*PANEL_SIZES, 2 * PANEL_SIZES[-1])} if pieces.breaks else {}
    breaks = torch.tensor(pieces.breaks, dtype=torch.float64)
    sharpest = torch.tensor(pieces.sharpest, dtype=torch.float64)
    for level in range(first, LEVELS * _LAST_OCTAVE + 1):
        spread = 2.0 ** (level / LEVELS)
        reach = 8.0 + (WINDOW + 3.0 if pieces.breaks else 1.0) * spread  # also means whose windows hold no break
        grid = torch.linspace(-reach, reach, _MEANS, dtype=torch.float64) + OFFSET
        means = torch.cat([grid, sharpest])
        if len(breaks):
            means = means[((means[:, None] - breaks).abs() > WINDOW * spread).all(1)]
        size = _plain_size(function, means, spread, plain[-1] if plain else 0)
        if size is None:
            break
        plain.append(size)
        if len(breaks):
            size = _panel_size(function, pieces.breaks, rules, spread, panel[-1] if panel else 0)
            if size is None:
                plain.pop()
                break
            panel.append(size)
    if first + len(plain) - 1 < LEVELS * _NEEDED_OCTAVE:
        return None
    return PiecewiseSmooth(function, pieces.breaks, spacing, first, tuple(plain), tuple(panel))


def _plain_size(function: Function, means: Float64[Tensor, " m"], spread: float, fewest: int) -> int | None:
    """The nodes that means without breaks in their windows need; None if no rule is good enough."""
    if not len(means):
        return max(fewest, PLAIN_SIZES[0])
    spreads, bound = _spreads(spread, len(means)), _Bound(function, means, spread)
    fine = max(_COARSEST_REFERENCE, 2 * fewest)
    coarse, exact = (by_rule(function, reference_rule(size), means, spreads) for size in (fine, 2 * fine))
    while not bound.holds(coarse, exact, _REFERENCE_SHARE):
        if fine > 2 * max(PLAIN_SIZES):
            return None
        fine *= 2
        coarse, exact = exact, by_rule(function, reference_rule(2 * fine), means, spreads)
    sizes = (size for size in PLAIN_SIZES if size >= fewest)
    return next((n for n in sizes if bound.holds(by_rule(function, plain_rule(n), means, spreads), exact)), None)


def _panel_size(
    function: Function, breaks: tuple[float, ...], rules: Mapping[int, Rule], spread: float, fewest: int
) -> int | None:
    """The nodes of a panel that means near breaks need; None if no rule is good enough."""
    some = torch.tensor(breaks[:: max(1, len(breaks) // 8)], dtype=torch.float64)
    means = (some[:, None] + spread * torch.linspace(-WINDOW, WINDOW, 15, dtype=torch.float64)).flatten()
    spreads, bound = _spreads(spread, len(means)), _Bound(function, means, spread)
    sizes = [size for size in PANEL_SIZES if size >= fewest]
    for size, other in zip(sizes, [*sizes[2:], 2 * sizes[-1], 2 * sizes[-1]], strict=True):
        own, larger = (by_panels(function, breaks, rules[n], means, spreads) for n in (size, other))
        if bound.holds(own, larger):
            return size
    return None


def _spreads(largest: float, count: int) -> Float64[Tensor, " m"]:
    """Numbers all over a level: a trapezoid rule may be good for its largest s alone, if φ is periodic."""
    golden = 0.5 * (math.sqrt(5.0) - 1.0)
    shares = torch.arange(count, dtype=torch.float64) * golden % 1.0
    return largest * 2.0 ** (-shares / LEVELS)


class _Bound:
    """The errors that are allowed for some means."""

    def __init__(self, function: Function, means: Float64[Tensor, " m"], spread: float) -> None:
        reach = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)[:, None] * spread
        sizes = function(means + reach).abs().amax(0)
        self.sizes = sizes.clamp(min=_LEAST_SIZE * float(sizes.max()))
        self.rounding = (1e-15 / spread + _SLOPE_ERROR / (10.0 * max(spread, 1.0))) * self.sizes

    def holds(self, found: Pair, exact: Pair, share: float = 1.0) -> bool:
        """Whether values and slopes are those of a better rule, to a share of the bound."""
        steepest = exact[1].abs().clamp(min=float(exact[1].abs().quantile(0.9)))
        right = (found[0] - exact[0]).abs() <= share * _VALUE_ERROR * self.sizes
        right &= (found[1] - exact[1]).abs() <= share * _SLOPE_ERROR * steepest + self.rounding
        return bool(right.all())
