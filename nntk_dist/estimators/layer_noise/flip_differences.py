"""Gradients of units with few values: f with one unit at either side of a jump, the rest of the draw as it is.

An activation with the values v_0, v_1, … between its breaks b_1, b_2, … has, given the noise of all other units,

    ∂/∂a E f(φ(a + s ξ)) = Σ_j (f|v_j − f|v_{j−1}) ϕ((b_j − a)/s)/s,    ϕ the standard normal density,

which takes none of the unit's own noise: in place of f ξ/s, whose variance grows like 1/s², stands a difference that is
as large as the jump's effect. Behind the next layer, W h + c, whose noise is integrated, f is J·φ̃(a', s') and a
constant, so that f|v costs one column of W and the activation of that layer, u·u' numbers for all units together.
The step is Rao–Blackwell's; for two values it is the local expectation gradient (Titsias, Lázaro-Gredilla, NeurIPS
2015), here with the layer above integrated too.

Axes: m rows (examples under draws), c outputs, u units of the layer, o units of the next, v values.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nntk_dist.smoothing import PiecewiseLinear

_ELEMENTS_AT_ONCE = 1 << 19  # of rows, units and units of the next layer: to stay in the cache


@dataclass(frozen=True)
class NextLayer:
    """The integrated layer behind the units.

    Attributes:
        weight: W.
        smoothing: φ̃ of its activation.
        scale: by how much a change of |h|² changes |h̃ D|²: D² of the weight, 0 if the weight is not selected.
    """

    weight: Float[Tensor, "o u"]
    smoothing: PiecewiseLinear
    scale: float


def flip_gradients(
    smoothing: PiecewiseLinear,
    mean: Float[Tensor, "m u"],
    spread: Float[Tensor, "m u"],
    values: Float[Tensor, "m u"],
    following: NextLayer,
    mean_next: Float[Tensor, "m o"],
    lengths_next: Float[Tensor, " m"],
    sigma: Float[Tensor, " m"],
    jacobian: Float[Tensor, "m c o"],
) -> Float[Tensor, "m c u"]:
    """Return the gradient of E f with respect to the pre-activations a of a layer.

    Args:
        smoothing: the activation, with values that are constant between breaks.
        mean: a.
        spread: s.
        values: φ(a + s ξ) of the draw.
        following: the next layer.
        mean_next: a' of the draw.
        lengths_next: |h̃ D| of the next layer.
        sigma: σ, s' = σ|h̃ D|.
        jacobian: J, the derivative of f by the next activation's output.
    """
    values_of, count = mean.new_tensor(smoothing.levels), len(smoothing.levels)
    present = (values[..., None] - values_of).abs().argmin(-1)
    spread_now = (sigma * lengths_next)[:, None, None]
    known = _smoothed_outputs(following.smoothing, mean_next[:, None].clone(), spread_now, jacobian)
    changes = mean.new_zeros(count, len(mean), jacobian.shape[1], mean.shape[1])  # of f, by value; 0 at the present one
    step = max(1, _ELEMENTS_AT_ONCE // following.weight.numel())
    for shift in range(1, count):
        other = (present + shift) % count
        new, old = values_of[other], values_of[present]
        squares = lengths_next[:, None].square() + following.scale * (new.square() - old.square())
        spread_next = (sigma[:, None] * squares.clamp(min=0.0).sqrt())[..., None]
        moves = (new - old)[..., None]
        for start in range(0, len(mean), step):
            some = slice(start, start + step)
            moved = torch.addcmul(mean_next[some, None], moves[some], following.weight.T)
            change = _smoothed_outputs(following.smoothing, moved, spread_next[some], jacobian[some]) - known[some]
            changes[:, some].scatter_(0, other[None, some, None].expand(1, *change.shape), change[None])
    densities = _density(mean - mean.new_tensor(smoothing.breaks)[:, None, None], spread)
    return torch.einsum("vmcu,vmu->mcu", changes.diff(dim=0), densities)


def _smoothed_outputs(
    smoothing: PiecewiseLinear, a: Float[Tensor, "m u o"], s: Float[Tensor, "m *u 1"], jacobian: Float[Tensor, "m c o"]
) -> Float[Tensor, "m c u"]:
    """Return J·φ̃(a, s) but for a constant, in the dtype of a, which is overwritten.

    The formula of `PiecewiseLinear.values` break by break, so that few numbers of the size of a are ever made.
    """
    scale = math.sqrt(0.5) / s.clamp(min=torch.finfo(s.dtype).tiny)
    result = smoothing.slope * (jacobian @ a.mT) if smoothing.slope else jacobian.new_zeros(())
    for index, (place, jump, bend) in enumerate(zip(smoothing.breaks, smoothing.jumps, smoothing.bends, strict=True)):
        distance = a if index == len(smoothing.breaks) - 1 else a.clone()
        distance -= place
        if not bend:
            result = result + 0.5 * jump * (jacobian @ distance.mul_(scale).erf_().mT)
            continue
        t = distance * scale
        bent = distance.mul_(0.5 * bend).add_(0.5 * jump).mul_(torch.erf(t))
        bent += bend / math.sqrt(2.0 * math.pi) * s * t.square_().neg_().exp_()
        result = result + jacobian @ bent.mT
    return result


def _density(distance: Tensor, s: Tensor) -> Tensor:
    """ϕ(t/s)/s, 0 without noise."""
    scale = torch.where(s > 0, s, 1.0)
    density = torch.exp(-0.5 * (distance / scale).square()) / (scale * math.sqrt(2.0 * math.pi))
    return torch.where(s > 0, density, 0.0)
