"""Units whose activation takes few values, in a layer whose whole effect passes through one integrated layer.

Setting one such unit to another value changes the next layer's pre-activations by a column of its weight, so that f
under every such change costs a product of two layers' widths, not a pass for each unit.
`nntk_dist.estimators.layer_noise.flip_differences` makes gradients of it; which layers these are is found here.

Axes: n examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nntk_dist.layers.hooks import AfterHook, hooked
from nntk_dist.layers.innovations import Innovation, smoothings_of
from nntk_dist.layers.noise_plan import NoisePlan
from nntk_dist.models.evaluation import in_float64, outputs
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream
from nntk_dist.smoothing import PiecewiseLinear

_EXAMPLES = 8
_AGREEMENT = 1e-9
# Multiply-adds that one value of a smoothed activation takes the time of, and passes that a gradient may cost.
_SMOOTHING_OPERATIONS = 32
_MOST_PASSES = 64
_MOST_BREAKS = 16  # of an activation that is evaluated for every unit of two layers


@dataclass(frozen=True)
class Flip:
    """A layer whose units are set to the other values of their activation.

    Attributes:
        module: the path of the layer.
        next: the path of the integrated Linear layer that its activation goes into.
    """

    module: str
    next: str


def find_flips(
    model: nn.Module, plan: NoisePlan, innovations: tuple[Innovation, ...], x: Tensor, num_outputs: int
) -> tuple[Flip, ...]:
    """Find the layers of a prepared model that can be flipped at the cost of few passes, on up to eight examples.

    Args:
        model: the model.
        plan: which layers have noise.
        innovations: what follows them.
        x: examples.
        num_outputs: C, the outputs of the kernel.
    """
    exact, x = in_float64(model, x[:_EXAMPLES])
    sites = {each.module: each for each in plan.noisy}
    smoothings, found = smoothings_of(exact, innovations), list[Flip]()
    nexts = [each for each in innovations if each.integrated and not each.affine and sites[each.module].rank == 1]
    nexts = [each for each in nexts if _is_cheap(smoothings[each.module])]
    pass_operations = sum(each.rank * each.num_parameters for each in plan.noisy)
    for own in innovations:
        smoothing = smoothings.get(own.module)
        if own.integrated or own.affine or not isinstance(smoothing, PiecewiseLinear) or sites[own.module].rank > 1:
            continue
        if not smoothing.levels:
            continue
        for each in nexts:
            units = sites[own.module].units * sites[each.module].units
            operations = len(smoothing.breaks) * flip_operations(units, num_outputs)
            if operations <= _MOST_PASSES * pass_operations and _passes_through(exact, own, each, x):
                found.append(Flip(own.module, each.module))
                break
    return tuple(found)


def flip_operations(num_pairs: int, num_outputs: int) -> int:
    """Return the multiply-adds of one other value of all units: of pairs of a unit and one of the next layer."""
    return num_pairs * (num_outputs + _SMOOTHING_OPERATIONS)


def _is_cheap(smoothing: object) -> bool:
    return isinstance(smoothing, PiecewiseLinear) and len(smoothing.breaks) <= _MOST_BREAKS


def _passes_through(model: nn.Module, own: Innovation, following: Innovation, x: Tensor) -> bool:
    """Whether an activation's output is what goes into a Linear layer, and reaches f in no other way."""
    if own.activation is None or not isinstance(model.get_submodule(following.module), nn.Linear):
        return False
    base, seen = _held(model, own, following, x, moved=False)
    if not seen:
        return False
    held, _ = _held(model, own, following, x, moved=True)
    return float((held - base).abs().max()) <= _AGREEMENT * (1.0 + float(base.abs().max()))


def _held(model: nn.Module, own: Innovation, following: Innovation, x: Tensor, *, moved: bool) -> tuple[Tensor, bool]:
    """F with an activation's output moved, but not for the layer that follows; and whether that layer gets it."""
    assert own.activation is not None
    outs, kept = list[Tensor](), list[tuple[Tensor, Tensor]]()
    module = model.get_submodule(following.module)

    def keep(h: Tensor, out: Tensor) -> Tensor:
        outs.append(out.clone())
        return outs[-1]

    def move(h: Tensor, out: Tensor) -> Tensor | None:
        if not any(h is each for each in outs):
            return None
        other = out.clone()
        if moved:
            group = torch.zeros(1, dtype=torch.int64, device=x.device)
            other += normal(5, Stream.PROBE, group, 0, out.numel())[0].reshape(out.shape)
        kept.append((out, other))
        return other

    def hold(h: Tensor, out: Tensor) -> Tensor | None:
        seen.extend(out for _, other in kept if h is other)
        return module.forward(kept[0][0]) if moved and kept else None

    seen = list[Tensor]()
    hooks: Mapping[str, AfterHook] = {own.module: keep, own.activation: move, following.module: hold}
    with torch.no_grad(), hooked(model, after=hooks):
        values = outputs(model, x)
    return values, bool(seen)
