"""Evaluating f and the score of draws on a few training rows, so that changed code is noticed.

In float64 if the model runs in it: rounding then cannot decide whether a unit jumps. At the parameters θ and at θ'
near them, where branches show that are zero at θ, such as adapters and residual branches with a zero last layer.
Both evaluations are free of random numbers. Code that changes neither value, such as another gradient of the same
function, is not noticed.

Axes: n rows, C outputs, k numbers of an output, P parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nntk_dist.errors import ModelError
from nntk_dist.models.black_box import holds_black_box
from nntk_dist.models.evaluation import FAILS_ON_INPUTS, check_finite, outputs, trying
from nntk_dist.models.parameters import ParameterSpace, select_parameters
from nntk_dist.runtime.precision import full_precision
from nntk_dist.spec import KernelSpec
from nntk_dist.weighting.attention import check_scores
from nntk_dist.weighting.scores.base import ScoreBasis
from pipeline.job.function_values import FunctionValues

NUM_ROWS = 4
_NUM_NUMBERS = 4  # of each output, at most; more outputs are projected
_STEP = 0.01  # relative distance from θ to θ'


@full_precision()
def evaluate(
    prepare: Callable[[torch.dtype], nn.Module], dtype: torch.dtype, x: Tensor, targets: Tensor, spec: KernelSpec
) -> FunctionValues:
    """Evaluate f and the score on some rows: a pure function of code, parameters and rows, up to rounding.

    Args:
        prepare: makes a private copy of the model in a dtype, ready to be evaluated.
        dtype: of the run, for a model that does not run in float64.
        x: the rows.
        targets: their targets.
        spec: the kernel.

    Raises:
        NNTKError: the model or the score fails on these rows.
    """
    try:
        exact = prepare(torch.float64)
        with _CoarsestPrecision() as seen:
            values = _values(exact, x, targets, spec, torch.float64)
        # what a black box computes with is unknown
        precision = torch.float32 if holds_black_box(exact) else seen.precision
    except Exception:  # of any kind; what also fails in the run's own dtype is raised there
        with trying(ModelError, FAILS_ON_INPUTS):
            values = _values(prepare(dtype), x, targets, spec, dtype)
        precision = torch.float32
    return FunctionValues(str(precision).removeprefix("torch."), *values)


def _values(
    model: nn.Module, x: Tensor, targets: Tensor, spec: KernelSpec, dtype: torch.dtype
) -> tuple[tuple[tuple[tuple[float, ...], ...], ...], tuple[float, ...]]:
    """Numbers of f at θ and θ', and the score of the draw θ' − θ."""
    x = x.to(dtype) if x.is_floating_point() else x
    space = select_parameters(model, spec.parameters)
    with torch.no_grad():
        base = outputs(model, x.clone())  # a model may write to its input
        theta = _vector(space, model)
        for values in model.parameters():
            values.copy_(torch.where(values == 0, _STEP, values * (1.0 + _STEP)))
        moved = outputs(model, x.clone())
        check_finite(base, "the model's output")
        check_finite(moved, f"the model's output at parameters that are {100 * _STEP:g} % larger")
        scores = _scores(spec, theta, _vector(space, model) - theta, base.double(), moved.double(), targets)
    numbers = tuple(tuple(map(tuple, _numbers(each.double()).tolist())) for each in (base, moved))
    return numbers, tuple(scores.reshape(-1).tolist())


def _numbers(values: Float64[Tensor, "n C"]) -> Float64[Tensor, "n k"]:
    """All outputs, or a few projections of many: a fixed pattern, the same on every machine."""
    count = values.shape[1]
    if count <= _NUM_NUMBERS:
        return values
    angles = torch.outer(torch.arange(1.0, count + 1, dtype=torch.float64), torch.arange(1.0, _NUM_NUMBERS + 1))
    return values @ angles.cos().to(values.device) / count**0.5


def _vector(space: ParameterSpace, model: nn.Module) -> Tensor:
    """The selected parameters, (P,)."""
    values = space.values(model)
    return torch.cat([values[name].reshape(-1) for name in space.names])


def _scores(
    spec: KernelSpec, theta: Tensor, z: Tensor, base: Tensor, moved: Tensor, targets: Tensor
) -> Float64[Tensor, "..."]:
    """The scores of one draw, for all rows or for each; none if all draws have the same weight."""
    weighting = spec.weighting
    if weighting.is_fixed:
        return torch.zeros(0, dtype=torch.float64)
    basis = ScoreBasis(theta, base, targets, weighting.per_example, weighting.dimension, spec.seed)
    scores = weighting.rule.prepare(basis).of(z.double()[None], base, moved[None])
    check_scores(scores.reshape(1, -1), weighting)
    return scores


class _CoarsestPrecision(TorchDispatchMode):
    """Notes the coarsest floating-point type of all results inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation of torch and note the types of its results."""
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.is_floating_point():
                self.precision = max(self.precision, each.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return result
