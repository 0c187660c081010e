"""The feature map of a kernel for a model: the one place that knows every kind of feature.

From a description (`KernelSpec`) and a decision (`Decision`) to an object that computes features; nothing is computed
here.

Axes: n examples, c outputs.
"""

from dataclasses import replace

from torch import Tensor, nn

from nntk_dist.estimators.activation_noise import ActivationFeatures
from nntk_dist.estimators.contraction import contraction_of, shares_derivatives
from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.estimators.noise_contraction import noise_contraction
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.layers.low_rank_passes import find_low_rank_passes
from nntk_dist.layers.noise_plan import plan_noise
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.layers.sites import SitePlan
from nntk_dist.layers.sketch import Sketch, groups_of_columns
from nntk_dist.models.evaluation import Evaluator
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.decision import Decision
from nntk_dist.products.factor_form import METRIC_DRAWS
from nntk_dist.products.features import FeatureMap
from nntk_dist.spec import KernelSpec
from nntk_dist.weighting.attention import make_attention
from nntk_dist.weighting.options import Reference


def forms_means(spec: KernelSpec, decision: Decision) -> bool:
    """Return whether `weight` forms its block-mean gradients: if they are shorter than differences and their metric."""
    few_parameters = spec.blocks * decision.num_parameters <= decision.num_draws
    return spec.pair_blocks and few_parameters and decision.num_draws > METRIC_DRAWS


def make_feature_map(
    model: nn.Module,
    x: Tensor,
    spec: KernelSpec,
    decision: Decision,
    *,
    metric: Tensor | None = None,
    reference: Reference | None = None,
) -> FeatureMap:
    """The features of a prepared model under the decision's draws; `x` is a few examples, on which layer formulas are
    checked before use.

    `reference` is what weights of draws are compared on; where not given, what the weighting holds, or the first of x.
    """
    if spec.kind != "local":
        spec = replace(spec, draws=decision.num_draws)
    space = select_parameters(model, spec.parameters)
    columns = (spec.outputs,) if isinstance(spec.outputs, int) else tuple(range(decision.num_outputs))
    evaluator = Evaluator(model, space, decision.stacked)
    if decision.estimator == "weight":
        return _difference_features(evaluator, x, spec, decision, columns, metric, reference)
    if decision.estimator == "activation":
        return _activation_features(evaluator, x, spec, decision, columns)
    drawing = None if spec.kind == "local" else spec.drawing("autodiff", space, model)
    sites = decision.sites or plan_sites(model, space, x)
    chosen = contraction_of(model, sites, space, spec, num_draws=decision.num_draws, num_outputs=len(columns))
    sketch = None
    if chosen.sketched is not None:
        groups = groups_of_columns(chosen.num_columns, spec.blocks)
        sketch = Sketch(spec.seed, chosen.num_columns, groups, space.names, joint=not spec.meeting.full)
    outer = chosen.exact.outer if spec.pair_blocks else ()
    shared = frozenset(i for i, site in enumerate(outer) if site.module in chosen.exact.input_layers)
    penultimate, readout = _ends(chosen.exact, spec, shared)
    return GradientFeatures(
        evaluator,
        chosen.exact,
        drawing,
        columns,
        spec.pair_blocks,
        sketch=sketch,
        sketched=chosen.sketched,
        sums_outputs=not spec.meeting.full,
        shared=shared,
        penultimate=penultimate,
        readout=readout,
    )


def _ends(plan: SitePlan, spec: KernelSpec, shared: frozenset[int]) -> tuple[int | None, int | None]:
    """Indices of the outer sites before the readout and of the readout; None if shared inputs save as much."""
    penultimate, readout = None, None
    for index, site in enumerate(plan.outer if spec.pair_blocks else ()):
        if index not in shared:
            penultimate = index if shares_derivatives(plan, site, full=spec.meeting.full) else penultimate
            readout = index if plan.readout == site.module else readout
    return penultimate, readout


def _difference_features(
    evaluator: Evaluator,
    x: Tensor,
    spec: KernelSpec,
    decision: Decision,
    columns: tuple[int, ...],
    metric: Tensor | None,
    reference: Reference | None,
) -> DifferenceFeatures | DifferenceMeans:
    """Differences or means of them, weighted where the kernel says so; a weighting is tried before it is used."""
    drawing = spec.drawing("weight", evaluator.space, evaluator.model)
    attention = None
    if not spec.weighting.is_fixed:
        reference = spec.weighting.reference_of(x) if reference is None else reference
        attention = make_attention(evaluator, drawing, spec.weighting, spec.seed, reference)
        attention.try_on(x)
    if forms_means(spec, decision):
        return DifferenceMeans(evaluator, drawing, columns, attention=attention)
    product = find_low_rank_passes(evaluator, drawing, x) if attention is None else None
    return DifferenceFeatures(
        evaluator, drawing, columns, spec.pair_blocks, metric, attention=attention, product=product
    )


def _activation_features(
    evaluator: Evaluator, x: Tensor, spec: KernelSpec, decision: Decision, columns: tuple[int, ...]
) -> ActivationFeatures:
    space, num_draws = evaluator.space, decision.num_draws
    plan = plan_noise(evaluator.model, space, x)
    chosen = noise_contraction(plan, space, spec, num_draws=num_draws, num_outputs=len(columns))
    sketch = None
    if chosen.sketched:
        groups = groups_of_columns(chosen.num_columns, spec.blocks)
        sketch = Sketch(spec.seed, chosen.num_columns, groups, space.names)
    drawing = spec.drawing("activation", space, evaluator.model)
    return ActivationFeatures(evaluator, drawing, columns, plan, chosen, sketch)
