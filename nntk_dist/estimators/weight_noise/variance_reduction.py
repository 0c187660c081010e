"""The plan of the estimator `weight` with control variates: which ones a model allows, and whether they pay.

Noise in weights has control variates if a quantised weight is found; any model of few parameters has linear ones,
fitted on other blocks. Either is used only if it lowers the variance in a trial, with random numbers of its own.
Features are `nntk_dist.estimators.weight_noise.weight_gradients` and
`nntk_dist.estimators.weight_noise.regressed_differences`.

Axes: n examples, r/R blocks, S draws, C outputs, P parameters.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nntk_dist.estimators.estimator import FeatureSetting, Trial
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.estimators.weight_noise.noisy_weights import NoisyWeights, find_noisy_weights
from nntk_dist.estimators.weight_noise.regressed_differences import RegressedMeans
from nntk_dist.estimators.weight_noise.weight_gradients import WeightGradients
from nntk_dist.models.black_box import holds_black_box
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.designs import MINIMUM_BLOCKS, Design
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.laws import Gaussian
from nntk_dist.sampling.streams import Stream
from nntk_dist.spec import KernelSpec, Kind, VarianceReduction
from nntk_dist.statistics.standard_errors import jackknife_variance, unbiased_variance

_FEWEST_PILOTS, _MOST_PILOTS = 8, 32
_MOST_NUMBERS = 1 << 20  # of an example's block means: 4 MiB in float32
_MOST_REGRESSED = 256  # parameters of a regression, whose features grow like R² P
_RIDGES = (0.1, 0.3, 1.0, 3.0)
_EXAMPLES = 4
_TRIAL_DRAWS = 1024
_WORTH_PILOTS, _WORTH_FITTING = 0.5, 0.7  # of the plain variance: pilots take passes, a fit takes none


@dataclass(frozen=True)
class ReducedPlan:
    """How the variance is reduced.

    Attributes:
        share: the variance that a trial left, relative to the plain one.
        weights: the parameters whose noise has control variates; None for a regression.
        num_pilots: the pilot draws.
        ridge: λ of the regression, in units of P/N.
    """

    share: float
    weights: NoisyWeights | None = None
    num_pilots: int = 0
    ridge: float = 0.0

    @property
    def text(self) -> str:
        """What is done, in words."""
        left = f"in a trial they left {self.share:.2g} of the variance"
        if self.weights is None:
            return f"linear control variates fitted on other blocks: {left}"
        return f"control variates from {self.num_pilots} pilot draws for noise in {self.weights.text}: {left}"

    def contracted(self, *, num_draws: int, num_outputs: int) -> "ReducedPlan":
        """Return the plan for another number of draws."""
        if self.weights is None:
            return self
        # A pilot draw costs C backward passes. As many passes as draws, within bounds.
        return replace(self, num_pilots=max(_FEWEST_PILOTS, min(_MOST_PILOTS, num_draws // (1 + num_outputs))))

    def features(self, setting: FeatureSetting) -> DifferenceMeans:
        """Make the features."""
        assert setting.drawing is not None
        given = setting.evaluator, setting.drawing, setting.columns
        if self.weights is None:
            return RegressedMeans(*given, ridge=self.ridge)
        return WeightGradients(*given, weights=self.weights, num_pilots=self.num_pilots)


def plan_reduced(trial: Trial) -> ReducedPlan | None:
    """Return the plan; None if it is not asked for, or the model does not allow it, or it does not pay."""
    spec, drawing = trial.spec, trial.drawing
    assert drawing is not None
    if spec.variance_reduction != VarianceReduction.ALL or spec.kind != Kind.NONLOCAL or spec.groups or spec.group:
        return None
    if not spec.weighting.is_fixed or trial.evaluator.is_random or drawing.num_blocks < MINIMUM_BLOCKS:
        return None
    for plan in (_plan_for_weights, _plan_for_regression):
        try:
            found = plan(trial, drawing)
        except Exception as error:  # a model's code may raise anything: it is then computed without
            if is_out_of_memory(error):
                raise
            continue
        if found is not None:
            return found
    return None


def _plan_for_weights(trial: Trial, drawing: Drawing) -> ReducedPlan | None:
    """Control variates for noise in weights."""
    numbers = drawing.num_blocks * trial.num_kernel_outputs * drawing.num_parameters
    if (
        not isinstance(drawing.distribution, Gaussian)
        or numbers > _MOST_NUMBERS
        or holds_black_box(trial.evaluator.model)
    ):
        return None
    weights = find_noisy_weights(trial.evaluator, drawing, trial.x)
    if weights is None:
        return None
    sizes = {"num_draws": drawing.num_draws, "num_outputs": trial.num_kernel_outputs}
    plan = ReducedPlan(1.0, weights).contracted(**sizes)
    per_block, blocks = drawing.draws_per_block, MINIMUM_BLOCKS
    if drawing.design != Design.ORTHOGONAL:
        per_block = min(per_block, 8 * drawing.group_size)
    own = replace(drawing, stream=Stream.PILOT, num_draws=blocks * per_block, num_blocks=blocks)
    setting = FeatureSetting(trial.evaluator, trial.spec, own, _columns(trial))
    plain = DifferenceMeans(trial.evaluator, own, setting.columns)
    x = trial.x[:_EXAMPLES]
    share = _scatter(plan.features(setting), x) / _scatter(plain, x)
    return replace(plan, share=share) if share < _WORTH_PILOTS else None


def _scatter(features: DifferenceMeans, x: Tensor) -> float:
    """The variance of block means, summed over all numbers."""
    everything = range(features.num_draws)
    rows = features.compute(x, torch.arange(len(x), device=x.device), everything, features.columns)
    return float(rows["dense"].double().var(1).sum())


def _plan_for_regression(trial: Trial, drawing: Drawing) -> ReducedPlan | None:
    """Linear control variates, with the best of some ridges."""
    fitted = drawing.num_draws * (drawing.num_blocks - 2) // drawing.num_blocks
    if drawing.num_parameters > min(_MOST_REGRESSED, fitted):
        return None
    unit = drawing.num_blocks * drawing.group_size
    count = min(drawing.num_draws, max(1, _TRIAL_DRAWS // unit) * unit)
    own = replace(drawing, stream=Stream.PILOT, num_draws=count)
    best = RegressedMeans(trial.evaluator, own, _columns(trial))
    ids = torch.arange(len(trial.x), device=trial.x.device)
    rows = best.compute(trial.x, ids, range(count), best.columns)
    moments = {**rows, "dense": rows["dense"][..., :-1]}
    plain = _noise(DifferenceMeans(trial.evaluator, own, best.columns), moments, trial.spec)
    found = {ridge: _noise(replace(best, ridge=ridge), rows, trial.spec) for ridge in _RIDGES}
    ridge = min(found, key=lambda each: found[each])
    if not found[ridge] < _WORTH_FITTING * plain:
        return None
    return ReducedPlan(found[ridge] / plain, ridge=ridge)


def _noise(features: DifferenceMeans, rows: dict[str, Tensor], spec: KernelSpec) -> float:
    """The variance of a kernel, by the jackknife, summed over entries."""
    _, _, by_block = unbiased_variance(features.block_products(rows, rows, spec.meeting))
    return float(jackknife_variance(by_block).sum())


def _columns(trial: Trial) -> tuple[int, ...]:
    outputs = trial.spec.outputs
    return (outputs,) if isinstance(outputs, int) else tuple(range(trial.num_outputs))
