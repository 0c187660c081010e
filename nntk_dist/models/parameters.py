"""The parameter space of a kernel: the tensors of a model that are perturbed, and their place in one long vector.

A shared parameter counts once, under its first name; a pattern that matches any of its names selects it. No model is
evaluated here and no number is drawn.

Axes: P parameters, in the order of `named_parameters`.
"""

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, ModelError, nearest_name
from nntk_dist.models.calling import frozen_parameters


@dataclass(frozen=True)
class ParameterSpace:
    """Names, shapes and offsets of the selected parameters; together a vector of length P.

    `num_frozen` counts the parameters that a pattern matches and that are left out because they are frozen. `groups`
    are the names of groups of parameters and of their tensors, which may be in several; empty without groups.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_frozen: int = 0
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of entries of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_parameters(self) -> int:
        """P, the length of the vector."""
        return sum(self.sizes)

    @property
    def frozen_text(self) -> str:
        """Say, for the reason of a decision, how many frozen parameters are left out; empty if there are none."""
        return f"; {self.num_frozen:,} frozen parameters are left out" if self.num_frozen else ""

    def intervals(self, names: Collection[str]) -> tuple[tuple[int, int], ...]:
        """Return where some tensors lie in the long vector, as half-open intervals; neighbours are joined."""
        found: list[tuple[int, int]] = []
        for name, stop, size in zip(self.names, itertools.accumulate(self.sizes), self.sizes, strict=True):
            if name in names:
                start = found.pop()[0] if found and found[-1][1] == stop - size else stop - size
                found.append((start, stop))
        return tuple(found)

    def split(self, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """Return the named tensors that a long vector holds, as views of it."""
        parts = torch.split(vector, list(self.sizes), dim=-1)
        lead = vector.shape[:-1]
        named = zip(self.names, self.shapes, parts, strict=True)
        return {name: part.reshape((*lead, *shape)) for name, shape, part in named}

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's present values of the selected parameters, detached."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach() for name in self.names}

    def scales(self, model: nn.Module) -> tuple[float, ...]:
        """Return the root mean square of each selected tensor; a zero tensor takes its module's `weight`'s.

        Raises:
            ArgumentError: there is no such weight, or it is zero too; the message names the tensor.
        """
        every = dict(model.named_parameters(remove_duplicate=False))
        result = []
        for name in self.names:
            sibling = f"{name.rpartition('.')[0]}.weight".removeprefix(".")
            sizes = (_root_mean_square(every[key]) for key in (name, sibling) if key in every)
            scale = next((size for size in sizes if size > 0), None)
            if scale is None:
                raise ArgumentError(
                    f"gamma_scale is 'relative', but parameter '{name}' is zero and its module has no other weight "
                    "to take a scale from; use gamma_scale: absolute, or leave it out of parameters"
                )
            result.append(scale)
        return tuple(result)

    @property
    def num_weight_layers(self) -> int:
        """L, the number of modules with a selected tensor of two axes or more: f may grow like |θ|^L."""
        named = zip(self.names, self.shapes, strict=True)
        return len({name.rpartition(".")[0] for name, shape in named if len(shape) >= 2})

    def moved(self, base: Mapping[str, Tensor], displacement: Float[Tensor, "*draw P"]) -> dict[str, Tensor]:
        """Return θ + z for one displacement, or for a stack of them along a leading axis."""
        return {name: base[name] + part for name, part in self.split(displacement).items()}


def _root_mean_square(values: Tensor) -> float:
    """Computed by NumPy in float64: the order of summation does not depend on the number of threads."""
    return float(np.sqrt(np.mean(np.square(values.detach().double().cpu().numpy()))))


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names of each parameter, keyed by the first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


def select_parameters(
    model: nn.Module, patterns: Sequence[str] | Mapping[str, Sequence[str]] = ("*",)
) -> ParameterSpace:
    """Select the parameters whose name matches one of the patterns, or of the patterns of one of several groups.

    Frozen parameters (`requires_grad=False` in the user's model) are left out, unless a pattern is their exact name. A
    parameter behind a parametrization, `parametrizations.weight.original`, also matches as `weight`.

    Args:
        model: the model.
        patterns: shell-style patterns, such as `*.weight`; or a mapping of group names to patterns. A parameter may be
            in several groups.

    Raises:
        ModelError: the model has no parameters, or a selected one is not floating point.
        ArgumentError: a pattern matches no parameter, or only frozen ones, or there is no pattern.

    Example:
        >>> from torch import nn
        >>> select_parameters(nn.Linear(3, 2), ("w*",))
        ParameterSpace(names=('weight',), shapes=((2, 3),), num_frozen=0, groups=())
    """
    if isinstance(patterns, Mapping):
        return _grouped(model, {group: _selected(model, own, f"parameters.{group}") for group, own in patterns.items()})
    return _selected(model, patterns, "parameters")


def _grouped(model: nn.Module, spaces: Mapping[str, ParameterSpace]) -> ParameterSpace:
    """Return the space of all groups together, in the model's order."""
    shapes = {name: shape for space in spaces.values() for name, shape in zip(space.names, space.shapes, strict=True)}
    names = tuple(name for name, _ in model.named_parameters() if name in shapes)
    groups = tuple((group, space.names) for group, space in spaces.items())
    left_out = max(space.num_frozen for space in spaces.values())
    return ParameterSpace(names, tuple(shapes[name] for name in names), left_out, groups)


def _selected(model: nn.Module, patterns: Sequence[str], what: str) -> ParameterSpace:
    """Select the parameters of one list of patterns; `what` names it in messages."""
    groups, frozen = aliases(model), frozen_parameters(model)
    if not groups:
        raise ModelError(
            "the model has no parameters; a tangent kernel needs at least one (wrap tensors in nn.Parameter)"
        )
    known = {first: tuple(dict.fromkeys([*group, *map(_plain_name, group)])) for first, group in groups.items()}
    every_name = [name for names in known.values() for name in names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every_name):
            raise ArgumentError(
                f"{what}: the pattern '{pattern}' matches none of the model's {len(groups)} parameters"
                f"{nearest_name(pattern, every_name) or '; for example: ' + ', '.join(every_name[:3])}"
            )
    matched = [first for first, names in known.items() if any(fnmatchcase(n, p) for n in names for p in patterns)]
    if not matched:
        raise ArgumentError(f"{what} is an empty list; allowed: one or more name patterns, ['*'] for all")
    chosen = [first for first in matched if first not in frozen or not set(patterns).isdisjoint(known[first])]
    parameters = dict(model.named_parameters())
    if not chosen:
        raise ArgumentError(
            f"{what}: all {len(matched)} parameters that match are frozen (requires_grad=False), such as "
            f"'{matched[0]}'; unfreeze them, or name them exactly in {what}"
        )
    for name in chosen:
        if not parameters[name].is_floating_point():
            raise ModelError(f"parameter '{name}' has dtype {parameters[name].dtype}; allowed: floating point")
    left_out = sum(parameters[name].numel() for name in set(matched) - set(chosen))
    return ParameterSpace(tuple(chosen), tuple(tuple(parameters[name].shape) for name in chosen), left_out)


def _plain_name(name: str) -> str:
    """The name of a parametrized tensor: `0.parametrizations.weight.original` is `0.weight`."""
    return re.sub(r"(^|\.)parametrizations\.(.+)\.original\d*$", r"\1\2", name)
