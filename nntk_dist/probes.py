"""What a model is like, found by trying it: does f jump in its parameters, so that `autodiff` would be silently wrong?

On a segment from θ to θ + z a locally Lipschitz f satisfies f(θ+z) − f(θ) = ∫₀¹ ∇f(θ+tz)·z dt; a jump (sign, round,
argmax, also behind a straight-through gradient) breaks the equality whatever the number of points. Everything runs in
float64.

Axes: n examples, c outputs, P parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nntk_dist.drawing import Drawing
from nntk_dist.evaluation import outputs, prepare_model
from nntk_dist.parameters import ParameterSpace
from nntk_dist.philox import Stream

_SEGMENTS = 4
# Two further segments reach at least this far, relative to |θ|: at a tiny γ no jump may lie on the segments of the run
# itself.
_LONG_SEGMENTS = 2
_LONG_REACH = 0.1
_EXAMPLES = 32
_POINTS = (16, 64, 256)
# Kinks leave an error that falls with the number of points (below 0.5 % at 256 for ReLU networks); jumps leave their
# own size.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class JumpProbe:
    """`residual` = ‖Δ − ∫∇f·z‖/‖Δ‖ over random segments, at `num_points` points of the midpoint rule."""

    residual: float
    num_points: int

    @property
    def differentiable(self) -> bool:
        """Whether f passed as locally Lipschitz in θ along every segment tried."""
        return self.residual <= _TOLERANCE


def probe_jumps(model: nn.Module, space: ParameterSpace, drawing: Drawing, x: Tensor) -> JumpProbe:
    """Compare increments and integrated gradients on segments drawn like the perturbations themselves, and on longer
    ones.

    Cost: at most 6·336 forward and backward passes over 32 examples. A model whose output no segment moves has
    residual 1: it shows no gradient to trust.
    """
    exact = prepare_model(model, dtype=torch.float64, device=x.device)
    x = x[:_EXAMPLES]
    x = x.to(torch.float64) if x.is_floating_point() else x
    base = space.values(exact)
    probing = replace(drawing, stream=Stream.PROBE, design="iid")
    segments = probing.perturbations(range(_SEGMENTS + _LONG_SEGMENTS), dtype=torch.float64, device=x.device)
    reach = _LONG_REACH * torch.cat([value.flatten() for value in base.values()]).norm()
    lengths = segments[_SEGMENTS:].norm(dim=1, keepdim=True)
    segments[_SEGMENTS:] *= torch.clamp(reach / lengths, min=1.0)
    residual = 0.0
    for points in _POINTS:
        residual = max(_residual(exact, space, base, z, x, points) for z in segments)
        if residual <= _TOLERANCE:
            return JumpProbe(residual, points)
    return JumpProbe(residual, _POINTS[-1])


def _residual(
    model: nn.Module, space: ParameterSpace, base: Mapping[str, Tensor], z: Tensor, x: Tensor, num_points: int
) -> float:
    """The relative mismatch on one segment, each example and output with a random weight."""
    with torch.no_grad():
        difference = outputs(model, x, space.moved(base, z)) - outputs(model, x, base)
    integral = torch.zeros_like(difference)
    for point in range(num_points):
        t = (point + 0.5) / num_points
        integral += _directional(model, space, base, z, x, t) / num_points
    scale = float(torch.linalg.vector_norm(difference))
    mismatch = float(torch.linalg.vector_norm(difference - integral))
    return mismatch / scale if scale > 0 else 1.0


def _directional(
    model: nn.Module, space: ParameterSpace, base: Mapping[str, Tensor], z: Tensor, x: Tensor, t: float
) -> Tensor:
    """∇f(x; θ+tz)·z for every example and output, by double reverse mode, which follows custom backward rules too."""
    parameters = {name: value.requires_grad_() for name, value in space.moved(base, t * z).items()}
    with torch.enable_grad():
        values = outputs(model, x, parameters)
        if not values.requires_grad:
            return torch.zeros_like(values)
        weights = torch.zeros_like(values, requires_grad=True)
        gradients = torch.autograd.grad(
            values, list(parameters.values()), weights, create_graph=True, allow_unused=True, materialize_grads=True
        )
        along = sum((g * d).sum() for g, d in zip(gradients, space.split(z).values(), strict=True))
        assert isinstance(along, Tensor)
        if not along.requires_grad:
            return torch.zeros_like(values)
        return torch.autograd.grad(along, weights, allow_unused=True, materialize_grads=True)[0].detach()
