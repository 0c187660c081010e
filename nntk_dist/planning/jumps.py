"""Find out whether f jumps in its parameters, so that `autodiff` would be silently wrong.

On a segment from θ to θ + z a locally Lipschitz f satisfies f(θ+z) − f(θ) = ∫₀¹ ∇f(θ+tz)·z dt; a jump (sign, round,
argmax, also behind a straight-through gradient) breaks the equality for any number of points, and so does a gradient
that the model's code cuts off. Long chords find rare jumps, and tell a jump from a wrong gradient
(`nntk_dist.planning.chords`). Everything runs in float64.

Axes: n examples, c outputs, k points of a segment, P parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.func import vmap

from nntk_dist.errors import Unavailable
from nntk_dist.models.evaluation import in_float64, outputs, trying
from nntk_dist.models.noise import is_random
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.models.passes import twice_differentiable
from nntk_dist.planning.chords import largest_jump
from nntk_dist.planning.effort import Effort
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream

# Further segments reach at least this far, relative to |θ|: at a tiny γ no jump may lie on the segments of the run.
_LONG_REACH = 0.1
_MOST_GRADIENTS = 256
_NARROWEST = 2.0**-30  # an interval whose defect is worth nothing there if it holds a kink
_SUMS = 8
# Points of a segment are evaluated in one call if parameters and inputs are no more numbers: the overhead of a call
# is then most of its time. The rule is not timed, so that a model is always judged by the same numbers.
_STACKED_NUMBERS = 1 << 14
# A kink's defect falls with the interval that holds it: bisecting the worst interval makes it vanish. A jump keeps its
# size however short the interval.
JUMP_TOLERANCE = 0.01


@dataclass(frozen=True)
class JumpProbe:
    """What segments and chords through θ showed.

    Attributes:
        residual: ‖Δ − ∫∇f·z‖/‖Δ‖ over random segments, a lower bound if it is above the tolerance; NaN if no
            segment moved the output.
        num_gradients: gradients that the hardest segment took.
        jump: the size of a jump found by values alone, relative to the range of an output along a long chord; 0 if none
            was found.
    """

    residual: float
    num_gradients: int
    jump: float = 0.0

    @property
    def differentiable(self) -> bool:
        """Whether f passed as locally Lipschitz in θ along the segments tried."""
        return self.residual <= JUMP_TOLERANCE and self.jump == 0.0

    @property
    def distrust(self) -> str:
        """Why gradients are not to be trusted if f did not pass, in words."""
        if self.jump > 0:
            return "the model jumps in its parameters, and gradients miss the jumps"
        if math.isnan(self.residual):
            return "the model shows no gradient to trust"
        return (
            "the model's gradients do not account for the changes of its output, and no jump was met: its code cuts "
            "them off (detach, no_grad) or replaces them, or it is rougher than Lipschitz"
        )

    @property
    def evidence(self) -> str:
        """What was measured, in words."""
        if self.jump > 0 and not self.residual > JUMP_TOLERANCE:
            return f"on a long segment through θ f jumps by {self.jump:.2g} of its range there"
        if math.isnan(self.residual):
            return "along random segments f does not change at all"
        bound = "at least " if self.residual > JUMP_TOLERANCE else ""
        return (
            f"along random segments the integrated gradient misses {bound}{self.residual:.2g} of the change of f, "
            f"at up to {self.num_gradients} points"
        )


def probe_jumps(model: nn.Module, space: ParameterSpace, drawing: Drawing, x: Tensor) -> JumpProbe:
    """Compare increments and integrated gradients on segments drawn like the perturbations, and on longer ones.

    Adaptive midpoint rule: the interval with the largest defect is halved until the whole defect is small, an interval
    that keeps its defect is 2^-30 of the segment, or 256 gradients are spent. No further segment is tried once the
    model cannot pass. Cost: at most 6·256 gradients of 32 examples, about a third as many forward passes; for a model
    with many jumps usually 70 gradients. Up to 372 forward passes of 8 examples more search for a jump on long chords.
    Points of a small model are evaluated in one call. A model of many parameters takes less (`Effort`).

    A model whose output no segment moves does not pass: it shows no gradient to trust.

    Raises:
        Unavailable: the model does not run in float64, or cannot be differentiated.
    """
    effort = Effort.of(model)
    exact, x = in_float64(model, x[: effort.examples_moved])
    base = space.values(exact)
    probing = replace(drawing, stream=Stream.PROBE, design="iid", num_draws=8, num_blocks=4)
    count = effort.segments + effort.long_segments
    segments = probing.perturbations(range(count), dtype=torch.float64, device=x.device)
    reach = _LONG_REACH * math.hypot(*(float(values.norm()) for values in base.values()))
    lengths = segments[effort.segments :].norm(dim=1, keepdim=True)
    segments[effort.segments :] *= torch.clamp(reach / lengths, min=1.0)
    stacked = space.num_parameters + x.numel() <= _STACKED_NUMBERS and not is_random(exact)
    tried = [_Segment(exact, space, base, z, x, effort.intervals, effort.sums, stacked) for z in segments]
    try:
        found = _probe_all(tried, effort.segments)
    except Exception as error:  # a model's code may raise anything
        if is_out_of_memory(error):
            raise
        # a function without a second derivative, such as EmbeddingBag
        with trying(Unavailable, "the model cannot be differentiated, which shows whether it jumps ({reason})"):
            found = _probe_all([replace(each, sums=_SUMS) for each in tried], effort.segments)
    del tried, segments
    sizes = {"num_chords": effort.chords, "intervals": effort.chord_intervals}
    return replace(found, jump=largest_jump(exact, space, x, drawing.seed, **sizes, stacked=stacked))


def _probe_all(segments: Sequence["_Segment"], num_short: int) -> JumpProbe:
    if num_short == 0:
        return _probe_segments(segments)
    found = _probe_segments(segments[:num_short])
    if found.residual > JUMP_TOLERANCE:
        return found
    longer = _probe_segments(segments[num_short:])  # also if no segment moved the output
    residuals = [each.residual for each in (found, longer) if not math.isnan(each.residual)]
    return JumpProbe(max(residuals, default=math.nan), max(found.num_gradients, longer.num_gradients))


def _probe_segments(segments: Sequence["_Segment"]) -> JumpProbe:
    """The joint residual of segments; of the first ones alone if their defects are already too large for all."""
    values = [segment.values(segment.first_points) for segment in segments]
    change = math.hypot(*(float(torch.linalg.vector_norm(each[-1] - each[0])) for each in values))
    defects, counts = [], []
    for segment, own in zip(segments, values, strict=True):
        defect, count = segment.refine(own)
        defects.append(defect)
        counts.append(count)
        if math.hypot(*defects) > JUMP_TOLERANCE * change:
            break
    return JumpProbe(math.hypot(*defects) / change if change > 0 else math.nan, max(counts))


@dataclass
class _Segment:
    """f along one segment θ + tz, 0 ≤ t ≤ 1.

    `intervals`: into which it is divided at first. `sums`: random sums of all outputs in place of f, if not None;
    slopes of f take second derivatives, slopes of sums first ones only. `stacked`: several points in one call, as long
    as vmap takes the model.
    """

    model: nn.Module
    space: ParameterSpace
    base: Mapping[str, Tensor]
    z: Tensor
    x: Tensor
    intervals: int
    sums: int | None = None
    stacked: bool = False

    @property
    def first_points(self) -> tuple[float, ...]:
        """The ends of the first intervals."""
        return tuple(step / self.intervals for step in range(self.intervals + 1))

    def refine(self, first: Float64[Tensor, "k n c"]) -> tuple[float, int]:
        """(‖defect‖, gradients taken) once the defect is small or the gradients are spent; `first` at the first
        points.
        """
        values = dict(zip(self.first_points, first, strict=True))
        defects = self._defects(list(pairwise(self.first_points)), values)
        change = float(torch.linalg.vector_norm(values[1.0] - values[0.0]))
        count = self.intervals
        sizes = {interval: float(torch.linalg.vector_norm(defect)) for interval, defect in defects.items()}
        total = torch.stack(list(defects.values())).sum(0)
        while float(torch.linalg.vector_norm(total)) > 0.9 * JUMP_TOLERANCE * change and count < _MOST_GRADIENTS:
            a, b = max(sizes, key=sizes.__getitem__)
            if b - a < _NARROWEST and sizes[a, b] > JUMP_TOLERANCE * change:
                return max(sizes[a, b], float(torch.linalg.vector_norm(total))), count  # a jump
            del sizes[a, b]
            middle = 0.5 * (a + b)
            values[middle] = self.values([middle])[0]
            total = total - defects.pop((a, b))
            for half, defect in self._defects([(a, middle), (middle, b)], values).items():
                defects[half] = defect
                sizes[half] = float(torch.linalg.vector_norm(defect))
                total = total + defect
            count += 2
        return float(torch.linalg.vector_norm(total)), count

    def _defects(
        self, intervals: Sequence[tuple[float, float]], values: Mapping[float, Tensor]
    ) -> dict[tuple[float, float], Float64[Tensor, "n c"]]:
        """Increment less integrated gradient on each interval, by the midpoint rule."""
        slopes = self._slopes([0.5 * (a + b) for a, b in intervals])
        return {
            (a, b): values[b] - values[a] - (b - a) * slope for (a, b), slope in zip(intervals, slopes, strict=True)
        }

    def values(self, points: Sequence[float]) -> Float64[Tensor, "k n c"]:
        """Return f at some points."""
        with torch.no_grad():
            if self.stacked:
                return self._functions(self._parameters(points))
            return torch.cat([self._functions(self._parameters([point])) for point in points])  # memory for one

    def _parameters(self, points: Sequence[float]) -> dict[str, Float64[Tensor, "k ..."]]:
        steps = torch.tensor(points, dtype=self.z.dtype, device=self.z.device)
        return self.space.moved(self.base, steps[:, None] * self.z)

    def _functions(self, parameters: Mapping[str, Float64[Tensor, "k ..."]]) -> Float64[Tensor, "k n c"]:
        """f, or its sums, at the parameters of several points."""
        if self.stacked:
            try:
                return vmap(self._function, randomness="error")(parameters)
            except Exception as error:  # a model's code may raise anything
                if is_out_of_memory(error):
                    raise
                self.stacked = False
        count = len(next(iter(parameters.values())))
        return torch.stack([self._function({name: v[i] for name, v in parameters.items()}) for i in range(count)])

    def _function(self, parameters: Mapping[str, Tensor]) -> Float64[Tensor, "n c"]:
        values = outputs(self.model, self.x, parameters)
        if self.sums is None:
            return values
        sums = torch.arange(self.sums, dtype=torch.int64, device=values.device)
        return normal(0, Stream.PROBE, sums, 0, values.numel()).to(values.dtype) @ values.flatten()[:, None]

    def _slopes(self, points: Sequence[float]) -> Float64[Tensor, "k n c"]:
        """∇f(x; θ+tz)·z at some points: together if they are stacked, otherwise one graph at a time."""
        if self.stacked:
            try:
                return self._slopes_of(points)
            except Exception as error:  # a model's code may raise anything
                if is_out_of_memory(error):
                    raise
                self.stacked = False
        return torch.cat([self._slopes_of([point]) for point in points])

    def _slopes_of(self, points: Sequence[float]) -> Float64[Tensor, "k n c"]:
        """Slopes by double reverse mode, which follows custom backward rules too."""
        parameters = {name: value.requires_grad_() for name, value in self._parameters(points).items()}
        with torch.enable_grad(), twice_differentiable():
            values = self._functions(parameters)
            if not values.requires_grad:
                return torch.zeros_like(values)
            if self.sums is not None:
                sums = values.sum(0).flatten()  # a point's sum depends on its own parameters alone
                return torch.stack([self._along(each, parameters) for each in sums], dim=1)[:, :, None]
            weights = torch.zeros_like(values, requires_grad=True)
            gradients = torch.autograd.grad(
                values, list(parameters.values()), weights, create_graph=True, allow_unused=True, materialize_grads=True
            )
            along = self._dot(gradients).sum()
            if not along.requires_grad:
                return torch.zeros_like(values)
            return torch.autograd.grad(along, weights, allow_unused=True, materialize_grads=True)[0].detach()

    def _along(self, value: Tensor, parameters: Mapping[str, Tensor]) -> Float64[Tensor, " k"]:
        """The slopes of one sum."""
        gradients = torch.autograd.grad(
            value, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return self._dot(gradients)

    def _dot(self, gradients: Sequence[Float64[Tensor, "k ..."]]) -> Float64[Tensor, " k"]:
        directions = self.space.split(self.z).values()
        parts = [(g * d).reshape(len(g), -1).sum(1) for g, d in zip(gradients, directions, strict=True)]
        return torch.stack(parts).sum(0)
