"""What a kernel is (`KernelSpec`), which estimator computes it (`Resolution`), and the feature map that both make.

The choice of the estimator is made once, from the model and a few examples, explained in words, and then handed around
as a value: workers rebuild the same feature map from it. No kernel is computed here.

Axes: n examples, c outputs.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nntk_dist.block_sums import Meeting
from nntk_dist.capture import plan_sites
from nntk_dist.difference_means import DifferenceMeans
from nntk_dist.differences import DifferenceFeatures
from nntk_dist.distributions import make_distribution
from nntk_dist.drawing import GROUP_SIZES, MINIMUM_BLOCKS, Drawing, automatic_draws, blocks_message
from nntk_dist.errors import NNTKError, check_choice
from nntk_dist.evaluation import Evaluator, check_finite, prefers_stacking
from nntk_dist.features import FeatureMap, concatenate_rows, slice_rows
from nntk_dist.gradients import GradientFeatures, cheapest_contraction
from nntk_dist.parameters import ParameterSpace, select_parameters
from nntk_dist.probes import JumpProbe, probe_jumps
from nntk_dist.statistics import STATISTICS

KINDS = ("nonlocal", "covariance", "averaged", "local")
ESTIMATORS = ("auto", "weight", "autodiff")
SCALES = ("localized", "raw")
_ROUNDING = 1e4  # in units of the dtype: another order of summation, far below any real dependence
# Up to here the S × S metric of differences (128 MiB) is cheap, and differences are what other programs read.
METRIC_DRAWS = 4096


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, whatever the model and the data: the arguments of the public functions and of the section `kernel`."""

    kind: str = "nonlocal"
    gamma: float = 0.05
    distribution: str = "gaussian"
    estimator: str = "auto"
    statistic: str = "both"
    design: str = "iid"
    draws: int | str = "auto"
    blocks: int = 8
    parameters: Sequence[str] = ("*",)
    outputs: str | int = "trace"
    scale: str = "localized"
    seed: int = 0

    def __post_init__(self) -> None:
        self._take_integers()
        patterns = (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)
        object.__setattr__(self, "parameters", patterns)
        check_choice("kind", self.kind, KINDS)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("statistic", self.statistic, STATISTICS)
        check_choice("scale", self.scale, SCALES)
        if isinstance(self.outputs, str):
            check_choice("outputs", self.outputs, ("trace", "full"))
        if isinstance(self.draws, str):
            check_choice("draws", self.draws, ("auto",))
        check_choice("design", self.design, GROUP_SIZES)
        if self.kind != "local" and self.blocks < MINIMUM_BLOCKS:
            raise NNTKError(blocks_message(self.blocks))
        if self.kind == "covariance" and self.estimator == "autodiff":
            raise NNTKError(
                "estimator is 'autodiff'; allowed for kind covariance, which is made of differences: auto, weight"
            )
        if self.kind in ("averaged", "local") and self.estimator == "weight":
            raise NNTKError(
                f"estimator is 'weight'; allowed for kind {self.kind}, which is made of gradients: auto, autodiff"
            )

    def _take_integers(self) -> None:
        """Accept any integer type (NumPy's too) as an int, and nothing else: None must not pass for `trace`."""
        for name, words in (("draws", "auto"), ("outputs", "trace, full"), ("blocks", ""), ("seed", "")):
            value = getattr(self, name)
            if isinstance(value, str) and words:
                continue
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                allowed = f"a whole number{f' or {words}' if words else ''}"
                raise NNTKError(f"{name} is {value!r}; allowed: {allowed}") from None

    @property
    def pair_blocks(self) -> bool:
        """Whether products of different blocks count: in the nonlocal kernel alone."""
        return self.kind == "nonlocal"

    @property
    def meeting(self) -> Meeting:
        return Meeting(full=self.outputs == "full")

    def drawing(self, estimator: str, num_parameters: int) -> Drawing:
        """The perturbations of this kernel under an estimator."""
        draws = automatic_draws(estimator, self.blocks, self.design) if isinstance(self.draws, str) else self.draws
        return Drawing(
            distribution=make_distribution(self.distribution, self.gamma),
            num_draws=draws,
            num_blocks=self.blocks,
            num_parameters=num_parameters,
            design=self.design,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Resolution:
    """What was decided for a model: which estimator and why, how draws are evaluated, and the sizes that follow."""

    estimator: str
    reason: str
    num_draws: int
    num_parameters: int
    num_outputs: int
    stacked: bool


def resolve(model: nn.Module, x: Tensor, spec: KernelSpec, *, batch: int) -> Resolution:
    """Decide the estimator for a prepared model, on up to 32 of the examples.

    Raises: NNTKError where the asked estimator is not valid for the model, an output does not exist, or f is not
    finite.
    """
    space = select_parameters(model, spec.parameters)
    values = Evaluator(model, space).base(x[:32])
    check_finite(values, "the model's output")
    _check_function(model, space, x[:32], values)
    num_outputs = values.shape[1]
    if isinstance(spec.outputs, int) and not 0 <= spec.outputs < num_outputs:
        raise NNTKError(
            f"outputs is {spec.outputs}; allowed: 0 to {num_outputs - 1} (the model has {num_outputs}), trace, full"
        )
    estimator, reason = _choose(model, space, spec, x)
    draws = 1 if spec.kind == "local" else spec.drawing(estimator, space.num_parameters).num_draws
    stacked = estimator == "weight" and prefers_stacking(model, space, x[:batch])
    return Resolution(estimator, reason, draws, space.num_parameters, num_outputs, stacked)


def _check_function(model: nn.Module, space: ParameterSpace, x: Tensor, values: Tensor) -> None:
    """Refuse a model whose output is not a function of one example and the parameters."""
    evaluator = Evaluator(model, space)
    tolerance = _ROUNDING * torch.finfo(values.dtype).eps * float(values.abs().max())
    if float((evaluator.base(x) - values).abs().max()) > tolerance:
        raise NNTKError(
            "the model's output changes from call to call: it draws random numbers even in eval mode, which this "
            "version does not seed; take the dropout or the noise out of its forward pass"
        )
    if len(x) > 1 and float((evaluator.base(x[:-1].flip(0)).flip(0) - values[:-1]).abs().max()) > tolerance:
        raise NNTKError(
            "the model's output for one example depends on the other examples of its batch, which no kernel of pairs "
            "can express; normalise with running statistics, or over each example"
        )


def _choose(model: nn.Module, space: ParameterSpace, spec: KernelSpec, x: Tensor) -> tuple[str, str]:
    """The estimator's name and the reason, in words."""
    if spec.kind == "local":
        return "autodiff", "the ordinary NTK is made of gradients at θ"
    if spec.kind == "averaged":
        return "autodiff", "the averaged NTK is made of gradients at random parameters"
    if spec.kind == "covariance":
        return "weight", "the covariance kernel is made of output differences"
    if spec.estimator == "weight":
        return "weight", "asked for; valid for anything that can be evaluated"
    probe = probe_jumps(model, space, spec.drawing("autodiff", space.num_parameters), x)
    if probe.differentiable:
        if spec.estimator == "auto":
            try:
                plan_sites(model, space, x)
            except NNTKError as error:
                return "weight", f"autodiff is not to be had: {error}"
        return "autodiff", f"the model is locally Lipschitz in its parameters: {_evidence(probe)}"
    if spec.estimator == "autodiff":
        raise NNTKError(
            f"estimator is 'autodiff', but the model jumps in its parameters ({_evidence(probe)}), where it is "
            "silently wrong; use estimator: weight or auto"
        )
    return "weight", f"the model jumps in its parameters, where gradients miss the jumps: {_evidence(probe)}"


def _evidence(probe: JumpProbe) -> str:
    if math.isnan(probe.residual):
        return "along random segments f does not change at all"
    return (
        f"along random segments the integrated gradient misses {probe.residual:.2g} of the change of f, "
        f"at up to {probe.num_gradients} points"
    )


def forms_means(spec: KernelSpec, resolution: Resolution) -> bool:
    """Whether `weight` forms its block-mean gradients: where these are shorter than differences and their metric."""
    few_parameters = spec.blocks * resolution.num_parameters < resolution.num_draws
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
        return DifferenceMeans(evaluator, spec.drawing("weight", space.num_parameters), columns)
    if resolution.estimator == "weight":
        return DifferenceFeatures(
            evaluator, spec.drawing("weight", space.num_parameters), columns, spec.pair_blocks, metric
        )
    drawing = None if spec.kind == "local" else spec.drawing("autodiff", space.num_parameters)
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


def in_batches(x: Tensor, batch: int) -> Iterator[tuple[Tensor, int]]:
    """Batches of exactly `batch` rows and how many of them count: the last is padded with its last row.

    So the rounding of a row's result depends on its place in its batch and on nothing else.
    """
    for start in range(0, len(x), batch):
        rows = x[start : start + batch]
        missing = batch - len(rows)
        padded = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        yield padded, len(rows)


def compute_rows(
    features: FeatureMap, x: Tensor, draws: range, columns: Sequence[int], *, batch: int
) -> dict[str, Tensor]:
    """Features of any number of rows, in padded batches."""
    return concatenate_rows(
        [slice_rows(features.compute(rows, draws, columns), slice(count)) for rows, count in in_batches(x, batch)]
    )


def compute_outputs(features: FeatureMap, x: Tensor, *, batch: int) -> Tensor:
    """f(x; θ) of any number of rows, in padded batches."""
    return torch.cat([features.outputs(rows)[:count] for rows, count in in_batches(x, batch)])
