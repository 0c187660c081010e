"""The feature map of a kernel for a model: the one place that knows every kind of feature.

From a description (`KernelSpec`) and a decision (`Resolution`) to an object that computes features; nothing is computed
here.

Axes: n examples, c outputs.
"""

from torch import Tensor, nn

from nntk_dist.capture import plan_sites
from nntk_dist.difference_means import DifferenceMeans
from nntk_dist.differences import DifferenceFeatures
from nntk_dist.evaluation import Evaluator
from nntk_dist.features import FeatureMap
from nntk_dist.gradients import GradientFeatures, cheapest_contraction
from nntk_dist.parameters import select_parameters
from nntk_dist.resolution import Resolution
from nntk_dist.spec import KernelSpec

# Up to here the S × S metric of differences (128 MiB) is cheap, and differences are what other programs read.
METRIC_DRAWS = 4096


def forms_means(spec: KernelSpec, resolution: Resolution) -> bool:
    """Whether `weight` forms its block-mean gradients: where these are shorter than differences and their metric."""
    few_parameters = spec.blocks * resolution.num_parameters <= resolution.num_draws
    return (
        resolution.estimator == "weight" and spec.pair_blocks and few_parameters and resolution.num_draws > METRIC_DRAWS
    )


def make_feature_map(
    model: nn.Module, x: Tensor, spec: KernelSpec, resolution: Resolution, *, metric: Tensor | None = None
) -> FeatureMap:
    """The features of a prepared model; `x` is a few examples, on which layer formulas are checked before use."""
    space = select_parameters(model, spec.parameters)
    columns = (spec.outputs,) if isinstance(spec.outputs, int) else tuple(range(resolution.num_outputs))
    evaluator = Evaluator(model, space, resolution.stacked)
    if forms_means(spec, resolution):
        return DifferenceMeans(evaluator, spec.drawing("weight", space, model), columns)
    if resolution.estimator == "weight":
        return DifferenceFeatures(evaluator, spec.drawing("weight", space, model), columns, spec.pair_blocks, metric)
    drawing = None if spec.kind == "local" else spec.drawing("autodiff", space, model)
    plan = cheapest_contraction(
        model,
        plan_sites(model, space, x),
        num_draws=resolution.num_draws,
        num_blocks=1 if drawing is None else drawing.num_blocks,
        num_outputs=len(columns),
        pair_blocks=spec.pair_blocks,
        full=spec.outputs == "full",
    )
    return GradientFeatures(evaluator, plan, drawing, columns, spec.pair_blocks)
