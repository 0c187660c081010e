"""Find jumps of f on long chords through θ, from values alone.

At a small range, or with few examples, no jump may lie on the segments that the integrated gradient is checked on. A
chord θ + t·D n, −1 ≤ t ≤ 1, goes twice as far as the parameters are large, tensor by tensor, so that a unit changes its
sign on most of them. On an interval of width h the second difference f(b) − 2f(m) + f(a) is O(h²) if f is smooth and
O(h) at a kink; at a jump it keeps its size. The interval with the largest one is halved until it is small, or h is.
Far out, f of a deep network grows by many orders of magnitude, and what is continuous, such as a gate, may be too steep
to be told from a jump: a chord along which f grows too much is made shorter.
No gradient is taken, so gradients that are wrong in other ways are not found here (`nntk_dist.planning.jumps`).

Axes: n examples, c outputs, k intervals, P parameters.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from nntk_dist.models.evaluation import Evaluator
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import CHORD_GROUP, Stream

_EXAMPLES = 8
_REACH = 2.0  # in units of each tensor's root mean square
_MOST_GROWTH = 100.0  # of |f|, from the middle eighth of a chord to its ends
_SHORTENING, _SHORTENINGS = 0.25, 4
_HALVINGS = 30  # a kink is then worth less than 1e-9 of what it was
# Relative to an output's range over the chord: far above rounding, even of parts that compute in float32.
_VISIBLE = 1e-3

Values = Callable[[Sequence[float]], Float64[Tensor, "k n c"]]


def largest_jump(
    model: nn.Module,
    space: ParameterSpace,
    x: Tensor,
    seed: int,
    *,
    num_chords: int = 4,
    intervals: int = 16,
    stacked: bool = False,
) -> float:
    """Return the size of a jump of f on one of some chords, relative to that output's range there; 0 without one.

    A chord whose ends are not finite, or more than a hundred times as large as f near θ, is made a quarter as long, up
    to four times. A jump smaller than 1/1000 of the range is not seen. Cost: at most 97 forward passes of 8 examples
    for a chord, about half as many for a model with kinks, and 4 for each time that it is made shorter.

    Args:
        model: a model in float64.
        space: the parameters that the chords move.
        x: examples in float64; at most 8 are used.
        seed: of the chords' directions.
        num_chords: how many chords.
        intervals: into which a chord is divided at first.
        stacked: whether several points are evaluated in one call, if vmap takes the model.
    """
    x = x[:_EXAMPLES]
    evaluator = Evaluator(model, space, stacked)
    scale = _scales(space.values(model))
    for number in range(CHORD_GROUP, CHORD_GROUP + num_chords):
        group = torch.tensor([number], dtype=torch.int64, device=x.device)
        direction = normal(seed, Stream.PROBE, group, 0, space.num_parameters)[0] * scale

        def values(points: Sequence[float], direction: Tensor = direction) -> Tensor:
            steps = torch.tensor(points, dtype=direction.dtype, device=direction.device)
            together = [steps] if stacked else steps.split(1)  # a model of many parameters has no memory for all
            return torch.cat([evaluator.perturbed(x, own[:, None] * direction).double() for own in together])

        jump = _jump_along(values, intervals)
        if jump > 0:
            return jump
    return 0.0


def _scales(base: dict[str, Tensor]) -> Float64[Tensor, " P"]:
    """The reach for each parameter: in proportion to the size of its tensor, or of all tensors if that is zero."""
    squares = torch.stack([value.square().sum() for value in base.values()])
    counts = torch.tensor([value.numel() for value in base.values()], device=squares.device)
    sizes, whole = (squares / counts).sqrt(), (squares.sum() / counts.sum()).sqrt()
    return (_REACH * torch.where(sizes > 0, sizes, whole)).repeat_interleave(counts)


def _reach(values_at: Values) -> float:
    """How far along a chord f does not grow too much, from −reach to reach; 0 if it does everywhere."""
    reach = 1.0
    for _ in range(_SHORTENINGS + 1):
        sizes = values_at([-reach, -reach / 8, reach / 8, reach]).abs().amax((1, 2))
        near, far = float(sizes[1:3].max()), float(sizes.max())
        if math.isfinite(far) and (far <= _MOST_GROWTH * near or near == 0.0):
            return reach
        reach *= _SHORTENING
    return 0.0


def _jump_along(values_at: Values, num_intervals: int) -> float:
    """The relative second difference that halving leaves, 0 if it becomes invisible."""
    reach = _reach(values_at)
    points = [reach * (step / num_intervals - 1.0) for step in range(2 * num_intervals + 1)]
    values = values_at(points)
    if not bool(torch.isfinite(values).all()):
        return 0.0
    ranges = values.amax(0) - values.amin(0)
    # An output that hardly moves is compared with those that do: its own range may be rounding.
    unit = torch.maximum(ranges, _VISIBLE * ranges.max())
    if float(unit.max()) == 0.0:
        return 0.0

    def bend(first: Tensor, middle: Tensor, last: Tensor) -> float:
        return float(((last - 2.0 * middle + first).abs() / unit).nan_to_num(nan=math.inf).max())

    bends = [bend(values[i], values[i + 1], values[i + 2]) for i in range(0, 2 * num_intervals, 2)]
    worst = max(range(num_intervals), key=bends.__getitem__)
    kept = list(zip(points, values, strict=True))[2 * worst : 2 * worst + 3]
    largest = bends[worst]
    for _ in range(_HALVINGS):
        if largest <= _VISIBLE:
            return 0.0
        halves, intervals = [], list(pairwise(kept))
        middles = values_at([0.5 * (a + b) for (a, _), (b, _) in intervals])
        for ((a, first), (b, last)), middle in zip(intervals, middles, strict=True):
            halves.append((bend(first, middle, last), [(a, first), (0.5 * (a + b), middle), (b, last)]))
        largest, kept = max(halves, key=lambda half: half[0])
    return largest if _VISIBLE < largest < math.inf else 0.0
