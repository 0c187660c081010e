"""Find out whether f jumps in its parameters, so that `autodiff` would be silently wrong.

On a segment from θ to θ + z a locally Lipschitz f satisfies f(θ+z) − f(θ) = ∫₀¹ ∇f(θ+tz)·z dt; a jump (sign, round,
argmax, also behind a straight-through gradient) breaks the equality for any number of points. A model that passes is
tried on long chords too, which find rare jumps (`nntk_dist.planning.chords`). Everything runs in float64.

Axes: n examples, c outputs, P parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from nntk_dist.errors import Unavailable
from nntk_dist.models.evaluation import in_float64, outputs, trying
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.models.passes import twice_differentiable
from nntk_dist.planning.chords import largest_jump
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream

_SEGMENTS = 4
# Two further segments reach at least this far, relative to |θ|: at a tiny γ no jump may lie on the segments of the run.
_LONG_SEGMENTS = 2
_LONG_REACH = 0.1
_EXAMPLES = 32
_FIRST_INTERVALS = 16
_MOST_GRADIENTS = 256
_SUMS = 8
# A kink's defect falls with the interval that holds it: bisecting the worst interval makes it vanish. A jump keeps its
# size however short the interval.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class JumpProbe:
    """What segments and chords through θ showed.

    Attributes:
        residual: ‖Δ − ∫∇f·z‖/‖Δ‖ over random segments, a lower bound if it is above the tolerance; NaN if no
            segment moved the output.
        num_gradients: gradients that the hardest segment took.
        jump: the size of a jump found by values alone, relative to the range of an output along a long chord; 0 if none
            was found, or if no chord was tried.
    """

    residual: float
    num_gradients: int
    jump: float = 0.0

    @property
    def differentiable(self) -> bool:
        """Whether f passed as locally Lipschitz in θ along the segments tried."""
        return self.residual <= _TOLERANCE and self.jump == 0.0


def probe_jumps(model: nn.Module, space: ParameterSpace, drawing: Drawing, x: Tensor) -> JumpProbe:
    """Compare increments and integrated gradients on segments drawn like the perturbations, and on longer ones.

    Adaptive midpoint rule: the interval with the largest defect is halved until the whole defect is small, or 256
    gradients are spent. No further segment is tried once the model cannot pass. Cost: at most 6·256 gradients of 32
    examples, about a third as many forward passes; for a model with many jumps usually 256 gradients. A model that
    passes takes up to 372 forward passes of 8 examples more, in search of jumps on long chords.
    A model whose output no segment moves does not pass: it shows no gradient to trust.

    Raises:
        Unavailable: the model does not run in float64, or cannot be differentiated.
    """
    exact, x = in_float64(model, x[:_EXAMPLES])
    base = space.values(exact)
    probing = replace(drawing, stream=Stream.PROBE, design="iid", num_draws=8, num_blocks=4)
    segments = probing.perturbations(range(_SEGMENTS + _LONG_SEGMENTS), dtype=torch.float64, device=x.device)
    reach = _LONG_REACH * torch.cat([value.flatten() for value in base.values()]).norm()
    lengths = segments[_SEGMENTS:].norm(dim=1, keepdim=True)
    segments[_SEGMENTS:] *= torch.clamp(reach / lengths, min=1.0)
    tried = [_Segment(exact, space, base, z, x) for z in segments]
    try:
        found = _probe_all(tried)
    except Exception as error:  # a model's code may raise anything
        if is_out_of_memory(error):
            raise
        # a function without a second derivative, such as EmbeddingBag
        with trying(Unavailable, "the model cannot be differentiated, which shows whether it jumps ({reason})"):
            found = _probe_all([replace(each, projected=True) for each in tried])
    return replace(found, jump=largest_jump(exact, space, x, drawing.seed)) if found.differentiable else found


def _probe_all(segments: Sequence["_Segment"]) -> JumpProbe:
    found = _probe_segments(segments[:_SEGMENTS])
    if found.residual > _TOLERANCE:
        return found
    longer = _probe_segments(segments[_SEGMENTS:])  # also if no segment moved the output
    residuals = [each.residual for each in (found, longer) if not math.isnan(each.residual)]
    return JumpProbe(max(residuals, default=math.nan), max(found.num_gradients, longer.num_gradients))


def _probe_segments(segments: Sequence["_Segment"]) -> JumpProbe:
    """The joint residual of segments; of the first ones alone if their defects are already too large for all."""
    change = math.hypot(*(segment.change() for segment in segments))
    defects, counts = [], []
    for segment in segments:
        defect, count = segment.refine()
        defects.append(defect)
        counts.append(count)
        if math.hypot(*defects) > _TOLERANCE * change:
            break
    return JumpProbe(math.hypot(*defects) / change if change > 0 else math.nan, max(counts))


@dataclass
class _Segment:
    """f along one segment θ + tz, 0 ≤ t ≤ 1; `projected`: eight random sums of all its outputs instead.

    Slopes of f take second derivatives, slopes of sums first ones only.
    """

    model: nn.Module
    space: ParameterSpace
    base: Mapping[str, Tensor]
    z: Tensor
    x: Tensor
    projected: bool = False

    def change(self) -> float:
        """‖f(θ+z) − f(θ)‖ over the examples."""
        return float(torch.linalg.vector_norm(self._value(1.0) - self._value(0.0)))

    def refine(self) -> tuple[float, int]:
        """(‖defect‖, gradients taken) once the defect is small or the gradients are spent."""
        edges = [step / _FIRST_INTERVALS for step in range(_FIRST_INTERVALS + 1)]
        values = {t: self._value(t) for t in edges}
        defects = {(a, b): self._defect(a, b, values) for a, b in pairwise(edges)}
        change = float(torch.linalg.vector_norm(values[1.0] - values[0.0]))
        count = _FIRST_INTERVALS
        sizes = {interval: float(torch.linalg.vector_norm(defect)) for interval, defect in defects.items()}
        total = torch.stack(list(defects.values())).sum(0)
        while float(torch.linalg.vector_norm(total)) > 0.9 * _TOLERANCE * change and count < _MOST_GRADIENTS:
            a, b = max(sizes, key=sizes.__getitem__)
            del sizes[a, b]
            middle = 0.5 * (a + b)
            values[middle] = self._value(middle)
            total = total - defects.pop((a, b))
            for half in ((a, middle), (middle, b)):
                defects[half] = self._defect(*half, values)
                sizes[half] = float(torch.linalg.vector_norm(defects[half]))
                total = total + defects[half]
            count += 2
        return float(torch.linalg.vector_norm(total)), count

    def _defect(self, a: float, b: float, values: Mapping[float, Tensor]) -> Float64[Tensor, "n c"]:
        """Increment less integrated gradient on one interval, by the midpoint rule."""
        return values[b] - values[a] - (b - a) * self._slope(0.5 * (a + b))

    def _value(self, t: float) -> Float64[Tensor, "n c"]:
        with torch.no_grad():
            return self._function(self.space.moved(self.base, t * self.z))

    def _function(self, parameters: Mapping[str, Tensor]) -> Float64[Tensor, "n c"]:
        values = outputs(self.model, self.x, parameters)
        if not self.projected:
            return values
        sums = torch.arange(_SUMS, dtype=torch.int64, device=values.device)
        return normal(0, Stream.PROBE, sums, 0, values.numel()).to(values.dtype) @ values.flatten()[:, None]

    def _slope(self, t: float) -> Float64[Tensor, "n c"]:
        """∇f(x; θ+tz)·z, by double reverse mode, which follows custom backward rules too."""
        moved = self.space.moved(self.base, t * self.z)
        parameters = {name: value.requires_grad_() for name, value in moved.items()}
        with torch.enable_grad(), twice_differentiable():
            values = self._function(parameters)
            if not values.requires_grad:
                return torch.zeros_like(values)
            if self.projected:
                return torch.stack([self._along(value, parameters) for value in values])[:, None]
            weights = torch.zeros_like(values, requires_grad=True)
            gradients = torch.autograd.grad(
                values, list(parameters.values()), weights, create_graph=True, allow_unused=True, materialize_grads=True
            )
            along = self._dot(gradients)
            if not along.requires_grad:
                return torch.zeros_like(values)
            return torch.autograd.grad(along, weights, allow_unused=True, materialize_grads=True)[0].detach()

    def _along(self, value: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """One number's slope."""
        gradients = torch.autograd.grad(
            value, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return self._dot(gradients)

    def _dot(self, gradients: Sequence[Tensor]) -> Tensor:
        directions = self.space.split(self.z).values()
        return torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
