"""Evaluating f, the score of draws and their distribution on a few training rows, so that changed code is noticed.

In float64 on the CPU if the model runs there and is not too large: rounding then cannot decide whether a unit jumps. At
the parameters θ and at θ' near them, where branches show that are zero at θ, such as adapters and residual branches
with a zero last layer. At θ' the gradient too, since a model may define its own. All is free of random numbers.

Axes: n rows, C outputs, k numbers of an output, P parameters.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nntk_dist.errors import ModelError
from nntk_dist.models.black_box import holds_black_box
from nntk_dist.models.evaluation import FAILS_ON_INPUTS, check_finite, outputs, trying
from nntk_dist.models.parameters import ParameterSpace, select_parameters
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.runtime.precision import full_precision
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from nntk_dist.sampling.draws import Drawing
from nntk_dist.spec import KernelSpec
from nntk_dist.weighting.attention import check_scores
from nntk_dist.weighting.scores.base import ScoreBasis
from pipeline.job.function_values import FunctionValues

NUM_ROWS = 4
_NUM_NUMBERS = 4  # of each output, at most; more outputs are projected
_NOT_COPIED = (
    "the model cannot be copied ({reason}); build it without what copy.deepcopy refuses, such as locks, open files and "
    "tensors computed from parameters"
)
_STEP = 0.01  # relative distance from θ to θ'


@full_precision()
def evaluate(
    prepare: Callable[[torch.dtype, str], nn.Module],
    dtype: torch.dtype,
    device: str,
    x: Tensor,
    targets: Tensor,
    spec: KernelSpec,
    *,
    exact: bool,
    advice: str = "",
) -> FunctionValues:
    """Evaluate f, the score and the distribution: a pure function of code, parameters and rows, up to rounding.

    Args:
        prepare: makes a private copy of the model in a dtype on a device, ready to be evaluated.
        dtype: of the run, for a model that does not run in float64 on the CPU.
        device: of the run, for such a model.
        x: the rows.
        targets: their targets.
        spec: the kernel.
        exact: whether to try float64, which takes twice the memory and time of float32.
        advice: about the inputs, for the message if the model fails on them.

    Raises:
        NNTKError: the model or the score fails on these rows.
    """
    if exact:
        try:
            model = prepare(torch.float64, "cpu")
            with _CoarsestPrecision() as seen:
                values = _values(model, x, targets, spec)
        except Exception:  # of any kind; what also fails as the run evaluates it is raised there
            pass
        else:
            # what a black box computes with is unknown
            precision = torch.float32 if holds_black_box(model) else seen.precision
            return replace(values, precision=str(precision).removeprefix("torch."))
    with trying(ModelError, _NOT_COPIED):
        model = prepare(dtype, device)
    with trying(ModelError, FAILS_ON_INPUTS + advice):
        return replace(_values(model, x, targets, spec), precision="float32")


def _values(model: nn.Module, x: Tensor, targets: Tensor, spec: KernelSpec) -> FunctionValues:
    """Numbers of f at θ and θ', of its gradient at θ', of the score of the draw θ' − θ, and of the first draw."""
    like = next(model.parameters())
    x = x.to(like.device, like.dtype if x.is_floating_point() else None)
    space = select_parameters(model, spec.parameters)
    weighted = not spec.weighting.is_fixed
    with torch.no_grad():
        base = outputs(model, x.clone()).double()  # a model may write to its input
        check_finite(base, "the model's output")
        theta = _vector(space, model) if weighted else None
        for values in model.parameters():
            values.copy_(torch.where(values == 0, _STEP, values * (1.0 + _STEP)))
    moved, gradient = _moved(model, space, x)
    scores: tuple[float, ...] = ()
    if theta is not None and moved is not None:
        scores = _scores(spec, theta, _vector(space, model) - theta, base, moved, targets.to(like.device))
    numbers = tuple(tuple(map(tuple, _numbers(each).tolist())) for each in (base, moved) if each is not None)
    return FunctionValues("", numbers, scores, gradient, _draw(spec, space))


def _moved(model: nn.Module, space: ParameterSpace, x: Tensor) -> tuple[Tensor | None, tuple[float, ...]]:
    """Values of f at θ', and numbers of the gradient of a mixture of its values there.

    The run itself never evaluates f at θ'. So a model that fails or is not finite there has no values, and one without
    a gradient has none; neither is an error.
    """
    parameters = [parameter for name, parameter in model.named_parameters() if name in space.names]
    moved: Tensor | None = None
    numbers: tuple[float, ...] = ()
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        result = outputs(model, x.clone()).double()
        moved = result.detach() if bool(torch.isfinite(result).all()) else None
        mixture = torch.arange(1.0, result.numel() + 1, dtype=torch.float64).cos().to(result.device)
        gradients = torch.autograd.grad(result.flatten() @ mixture, parameters, allow_unused=True)
        squares, products = 0.0, 0.0
        for gradient, parameter in zip(gradients, parameters, strict=True):
            if gradient is not None:  # one after the other, since float64 copies of all would take much memory
                exact = gradient.double()
                squares += float(exact.square().sum())
                products += float((exact * parameter.detach()).sum())
        numbers = (squares**0.5, products)
    except Exception as error:
        if is_out_of_memory(error):
            raise
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return moved, numbers if all(map(math.isfinite, numbers)) else ()


def _draw(spec: KernelSpec, space: ParameterSpace) -> tuple[float, ...]:
    """The first coordinates of one draw of the kernel's distribution and seed."""
    drawing = Drawing(
        spec.distribution, MINIMUM_BLOCKS, MINIMUM_BLOCKS, space.num_parameters, seed=spec.seed, shapes=space.shapes
    )
    numbers = drawing.perturbations(range(1), 0, min(_NUM_NUMBERS, space.num_parameters), dtype=torch.float64)
    return tuple(numbers[0].tolist())


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
) -> tuple[float, ...]:
    """The scores of one draw, for all rows together or for each."""
    weighting = spec.weighting
    basis = ScoreBasis(theta, base, targets, weighting.per_example, weighting.dimension, spec.seed)
    scores = weighting.rule.prepare(basis).of(z.double()[None], base, moved[None])
    check_scores(scores.reshape(1, -1), weighting)
    return tuple(scores.reshape(-1).tolist())


class _CoarsestPrecision(TorchFunctionMode):
    """Notes the coarsest floating-point type of all results inside the context.

    It sees the functions that Python calls. A `TorchDispatchMode` would also see what they call, and imports the
    compiler of torch: seconds in every worker.
    """

    def __init__(self) -> None:
        super().__init__()
        self.precision = torch.float64

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation of torch and note the types of its results."""
        result = func(*args, **(kwargs or {}))
        if _floating((args, kwargs)):  # a new tensor or a conversion from integers is exact
            for each in _floating(result):
                self.precision = max(self.precision, each.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return result


def _floating(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor) and each.is_floating_point()]
