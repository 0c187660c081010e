"""Search for the number of draws that an asked accuracy takes, on a sample of the kernel's rows.

The sample is a quarter of the one that calibrates the whole kernel's standard errors. Its draws are divided into more
blocks, if that is the same kernel, so that the error is better known. Each look computes its draws anew, as a function
of their number alone. Together the looks cost a few times the last one, on at most 32 + 32 rows (more if one side has
few).

Axes: n1, n2 rows and columns of the kernel.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from nntk_dist.planning.decision import Decision, with_draws
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.features import FeatureMap
from nntk_dist.sampling.designs import Design
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.required_draws import Look, blocks_to_look_at, next_draws
from nntk_dist.statistics.standard_errors import PILOT_ENTRIES, Calibration, sample_entries, sample_limit
from nntk_dist.statistics.tile_estimates import calibrate_sample


def find_draws(
    model: nn.Module,
    inputs: Sequence[Tensor],
    ids: Sequence[Tensor],
    spec: KernelSpec,
    decision: Decision,
    *,
    batch: int,
) -> tuple[Decision, Look]:
    """Return the decision with as many draws as `spec.rtol` takes, and the last look.

    Nothing is decided again: only the contraction follows the number of draws. Cost: the features of the sampled rows,
    at most about four times.

    Args:
        model: the prepared model.
        inputs: x1, or x1 and x2.
        ids: the ids of their examples.
        spec: the kernel, with an asked accuracy.
        decision: the decision, with the first number of draws.
        batch: how many examples a forward pass holds.
    """
    assert spec.rtol is not None
    unit = spec.draw_unit(decision.num_draws, decision.num_parameters)
    looks: list[Look] = []
    num_draws: int | None = decision.num_draws
    while num_draws is not None:
        looked_at = spec_to_look_at(spec, num_draws, decision.num_parameters)
        features = make_feature_map(model, inputs[0], looked_at, with_draws(decision, looked_at, num_draws))
        calibration = _calibration(features, inputs, ids, looked_at, batch)
        looks.append(Look.of(num_draws, calibration, looked_at=looked_at.blocks, blocks=spec.blocks))
        num_draws = next_draws(looks, rtol=spec.rtol, max_draws=spec.max_draws, unit=unit)
    return with_draws(decision, spec, looks[-1].draws), looks[-1]


def spec_to_look_at(spec: KernelSpec, num_draws: int, num_parameters: int) -> KernelSpec:
    """Return the kernel with its draws in more blocks, if that is the same kernel.

    It is not with weights of draws, which are normalised within a block, nor with orthogonal groups, whose size depends
    on the block.
    """
    if spec.design == Design.ORTHOGONAL or not spec.weighting.is_fixed:
        return spec
    group = spec.draw_unit(num_draws, num_parameters) // spec.blocks
    return replace(spec, blocks=blocks_to_look_at(num_draws, spec.blocks, group), draws=num_draws)


def _calibration(
    features: FeatureMap, inputs: Sequence[Tensor], ids: Sequence[Tensor], spec: KernelSpec, batch: int
) -> Calibration:
    width = len(features.columns) if spec.meeting.full else 1
    chosen = sample_entries(spec.seed, len(inputs[0]), len(inputs[-1]), sample_limit(width, PILOT_ENTRIES))
    rows = [
        features.compute(x[some], names[some], range(features.num_draws), features.columns, batch=min(batch, len(some)))
        for x, names, some in zip((inputs[0], inputs[-1]), (ids[0], ids[-1]), chosen, strict=True)
    ]
    return calibrate_sample(features, [(rows[0], rows[1])], spec.meeting)
