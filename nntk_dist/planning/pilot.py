"""A pilot of a kernel: a few draws on a few examples, which tell what error some number of draws will have.

`draws: auto` takes as many draws as are expected to bring the relative error to 5 %, or to `rtol` if that is less: at
least four in a block and 32 in all, with which intervals of single entries are still about right, and at most 256, or
what fills the blocks, so that a pass for each of them is what it costs. The search for an accuracy that is asked for is
another matter (`nntk_dist.planning.draw_search`); it begins with this number. A sketch's own error does not count here.

Axes: S draws.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from nntk_dist.planning.decision import Decision, with_draws
from nntk_dist.planning.draw_search import spec_to_look_at
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.registration.estimators import ESTIMATORS
from nntk_dist.registration.options import Automatic
from nntk_dist.sampling.designs import Design
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.required_draws import Look, draws_for, error_with
from nntk_dist.statistics.standard_errors import Calibration
from nntk_dist.statistics.tile_estimates import calibrate_sample

ACCURACY = 0.05
_EXAMPLES = 16
_DRAWS, _DRAWS_OF_A_BLOCK = 32, 4


def with_automatic_draws(model: nn.Module, x: Tensor, spec: KernelSpec, decision: Decision, *, batch: int) -> Decision:
    """Return the decision with the draws that `draws: auto` means, and the error that a pilot expects of them.

    Decisions of other kernels are returned as they are: with a number of draws that was asked for, gradients, whose
    automatic number is one group a block, orthogonal groups, groups of parameters, and weights of draws.

    Args:
        model: the prepared model that was decided for.
        x: examples; at most 16 are used.
        spec: the kernel.
        decision: the decision, with the most draws that are taken.
        batch: how many examples a forward pass holds.
    """
    if spec.draws != Automatic.AUTO or not _has_pilot(spec, decision):
        return decision
    unit = spec.draw_unit(decision.num_draws, decision.num_parameters)
    fewest = -(-max(_DRAWS, _DRAWS_OF_A_BLOCK * spec.blocks) // unit) * unit
    if fewest >= decision.num_draws:
        return decision
    look = pilot_look(model, x, spec, decision, num_draws=fewest, batch=batch)
    wanted, target = math.inf, ACCURACY if spec.rtol is None else min(ACCURACY, spec.rtol)
    if look is not None:
        wanted = draws_for(look, target)
    found = decision.num_draws if wanted >= decision.num_draws else max(fewest, math.ceil(wanted / unit) * unit)
    expected = None if look is None else error_with(look, found)
    expects = "not yet any error" if expected is None else f"an error of {expected:.2g}"
    why = f"draws: auto takes {found}, of which a pilot with {fewest} expects {expects}"
    return replace(with_draws(decision, spec, found), reason=f"{decision.reason}; {why}", expected_error=expected)


def pilot_look(
    model: nn.Module, x: Tensor, spec: KernelSpec, decision: Decision, *, num_draws: int, batch: int
) -> Look | None:
    """Return the error of some draws on up to 16 examples; None if they do not tell it.

    Args:
        model: the prepared model that was decided for.
        x: examples.
        spec: the kernel.
        decision: the decision.
        num_draws: the draws of the pilot.
        batch: how many examples a forward pass holds.
    """
    x = x[:_EXAMPLES]
    looked_at = spec_to_look_at(spec, num_draws, decision.num_parameters)
    features = make_feature_map(model, x, looked_at, with_draws(decision, looked_at, num_draws))
    ids = torch.arange(len(x), device=x.device)
    rows = features.compute(x, ids, range(num_draws), features.columns, batch=min(batch, len(x)))
    try:
        found = calibrate_sample(features, [(rows, rows)], looked_at.meeting)
    except OverflowError:  # the kernel itself says which entries are too large
        return None
    if not _tells(found):
        return None
    own = replace(found, sketch_share=0.0)
    own = replace(own, relative_error=found.relative_error * math.sqrt(1.0 - found.sketch_share))
    look = Look.of(num_draws, own, looked_at=looked_at.blocks, blocks=spec.blocks)
    return replace(look, bound=look.relative_error)


def _tells(found: Calibration) -> bool:
    """Whether all entries are resolved, and more than noise."""
    return found.resolved_share == 1.0 and found.bound < 1.0 and found.sketch_share < 1.0


def _has_pilot(spec: KernelSpec, decision: Decision) -> bool:
    """Whether fewer draws than usual make the same kernel, whose error is known."""
    return (
        spec.pair_blocks
        and not ESTIMATORS.get(decision.estimator).uses_gradients
        and spec.design != Design.ORTHOGONAL
        and spec.weighting.is_fixed
        and not spec.groups
        and spec.group is None
    )
