"""The estimator `autodiff`: gradients ∇f(x; θ + U^{1/P} z) at random parameters, U ~ Uniform(0, 1).

Valid for f locally Lipschitz in θ and any radial ρ; unbiased. Its error hardly depends on P. Cost: a forward and a
backward pass a draw. The kinds `averaged` and `local` use gradients too. Its features are
`nntk_dist.estimators.gradients`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nntk_dist.errors import Unavailable
from nntk_dist.estimators.contraction import Contraction, contraction_of, shares_derivatives
from nntk_dist.estimators.estimator import EstimatorPlan, FeatureSetting, Trial
from nntk_dist.estimators.gradients import GradientFeatures, compute_together
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.layers.sites import SitePlan
from nntk_dist.layers.sketches.sketch import Sketch, groups_of_columns
from nntk_dist.models.evaluation import trying
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.spec import KernelSpec


@dataclass(frozen=True)
class GradientPlan(EstimatorPlan):
    """How the gradient of every parameter is made, and how products of gradients are contracted."""

    sites: SitePlan
    contraction: Contraction

    @property
    def contraction_text(self) -> str:
        """The contraction of each layer, in words, and which gradients take a loop over the examples."""
        names = self.sites.whole if self.sites.whole_in_turn else ()
        if not names:
            return self.contraction.text
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        slow = f"{names[0]}{others}: differentiated one example after the other, since vmap cannot take the model"
        return "; ".join(filter(None, (self.contraction.text, slow)))


@dataclass(frozen=True)
class Autodiff:
    """See the module."""

    plan_type = GradientPlan
    uses_gradients = True
    moves_parameters = False
    forms_gradients = True

    def plan(self, trial: Trial) -> GradientPlan:
        """Find the rule of every parameter and check it against automatic differentiation.

        Raises:
            Unavailable: per-example gradients cannot be separated for this model.
        """
        space, spec = trial.evaluator.space, trial.spec
        with trying(Unavailable, "its gradients cannot be taken layer by layer ({reason})"):
            sites = plan_sites(trial.evaluator.model, space, trial.x)
        sizes = {"num_draws": trial.num_draws, "num_outputs": trial.num_kernel_outputs}
        return GradientPlan(sites, contraction_of(sites, space, spec, **sizes))

    def contracted(
        self, plan: GradientPlan, space: ParameterSpace, spec: KernelSpec, *, num_draws: int, num_outputs: int
    ) -> GradientPlan:
        """Contract the same sites for another number of draws."""
        chosen = contraction_of(plan.sites, space, spec, num_draws=num_draws, num_outputs=num_outputs)
        return GradientPlan(plan.sites, chosen)

    def of_group(
        self,
        plan: GradientPlan,
        names: frozenset[str],
        space: ParameterSpace,
        spec: KernelSpec,
        *,
        num_draws: int,
        num_outputs: int,
    ) -> GradientPlan:
        """Keep the gradients of these parameters, and contract them by their own costs."""
        sites = plan.sites.only(names)
        modules, pair = {site.module for site in sites.outer}, sites.output_layers
        if pair is not None and not {pair.module, pair.readout} <= modules:
            sites = replace(sites, output_layers=None)
        if sites.readout not in modules:
            sites = replace(sites, readout=None)
        own = GradientPlan(sites, plan.contraction)
        return self.contracted(own, space, spec, num_draws=num_draws, num_outputs=num_outputs)

    def compute_groups(
        self,
        groups: Mapping[str, GradientFeatures],
        x: Tensor,
        ids: Tensor,
        draws: range,
        columns: Sequence[int],
        *,
        batch: int | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Compute the gradients of all groups in the same passes; parameters without a rule take their own."""
        found = compute_together([*groups.values()], x, draws, columns, batch=batch)
        return dict(zip(groups, found, strict=True))

    def statement(self, plan: GradientPlan, space: ParameterSpace) -> str:
        """Say what it needs."""
        return "valid for models that are locally Lipschitz in their parameters"

    def features(self, plan: GradientPlan, setting: FeatureSetting) -> GradientFeatures:
        """Make gradients, with what layers and outputs share."""
        return GradientFeatures(**contracted_fields(plan.contraction, setting))


def contracted_fields(chosen: Contraction, setting: FeatureSetting) -> dict[str, Any]:
    """Return the fields of `GradientProducts` for a contraction: what layers and outputs share, and the sketch."""
    spec, exact, sketch = setting.spec, chosen.exact, None
    if chosen.sketched is not None:
        groups = groups_of_columns(chosen.num_columns, spec.blocks if spec.pair_blocks else 1)
        names, joint = setting.evaluator.space.names, not spec.meeting.full
        sketch = Sketch(spec.seed, chosen.num_columns, groups, names, joint, chosen.num_directions)
    outer = exact.outer if spec.pair_blocks else ()
    shared = frozenset(i for i, site in enumerate(outer) if site.module in exact.input_layers)
    return {
        "evaluator": setting.evaluator,
        "plan": exact,
        "drawing": setting.drawing,
        "columns": setting.columns,
        "pair_blocks": spec.pair_blocks,
        "sketch": sketch,
        "sketched": chosen.sketched,
        "sums_outputs": not spec.meeting.full,
        "shared": shared,
        "penultimate": _penultimate(exact, spec, shared),
        "readout": next((i for i, site in enumerate(exact.outer) if site.module == exact.readout), None),
    }


def _penultimate(plan: SitePlan, spec: KernelSpec, shared: frozenset[int]) -> int | None:
    """Index of the outer site before the readout if its outputs share derivatives; None if shared inputs save more."""
    for index, site in enumerate(plan.outer if spec.pair_blocks else ()):
        if index not in shared and shares_derivatives(plan, site, full=spec.meeting.full):
            return index
    return None


AUTODIFF = Autodiff()
