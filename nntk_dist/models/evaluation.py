"""A model as a function f(x; θ): outputs at given parameters, one set or many.

Two ways to evaluate many perturbed models on batches, equal to rounding: *sequential*, one draw after the other moved
into the model's own parameters, which then passes over all batches; and *stacked*, one vmapped call for a batch and a
chunk of draws, which spares small models the overhead of a call. The choice changes rounding, so it is made once, when
a run is planned (`nntk_dist.planning.stacking`). A model with noise (`nntk_dist.models.noise`) is evaluated
sequentially, as one fixed function of θ that the caller chooses. No gradients here.

Axes: n examples, s draws, c outputs, P parameters.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nntk_dist.errors import ModelError, NNTKError, Unavailable, first_line
from nntk_dist.models.calling import Calling, attach_calling, calling_of, frozen_parameters
from nntk_dist.models.noise import MEAN_FUNCTIONS, fix_noise, fixed_noise, is_random
from nntk_dist.models.output import described
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.models.passes import recorded_precisions
from nntk_dist.models.private_copy import private_copy
from nntk_dist.runtime.batches import by_batches, in_batches
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.draws import Drawing

FAILS_ON_INPUTS = "the model fails on its inputs ({reason}); check their shape and dtype"
_ONE_TENSOR = Calling()
_STACK_ELEMENTS = 1 << 22
_OUTPUT_ELEMENTS = 1 << 22  # of perturbed models, held at a time


def prepare_model(
    model: nn.Module, *, dtype: torch.dtype, device: torch.device | str, calling: Calling | None = None
) -> nn.Module:
    """Copy a model for private use, in eval mode (torch's dropout off, running statistics), at a dtype and device.

    Modules with noise belong to one fixed random function, unless `fixed_noise` chooses another. A complex parameter
    becomes a real one with a last axis of two, its real and imaginary parts.

    Args:
        model: the model, or a prepared one.
        dtype: of its real numbers; complex ones have the same precision.
        device: where it is evaluated.
        calling: how it is called; by default as before if it is prepared, otherwise with one tensor.

    Raises:
        ModelError: a lazy module has not been called yet, so that its parameters have no shape.
    """
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(f"parameter '{name}' has no shape yet; call the model once on its inputs before")
    with torch.inference_mode(False):
        prepared = private_copy(model)
        before = calling_of(model)
        own = _real_dtype(prepared)
        frozen = frozen_parameters(prepared) if before is None else before.frozen
        factory_dtype = torch.get_default_dtype() if before is None else before.factory_dtype
        if own == factory_dtype != dtype:  # new tensors had the model's dtype, and still have
            factory_dtype = dtype
        converted_(prepared, dtype, device).eval().requires_grad_(False)
        recurrent = any(isinstance(module, nn.RNNBase) for module in prepared.modules())
    attached = replace(
        calling or before or Calling(),
        frozen=frozen,
        factory_dtype=factory_dtype,
        without_cudnn=recurrent and torch.device(device).type == "cuda",
    )
    attach_calling(prepared, attached)
    fix_noise(prepared)
    return prepared


def _real_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the model's first real parameter; None if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def converted_(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Convert a model in place: real numbers to the dtype, complex ones to the same precision, and return it.

    `nn.Module.to` would drop the imaginary part of complex numbers.
    """

    def convert(values: Tensor) -> Tensor:
        if values.is_complex():
            return values.to(device, dtype.to_complex())
        return values.to(device, dtype if values.is_floating_point() else None)

    return model._apply(convert)


@contextmanager
def trying(error: type[NNTKError], message: str) -> Iterator[None]:
    """Convert an exception that a model raises inside the block to one of the library's errors, with its cause.

    Errors of the library pass, and so does memory that runs out, to which a smaller batch is the answer.

    Args:
        error: `ModelError` if the model fails in any way, `Unavailable` if only this way of treating it does.
        message: what failed and what to do; `{reason}` stands for the model's own message.
    """
    try:
        yield
    except NNTKError:
        raise
    except Exception as cause:  # a model's code may raise anything
        if is_out_of_memory(cause):
            raise
        raise error(message.replace("{reason}", first_line(cause))) from cause


def in_float64(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Copy a prepared model and its inputs to float64, in which it is tried.

    Raises:
        Unavailable: the model does not run in float64.
    """
    exact = prepare_model(model, dtype=torch.float64, device=x.device)
    x = x.to(torch.float64) if x.is_floating_point() else x
    calling = calling_of(exact)
    assert calling is not None
    if calling.layout is not None:
        layout, x = calling.layout.converted(x, torch.float64)
        calling = replace(calling, layout=layout)
        attach_calling(exact, calling)
    if _computes_in_float64(exact, x):
        return exact, x
    attach_calling(exact, replace(calling, widened=True))
    with (
        trying(
            Unavailable,
            "the model does not run in float64, in which its derivatives are checked ({reason}); keep its constants in "
            "buffers and make new tensors in the dtype of its inputs",
        ),
        torch.no_grad(),
    ):
        outputs(exact, x)
    return exact, x


def _computes_in_float64(model: nn.Module, x: Tensor) -> bool:
    """Whether a model runs at x and computes all numbers in float64."""
    with recorded_precisions() as found, torch.no_grad():
        try:
            outputs(model, x)
        except NNTKError:
            raise
        except Exception as error:  # a model's code may raise anything
            if is_out_of_memory(error):
                raise
            return False
    return found <= {torch.float64, torch.complex128}


def outputs(model: nn.Module, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Float[Tensor, "n c"]:
    """Return f(x; θ) with the given parameters in place of the model's own; one number per example gives c = 1.

    The model gets a copy of x, to which it may write. Outputs of less precision than its parameters are widened.

    Raises: ModelError if the output is not a floating tensor of shape (n,) or (n, C).
    """
    calling, dtype, count = calling_of(model) or _ONE_TENSOR, _real_dtype(model) or torch.float32, len(x)
    arguments, named, parts = calling.arguments(x.clone(), dtype)
    with calling.model_pass():
        values = as_outputs(calling.function(_result(model, parameters, arguments, named), parts), count)
    if not torch.is_grad_enabled():  # the model may switch gradients on
        values = values.detach()
    return values.to(dtype) if values.dtype.itemsize < dtype.itemsize else values


def _result(
    model: nn.Module, parameters: Mapping[str, Tensor] | None, arguments: tuple[Any, ...], named: dict[str, Any]
) -> object:
    """Call the model with the given parameters in place of its own, under all the names that they have.

    Each module that holds a parameter is given it once. `functional_call` could tie names by itself, but if one
    *module* is registered twice it restores the replacement instead of the original, and silently changes the model.
    """
    if parameters is None:
        return model(*arguments, **named)
    replaced: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}" if path else attribute
            first = first_names.setdefault(id(parameter), name)
            if first in parameters:
                replaced[name] = parameters[first]
    return functional_call(model, replaced, arguments, named, tie_weights=False)


def as_outputs(result: object, num_examples: int) -> Float[Tensor, "n c"]:
    """Return the model's return value as (n, c); of a single example, its axis may be squeezed away.

    Raises:
        ModelError: it is no floating tensor of shape (n,) or (n, C).
    """
    if not isinstance(result, Tensor):
        raise ModelError(
            f"the model returned {described(result)}; allowed: one tensor of shape (n,) or (n, C). Choose a part with "
            "the argument output (model.output in a configuration)"
        )
    if num_examples == 1 and (result.ndim == 0 or (result.ndim == 1 and len(result) != 1)):
        result = result[None]
    if result.ndim not in (1, 2) or result.shape[0] != num_examples:
        raise ModelError(
            f"the model returned shape {tuple(result.shape)} for {num_examples} examples; allowed: ({num_examples},) "
            f"or ({num_examples}, C): choose a position with the argument output (model.output in a configuration), or "
            "flatten or pool further axes inside the model"
        )
    if not result.is_floating_point():
        raise ModelError(f"the model returned dtype {result.dtype}; allowed: real floating point")
    return result if result.ndim == 2 else result[:, None]


def output_index(columns: Sequence[int]) -> slice | list[int]:
    """Return an index for some outputs: a slice if they are neighbours, which copies nothing and makes no GPU wait."""
    neighbours = range(columns[0], columns[0] + len(columns))
    return slice(neighbours.start, neighbours.stop) if tuple(columns) == tuple(neighbours) else list(columns)


def check_finite(values: Tensor, what: str) -> None:
    """Raise a ModelError that counts the examples (leading axis) with NaN or infinite values, if there are any."""
    if math.isfinite(float(values.detach().sum())):  # one pass over what is almost always finite
        return
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = (~finite).flatten(1).any(1).nonzero()[:, 0]
        raise ModelError(
            f"{what}: NaN or infinity for {len(bad)} of {len(values)} examples, the first at row {int(bad[0])} of its "
            "batch; check the checkpoint, the scale of the inputs and gamma"
        )


class StackingFailed(Exception):
    """Perturbed models of this kind cannot be evaluated in one call."""


@dataclass(frozen=True)
class Evaluator:
    """f at perturbed parameters for a prepared model; `stacked` fixes how many draws are evaluated."""

    model: nn.Module
    space: ParameterSpace
    stacked: bool = False

    @cached_property
    def is_random(self) -> bool:
        """Whether f has noise, which `nntk_dist.models.noise.fixed_noise` then has to fix."""
        return is_random(self.model)

    def base(self, x: Tensor, batch: int | None = None) -> Float[Tensor, "n c"]:
        """Return f(x; θ); a model with noise is its present random function."""
        with trying(ModelError, FAILS_ON_INPUTS), torch.no_grad():
            return by_batches(lambda rows: outputs(self.model, rows), x, batch)

    def expected(self, x: Tensor, seed: int, batch: int | None = None) -> Float[Tensor, "n c"]:
        """Return f(x; θ); for a model with noise the mean of 64 random functions of that seed, which no draw has."""
        if not self.is_random:
            return self.base(x, batch)
        first = self.base(x, batch)
        total = torch.zeros_like(first, dtype=torch.float64)
        for group in MEAN_FUNCTIONS:
            with fixed_noise(self.model, seed, group):
                total += self.base(x, batch)
        return (total / len(MEAN_FUNCTIONS)).to(first.dtype)

    def pairs(
        self,
        x: Tensor,
        base: Float[Tensor, "n c"],
        drawing: Drawing,
        draws: range,
        displacements: Float[Tensor, "s P"],
        batch: int | None = None,
    ) -> Iterator[tuple[range, Float[Tensor, "n c"], Float[Tensor, "s n c"]]]:
        """Yield (draws, f(x; θ), f(x; θ+z)) for all these draws, some at a time; for a model with noise group by group.

        Both are then under the noise of the group: one further pass for each. `base` is f(x; θ) without noise.
        """
        if not self.is_random:
            step = max(1, _OUTPUT_ELEMENTS // base.numel())
            for start in range(0, len(draws), step):
                yield draws[start : start + step], base, self.perturbed(x, displacements[start : start + step], batch)
            return
        for group, members in drawing.by_group(draws):
            with fixed_noise(self.model, drawing.seed, group):
                z = displacements[members.start - draws.start : members.stop - draws.start]
                unmoved, moved = self.base(x, batch), self.perturbed(x, z, batch)
            yield members, unmoved, moved

    def perturbed(
        self, x: Tensor, displacements: Float[Tensor, "s P"], batch: int | None = None
    ) -> Float[Tensor, "s n c"]:
        """Return f(x; θ + z) for each displacement z.

        In turn also if stacking fails: control flow may depend on these examples. Both ways are equal to rounding.
        """
        batches = list(in_batches(x, batch))
        with torch.no_grad():
            if self.stacked:
                with suppress(StackingFailed):
                    return _collected(self._stacked(batches, displacements), len(displacements), len(x))
            with trying(ModelError, "the model fails at perturbed parameters ({reason})"):
                return _collected(self._in_turn(batches, displacements), len(displacements), len(x))

    def try_stacked(self, x: Tensor, displacements: Float[Tensor, "s P"]) -> None:
        """Evaluate perturbed models in one call, and never in turn.

        Raises:
            StackingFailed: vmap cannot take the model.
        """
        with torch.no_grad():
            _collected(self._stacked([(x, slice(0, len(x)))], displacements), len(displacements), len(x))

    def _in_turn(
        self, batches: list[tuple[Tensor, slice]], displacements: Float[Tensor, "s P"]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "1 n c"]]]:
        """Draw by draw, all batches of each."""
        with moved_in_place(self.model, self.space) as move:
            for s, displacement in enumerate(displacements):
                move(displacement)
                for x, rows in batches:
                    yield slice(s, s + 1), rows, outputs(self.model, x)[None]

    def _stacked(
        self, batches: list[tuple[Tensor, slice]], displacements: Float[Tensor, "s P"]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "s n c"]]]:
        """Batch by batch, a chunk of draws in one call."""
        base = self.space.values(self.model)
        for x, rows in batches:
            step = draws_at_once(self.space.num_parameters, x)

            def one(displacement: Tensor, x: Tensor = x) -> Tensor:
                return outputs(self.model, x, self.space.moved(base, displacement))

            for start in range(0, len(displacements), step):
                part = displacements[start : start + step]
                try:
                    values = vmap(one, randomness="error")(part)
                except Exception as error:  # a model's code may raise anything
                    if is_out_of_memory(error):
                        raise
                    raise StackingFailed(f"vmap cannot take the model ({first_line(error)})") from error
                yield slice(start, start + len(part)), rows, values


def _collected(
    parts: Iterator[tuple[slice, slice, Float[Tensor, "s n c"]]], num_draws: int, num_examples: int
) -> Float[Tensor, "s n c"]:
    """All values, from parts for some draws and some rows, which padding may follow."""
    result: Tensor | None = None
    for draws, rows, values in parts:
        if result is None:
            result = values.new_empty(num_draws, num_examples, values.shape[2])
        result[draws, rows] = values[:, : rows.stop - rows.start]
    assert result is not None
    return result


def draws_at_once(numbers: int, x: Tensor) -> int:
    """Return how many models of `numbers` parameters are stacked on a batch x: 2^22 numbers are held at a time."""
    return max(1, _STACK_ELEMENTS // max(numbers, x.numel()))


@contextmanager
def moved_in_place(model: nn.Module, space: ParameterSpace) -> Iterator[Callable[[Float[Tensor, " P"]], None]]:
    """Yield a function that moves the selected parameters to θ + z for all later passes; θ is restored at the end.

    Inside the block the parameters have other memory, the same for every z: nothing is allocated for a draw, and θ is
    restored bit for bit. The model must be a private copy, as `prepare_model` makes.
    """
    named = dict(model.named_parameters())
    parameters = [named[name] for name in space.names]
    theta = [parameter.data for parameter in parameters]
    moved = [torch.empty_like(values) for values in theta]

    def move(displacement: Float[Tensor, " P"]) -> None:
        for values, part, memory in zip(theta, space.split(displacement).values(), moved, strict=True):
            torch.add(values, part, out=memory)

    try:
        for parameter, memory in zip(parameters, moved, strict=True):
            parameter.data = memory
        yield move
    finally:
        for parameter, values in zip(parameters, theta, strict=True):
            parameter.data = values
