"""The estimator `weight`: output differences Δ times their directions, P·Δ z/|z|² for a draw z.

Valid for anything that can be evaluated; unbiased. Error of the unbiased kernel about √(2P)/S. Cost: one forward pass a
draw. Its features are output differences (`nntk_dist.estimators.output_differences`), or their block means if the
parameters are few (`nntk_dist.estimators.mean_differences`), or block means with control variates
(`nntk_dist.estimators.weight_noise`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nntk_dist.estimators.estimator import EstimatorPlan, FeatureSetting, Trial
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.estimators.weight_noise.variance_reduction import ReducedPlan, plan_reduced
from nntk_dist.layers.low_rank_passes import LowRankPasses, find_low_rank_passes
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.products.factor_form import METRIC_DRAWS
from nntk_dist.spec import KernelSpec


@dataclass(frozen=True)
class DifferencePlan(EstimatorPlan):
    """How output differences are computed and kept.

    Attributes:
        low_rank_passes: whether low-rank draws share the product with the weights (`nntk_dist.layers.low_rank_passes`).
        forms_means: whether block-mean gradients are formed, being shorter than differences and their metric.
        counted: the tensors whose gradients count, of all that are perturbed; empty if all do.
        reduced: how the variance is reduced, if it is.
    """

    low_rank_passes: bool = False
    forms_means: bool = False
    counted: tuple[str, ...] = ()
    reduced: ReducedPlan | None = None

    @property
    def contraction_text(self) -> str:
        """How the variance is reduced, in words."""
        return "" if self.reduced is None else self.reduced.text


@dataclass(frozen=True)
class Weight:
    """See the module."""

    plan_type = DifferencePlan
    uses_gradients = False
    moves_parameters = True
    forms_gradients = False

    def plan(self, trial: Trial) -> DifferencePlan:
        """Plan differences; nothing makes them unavailable."""
        drawing, space = trial.drawing, trial.evaluator.space
        assert drawing is not None
        fixed = trial.spec.weighting.is_fixed
        shared = fixed and find_low_rank_passes(trial.evaluator, drawing, trial.x) is not None
        plan = DifferencePlan(low_rank_passes=shared, reduced=plan_reduced(trial))
        outputs = trial.num_kernel_outputs
        return self.contracted(plan, space, trial.spec, num_draws=trial.num_draws, num_outputs=outputs)

    def contracted(
        self, plan: DifferencePlan, space: ParameterSpace, spec: KernelSpec, *, num_draws: int, num_outputs: int
    ) -> DifferencePlan:
        """Form means if they are shorter than the differences of a block, and the metric of the draws is large."""
        if plan.counted:
            return replace(plan, forms_means=False)
        if plan.reduced is not None:
            return replace(plan, reduced=plan.reduced.contracted(num_draws=num_draws, num_outputs=num_outputs))
        few_parameters = spec.blocks * space.num_parameters <= num_draws
        return replace(plan, forms_means=spec.pair_blocks and few_parameters and num_draws > METRIC_DRAWS)

    def statement(self, plan: DifferencePlan, space: ParameterSpace) -> str:
        """Say what it needs."""
        return "valid for anything that can be evaluated"

    def features(self, plan: DifferencePlan, setting: FeatureSetting) -> DifferenceFeatures | DifferenceMeans:
        """Make differences, or their block means."""
        evaluator, drawing, attention = setting.evaluator, setting.drawing, setting.attention
        assert drawing is not None
        if plan.reduced is not None:
            return plan.reduced.features(setting)
        if plan.forms_means:
            return DifferenceMeans(evaluator, drawing, setting.columns, attention=attention)
        product = LowRankPasses(evaluator, drawing) if plan.low_rank_passes else None
        return DifferenceFeatures(
            evaluator,
            drawing,
            setting.columns,
            setting.spec.pair_blocks,
            setting.metric,
            attention=attention,
            product=product,
            counted=plan.counted,
        )

    def of_group(
        self,
        plan: DifferencePlan,
        names: frozenset[str],
        space: ParameterSpace,
        spec: KernelSpec,
        *,
        num_draws: int,
        num_outputs: int,
    ) -> DifferencePlan:
        """Count a part of the directions: the differences are the same for all groups, their metric is not."""
        return replace(plan, forms_means=False, counted=tuple(name for name in space.names if name in names))

    def compute_groups(
        self,
        groups: Mapping[str, DifferenceFeatures],
        x: Tensor,
        ids: Tensor,
        draws: range,
        columns: Sequence[int],
        *,
        batch: int | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Compute the differences once, for all groups."""
        rows = next(iter(groups.values())).compute(x, ids, draws, columns, batch=batch)
        return dict.fromkeys(groups, rows)


WEIGHT = Weight()
