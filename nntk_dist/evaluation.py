"""A model as a function f(x; θ): outputs at given parameters, one set or many.

Two ways to evaluate many perturbed models on one batch, equal to rounding: *sequential*, one functional call a draw,
which a large batch fills; and *stacked*, one vmapped call for a chunk of draws, which spares small models the overhead
of a call. The choice changes rounding, so it is made once, when a run is planned. A model with noise
(`nntk_dist.stochastic`) is one fixed function of θ here, sequential, and which one is said for every call. No gradients
here.

Axes: n examples, s draws, c outputs, P parameters.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nntk_dist.black_box import holds_black_box
from nntk_dist.drawing import Drawing
from nntk_dist.errors import NNTKError
from nntk_dist.parameters import ParameterSpace
from nntk_dist.stochastic import MEAN_FUNCTIONS, fix_noise, fixed_noise, is_random

# Below this many multiply-adds a call's overhead exceeds its arithmetic (measured on CPU: about 100 µs a functional
# call).
_STACK_BELOW_OPERATIONS = 1 << 21
_STACK_ELEMENTS = 1 << 22


def prepare_model(model: nn.Module, *, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """A private copy of the model in eval mode (torch's dropout off, running statistics), at a dtype and device.

    Modules with noise are those of one fixed random function, wherever `fixed_noise` does not say which.
    """
    prepared = copy.deepcopy(model).to(device=device, dtype=dtype).eval().requires_grad_(False)
    fix_noise(prepared)
    return prepared


def outputs(model: nn.Module, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Float[Tensor, "n c"]:
    """f(x; θ) with the given parameters in place of the model's own; a model of one number per example gives c = 1.

    Raises: NNTKError where the output is not a floating tensor of shape (n,) or (n, C).
    """
    result = model(x) if parameters is None else call_with(model, parameters, x)
    return as_outputs(result, len(x))


def call_with(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> object:
    """The model's return value with the given parameters in place of its own, under all the names that they go by.

    Each module that holds a parameter is given it once. `functional_call` could tie names by itself, but where one
    *module* is registered twice it restores the replacement instead of the original, and silently changes the model.
    """
    replaced: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}" if path else attribute
            first = first_names.setdefault(id(parameter), name)
            if first in parameters:
                replaced[name] = parameters[first]
    return functional_call(model, replaced, (x,), tie_weights=False)


def as_outputs(result: object, num_examples: int) -> Float[Tensor, "n c"]:
    """The model's return value as (n, c), or an NNTKError that says what it was instead."""
    if not isinstance(result, Tensor):
        raise NNTKError(f"the model returned a {type(result).__name__}; allowed: one tensor of shape (n,) or (n, C)")
    if result.ndim not in (1, 2) or result.shape[0] != num_examples:
        raise NNTKError(
            f"the model returned shape {tuple(result.shape)} for {num_examples} examples; allowed: ({num_examples},) "
            f"or ({num_examples}, C): flatten or pool further axes inside the model"
        )
    if not result.is_floating_point():
        raise NNTKError(f"the model returned dtype {result.dtype}; allowed: real floating point")
    return result if result.ndim == 2 else result[:, None]


def check_finite(values: Tensor, what: str) -> None:
    """Raise an NNTKError that counts the examples (leading axis) with NaN or infinite values, if there are any."""
    if math.isfinite(float(values.detach().sum())):  # one pass over what is almost always finite
        return
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = (~finite).flatten(1).any(1).nonzero()[:, 0]
        raise NNTKError(
            f"{what}: NaN or infinity for {len(bad)} of {len(values)} examples, the first at row {int(bad[0])} of its "
            "batch; check the checkpoint, the scale of the inputs and gamma"
        )


@dataclass(frozen=True)
class Evaluator:
    """f at perturbed parameters for a prepared model; `stacked` fixes how many draws are evaluated."""

    model: nn.Module
    space: ParameterSpace
    stacked: bool = False

    @cached_property
    def is_random(self) -> bool:
        """Whether f has noise, which then is to be fixed by `nntk_dist.stochastic.fixed_noise`."""
        return is_random(self.model)

    def base(self, x: Tensor) -> Float[Tensor, "n c"]:
        """f(x; θ); of a model with noise, that of its present random function."""
        with torch.no_grad():
            return outputs(self.model, x)

    def expected(self, x: Tensor, seed: int) -> Float[Tensor, "n c"]:
        """f(x; θ); of a model with noise, the mean of 64 random functions of that seed, of which no draw has one."""
        if not self.is_random:
            return self.base(x)
        first = self.base(x)
        total = torch.zeros_like(first, dtype=torch.float64)
        for group in MEAN_FUNCTIONS:
            with fixed_noise(self.model, seed, group):
                total += self.base(x)
        return (total / len(MEAN_FUNCTIONS)).to(first.dtype)

    def pairs(
        self, x: Tensor, base: Float[Tensor, "n c"], drawing: Drawing, draws: range, displacements: Float[Tensor, "s P"]
    ) -> Iterator[tuple[range, Float[Tensor, "n c"], Float[Tensor, "s n c"]]]:
        """(draws, f(x; θ), f(x; θ+z)) of all these draws, whole groups of them; of a model with noise group by group.

        Both are then under the noise of the group: one further pass for each. `base` is f(x; θ) without noise.
        """
        if not self.is_random:
            yield draws, base, self.perturbed(x, displacements)
            return
        for group, members in drawing.by_group(draws):
            with fixed_noise(self.model, drawing.seed, group):
                z = displacements[members.start - draws.start : members.stop - draws.start]
                unmoved, moved = self.base(x), self.perturbed(x, z)
            yield members, unmoved, moved

    def perturbed(self, x: Tensor, displacements: Float[Tensor, "s P"]) -> Float[Tensor, "s n c"]:
        """f(x; θ + z) for each displacement z."""
        base = self.space.values(self.model)
        with torch.no_grad():
            if not self.stacked:
                return torch.stack([outputs(self.model, x, self.space.moved(base, z)) for z in displacements])
            chunk = max(1, _STACK_ELEMENTS // max(self.space.num_parameters, x.numel()))

            def one(displacement: Tensor) -> Tensor:
                return outputs(self.model, x, self.space.moved(base, displacement))

            return vmap(one, chunk_size=chunk, randomness="error")(displacements)


def prefers_stacking(model: nn.Module, space: ParameterSpace, x: Tensor) -> bool:
    """Whether many perturbed models on this batch go faster stacked: small dense models on small batches that vmap can
    take.

    Convolutions never do: their stacked weights become a grouped convolution, several times slower. Nor do black boxes,
    nor models with noise, whose draws are evaluated one random function after the other.
    """
    if space.num_parameters * len(x) > _STACK_BELOW_OPERATIONS or is_random(model):
        return False
    if holds_black_box(model) or any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        return False
    trial = torch.zeros(2, space.num_parameters, dtype=next(model.parameters()).dtype, device=x.device)
    try:
        Evaluator(model, space, stacked=True).perturbed(x[:1], trial)
    except (
        RuntimeError
    ):  # vmap refuses data-dependent control flow and in-place writes: such a model is evaluated in turn
        return False
    return True


@contextmanager
def moved_in_place(model: nn.Module, space: ParameterSpace) -> Iterator[Callable[[Float[Tensor, " P"]], None]]:
    """A function that sets the selected parameters of a private model to θ + z, for one z after the other; θ is back at
    the end.

    They become slices of one vector, so that a draw takes one addition and no memory of its own.
    """
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in space.names]
    own = [parameter.data for parameter in chosen]
    theta = torch.cat([values.flatten() for values in own])
    moved = theta.clone()

    def move(z: Float[Tensor, " P"]) -> None:
        torch.add(theta, z.to(theta.dtype), out=moved)

    try:
        for parameter, values in zip(chosen, space.split(moved).values(), strict=True):
            parameter.data = values
        yield move
    finally:
        for parameter, values in zip(chosen, own, strict=True):
            parameter.data = values
