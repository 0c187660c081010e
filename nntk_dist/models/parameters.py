"""The parameter space of a kernel: which tensors of a model are perturbed, and their place in one long vector.

A shared parameter counts once, under its first name; a pattern that matches any of its names selects it.
This module only names and reshapes: it neither evaluates a model nor draws numbers.

Axes: P parameters, in the order of `named_parameters`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import NNTKError, nearest_name


@dataclass(frozen=True)
class ParameterSpace:
    """Names, shapes and offsets of the selected parameters; together a vector of length P."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes)

    def split(self, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """The named tensors that a long vector holds, as views of it."""
        parts = torch.split(vector, list(self.sizes), dim=-1)
        lead = vector.shape[:-1]
        named = zip(self.names, self.shapes, parts, strict=True)
        return {name: part.reshape((*lead, *shape)) for name, shape, part in named}

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's present values of the selected parameters, detached."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach() for name in self.names}

    def scales(self, model: nn.Module) -> tuple[float, ...]:
        """The root mean square of every selected tensor; a zero tensor takes that of its module's `weight`.

        Raises: NNTKError, naming the tensor, where there is no such weight or it is zero too.
        """
        every = dict(model.named_parameters(remove_duplicate=False))
        result = []
        for name in self.names:
            sibling = f"{name.rpartition('.')[0]}.weight".removeprefix(".")
            sizes = (_root_mean_square(every[key]) for key in (name, sibling) if key in every)
            scale = next((size for size in sizes if size > 0), None)
            if scale is None:
                raise NNTKError(
                    f"gamma_scale is 'relative', but parameter '{name}' is zero and its module has no other weight "
                    "to take a scale from; use gamma_scale: absolute, or leave it out of parameters"
                )
            result.append(scale)
        return tuple(result)

    @property
    def num_weight_layers(self) -> int:
        """L, the modules with a selected tensor of two axes or more: f may grow like |θ|^L."""
        named = zip(self.names, self.shapes, strict=True)
        return len({name.rpartition(".")[0] for name, shape in named if len(shape) >= 2})

    def moved(self, base: Mapping[str, Tensor], displacement: Float[Tensor, "*draw P"]) -> dict[str, Tensor]:
        """θ + z for one displacement, or for a stack of them along a leading axis."""
        return {name: base[name] + part for name, part in self.split(displacement).items()}


def _root_mean_square(values: Tensor) -> float:
    """In NumPy's float64: one order of summation, however many threads there are."""
    return float(np.sqrt(np.mean(np.square(values.detach().double().cpu().numpy()))))


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name of each parameter, keyed by its first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


def select_parameters(model: nn.Module, patterns: Sequence[str] = ("*",)) -> ParameterSpace:
    """The parameters whose name matches one of the shell-style patterns.

    Raises: NNTKError where the model has no parameters, a pattern matches none, or a selected one is not real floating
    point.
    """
    groups = aliases(model)
    if not groups:
        raise NNTKError(
            "the model has no parameters; a tangent kernel needs at least one (wrap tensors in nn.Parameter)"
        )
    every_name = [name for group in groups.values() for name in group]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every_name):
            raise NNTKError(
                f"parameters: the pattern '{pattern}' matches none of the model's {len(groups)} parameters"
                f"{nearest_name(pattern, every_name) or '; for example: ' + ', '.join(every_name[:3])}"
            )
    chosen = [first for first, group in groups.items() if any(fnmatchcase(n, p) for n in group for p in patterns)]
    if not chosen:
        raise NNTKError("parameters is an empty list; allowed: one or more name patterns, ['*'] for all")
    parameters = dict(model.named_parameters())
    for name in chosen:
        if not parameters[name].is_floating_point():
            raise NNTKError(f"parameter '{name}' has dtype {parameters[name].dtype}; allowed: real floating point")
    return ParameterSpace(names=tuple(chosen), shapes=tuple(tuple(parameters[name].shape) for name in chosen))
