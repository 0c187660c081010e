"""Measure how far the differences f(x; θ+z) − f(x; θ) stand above the rounding of a dtype and device.

The same perturbations are applied twice: as the run does, and in float64 to θ + z as real numbers. So what counts as
noise is all that comes between: a z that is lost in θ + z, the rounding inside f, the cancellation in the difference,
TF32 products on a GPU. Noise in differences falls with the range like 1/γ. Nothing here decides whether it is too much
(`nntk_dist.planning.model_probes` does), and no kernel is computed.

Axes: s draws, n examples, c outputs, P parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.errors import Unavailable
from nntk_dist.models.evaluation import Evaluator, in_float64, output_index
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.draws import Drawing, draw_chunks
from nntk_dist.sampling.laws import LowRank

_DRAWS = 8
_EXAMPLES = 32
_LEAST_SQUARE = 1e-290  # of a draw whose length is 0 in float64


@dataclass(frozen=True)
class NoiseFloor:
    """Root mean squares over draws, examples and outputs: `change` of the differences, `noise` of their errors. Draws
    count as they do in a kernel of a radial law, by 1/|u|².

    `measured` is False if the errors are estimated from the rounding unit, and not differences from float64.
    """

    change: float
    noise: float
    measured: bool

    @property
    def ratio(self) -> float:
        """Noise over change; infinite if noise was seen and no change, NaN if no draw changed the output."""
        if self.change > 0:
            return self.noise / self.change
        return math.inf if self.measured and self.noise > 0 else math.nan


def probe_noise(
    evaluator: Evaluator, drawing: Drawing, x: Tensor, columns: Sequence[int], *, still: Sequence[str] = ()
) -> NoiseFloor | None:
    """Measure noise and size of the differences of eight perturbations, on up to 32 examples, all taken together.

    ‖Δ_dtype − Δ_64‖ against ‖Δ_64‖: outputs that no draw changes add nothing to either, and a large difference, such
    as the one sign that flips, counts as much as in a kernel; if lengths differ much (`fractional`), the
    shortest draws do, which are the first to be lost. A sign that rounding alone flips is noise.
    Parameters named in `still` are not moved. A model with float64 parameters only, such as a black box, has no finer
    reference: its noise is estimated as one rounding unit of each of the two outputs, which rounding inside f can
    exceed several times.
    None if f is not finite, or the model does not run in float64.
    Cost: nine forward passes at the run's dtype and nine in float64; memory of one perturbation or 2^22 numbers.
    """
    x = x[:_EXAMPLES]
    single = replace(drawing, design="iid", num_draws=_DRAWS, num_blocks=4)
    base, chosen = evaluator.base(x), output_index(columns)
    exact = None
    if any(p.dtype != torch.float64 for p in evaluator.model.parameters() if p.is_floating_point()):
        try:
            exact = Evaluator(in_float64(evaluator.model, x)[0], evaluator.space)
        except Unavailable:
            return None
    squares = torch.zeros(2, dtype=torch.float64, device=x.device)  # of changes, of noise
    weights = _weights(single, x.device)
    for part in draw_chunks(range(_DRAWS), drawing.num_parameters):
        z = _without(evaluator, still, single.perturbations(part, dtype=base.dtype, device=base.device))
        moved = evaluator.perturbed(x, z)
        differences = (moved - base)[:, :, chosen].double()
        if exact is None:
            unit = torch.finfo(torch.float64).eps
            noise = unit * torch.hypot(moved, base.expand_as(moved))[:, :, chosen].double()
        else:
            reference = _exact_differences(exact, x, z)
            if reference is None:
                return None
            noise, differences = differences - reference[:, :, chosen], reference[:, :, chosen]
        own = weights[part.start : part.stop]
        squares += torch.stack([own @ each.square().sum((1, 2)) for each in (differences, noise)])
    if not bool(torch.isfinite(squares).all()):
        return None
    count = float(weights.sum()) * len(x) * len(columns)
    change, noise_size = (math.sqrt(float(total) / count) for total in squares)
    return NoiseFloor(change, noise_size, measured=exact is not None)


def _weights(drawing: Drawing, device: torch.device) -> Float64[Tensor, " s"]:
    """What the square of a draw's difference counts in a kernel: directions are as long as 1/|u|, but for low-rank
    draws.
    """
    if isinstance(drawing.distribution, LowRank):
        return torch.ones(drawing.num_draws, dtype=torch.float64, device=device)
    return drawing.squared_norms(device=device).clamp_min(_LEAST_SQUARE).reciprocal()


def _without(evaluator: Evaluator, still: Sequence[str], z: Float[Tensor, "s P"]) -> Float[Tensor, "s P"]:
    """Perturbations with the coordinates of some parameters zeroed, in place."""
    space = evaluator.space
    for name, size, stop in zip(space.names, space.sizes, accumulate(space.sizes), strict=True):
        if name in still:
            z[:, stop - size : stop] = 0.0
    return z


def _exact_differences(exact: Evaluator, x: Tensor, z: Float[Tensor, "s P"]) -> Float64[Tensor, "s n c"] | None:
    """The same differences in float64, or None if the model does not run in it."""
    x = x.double() if x.is_floating_point() else x
    try:
        return (exact.perturbed(x, z.double()) - exact.base(x)).double()
    except Exception as error:  # of the model's own code: a tensor that stays float32, say
        if is_out_of_memory(error):
            raise
        return None
