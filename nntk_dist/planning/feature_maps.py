"""From a description (`KernelSpec`) and a decision (`Decision`) to an object that computes features.

Nothing is tried or decided here.

Axes: n rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from nntk_dist.estimators.estimator import Estimator, FeatureSetting, GroupEstimator
from nntk_dist.models.evaluation import Evaluator
from nntk_dist.planning.decision import Decision
from nntk_dist.products.feature_description import ArraySpec
from nntk_dist.products.features import FeatureMap
from nntk_dist.registration.estimators import ESTIMATORS
from nntk_dist.spec import KernelSpec, Kind
from nntk_dist.weighting.attention import make_attention
from nntk_dist.weighting.options import Reference


def make_feature_map(
    model: nn.Module,
    x: Tensor,
    spec: KernelSpec,
    decision: Decision,
    *,
    metric: Tensor | None = None,
    reference: Reference | None = None,
) -> FeatureMap:
    """Make the features of a prepared model under the draws of a decision.

    Args:
        model: the prepared model that was decided for.
        x: examples; weights of draws are compared on the first of them if there is no other reference.
        spec: the kernel.
        decision: what was decided for the model and this kernel.
        metric: M of output differences, if it has been computed before.
        reference: the examples on which weights of draws are compared, if not the weighting's own or the first of x.
    """
    if spec.kind != Kind.LOCAL:
        spec = replace(spec, draws=decision.num_draws)
    evaluator = Evaluator(model, decision.space, decision.stacked)
    drawing = None if spec.kind == Kind.LOCAL else spec.drawing(decision.estimator, decision.space, model)
    attention = None
    if not spec.weighting.is_fixed:
        assert drawing is not None
        reference = reference or spec.weighting.reference_of(x)
        attention = make_attention(evaluator, drawing, spec.weighting, spec.seed, reference)
    estimator: Estimator = ESTIMATORS.get(decision.estimator)
    setting = FeatureSetting(evaluator, spec, drawing, decision.columns(spec.outputs), metric, attention)
    return estimator.features(decision.plan, setting)


@dataclass(frozen=True)
class FeatureGroups:
    """The features of groups of parameters, which are computed in the same passes over the model.

    Attributes:
        estimator: the name of their estimator.
        maps: the features of each group, by its name.
    """

    estimator: str
    maps: Mapping[str, FeatureMap]

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays of all groups; groups use the same names."""
        return tuple(array for each in self.maps.values() for array in each.arrays)

    @property
    def zero_stderr_is_unresolved(self) -> bool:
        """Whether a standard error of 0 means that no draw changed the output: the same in all groups."""
        return next(iter(self.maps.values())).zero_stderr_is_unresolved

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Compute what `FeatureMap.compute` of each group returns; see there."""
        estimator: Estimator = ESTIMATORS.get(self.estimator)
        assert isinstance(estimator, GroupEstimator)
        return estimator.compute_groups(self.maps, x, ids, draws, columns, batch=batch)
