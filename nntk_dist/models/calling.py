"""How a prepared model is called: the parts of its examples, what of its result is f, and what was frozen in it.

A prepared model is a private copy (`nntk_dist.models.evaluation.prepare_model`). It carries this value, so that
whoever evaluates it needs nothing else. No model is called here.

Axes: n examples, b bytes of a packed example.
"""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError
from nntk_dist.models.output import LABELS, Output
from nntk_dist.models.passes import model_pass
from nntk_dist.models.structured import Layout

_ATTRIBUTE = "nntk_calling"
_WHOLE_RESULT = Output()


class Passing(StrEnum):
    """How the parts of the examples are passed to a model."""

    KEYWORDS = "keywords"
    POSITIONS = "positions"
    WHOLE = "whole"  # the dict or tuple as one argument
    SINGLE = "single"  # the one part that is left besides the labels


@dataclass(frozen=True)
class Calling:
    """How a model is called, and which of its parameters were frozen before it was prepared.

    Attributes:
        layout: the parts of an example; None if it is one tensor.
        output: what of the result is f.
        passing: how the parts are passed.
        frozen: names of the parameters with `requires_grad=False`.
        factory_dtype: the dtype of new tensors for which the model's code names none; None for torch's default.
        widened: whether the model computes in float64 also where its code asks for less.
        without_cudnn: whether it avoids cuDNN.
    """

    layout: Layout | None = None
    output: Output = _WHOLE_RESULT
    passing: Passing = Passing.SINGLE
    frozen: frozenset[str] = frozenset()
    factory_dtype: torch.dtype | None = None
    widened: bool = False
    without_cudnn: bool = False

    @classmethod
    def choose(cls, model: nn.Module, layout: Layout | None, output: Output) -> "Calling":
        """Choose how to pass the parts from the signature of the model's `forward`.

        A dict goes to keyword arguments if `forward` takes them all, and a tuple to positional ones; otherwise as one
        argument.

        Raises:
            ArgumentError: the output compares with labels, and the examples hold none.
        """
        calling = cls(layout, output)
        if layout is None:
            if output.needs_labels:
                raise ArgumentError(
                    f"output is {output.measure}, which compares with labels; give the examples as a dict with the "
                    f"part '{LABELS}', or as a tuple whose last part they are"
                )
            return calling
        if output.needs_labels and calling.labels is None:
            raise ArgumentError(
                f"output is {output.measure}, but the examples have the parts {layout}; add the part '{LABELS}'"
            )
        names = calling._passed_names()
        if layout.named and _binds(model, keywords=names):
            return replace(calling, passing=Passing.KEYWORDS)
        if not layout.named and _binds(model, positions=len(names)):
            return replace(calling, passing=Passing.POSITIONS)
        single = len(names) == 1 and calling.labels is not None
        return replace(calling, passing=Passing.SINGLE if single else Passing.WHOLE)

    @property
    def is_plain(self) -> bool:
        """Whether the model takes one tensor and returns f."""
        return self.layout is None and self.output == _WHOLE_RESULT

    @property
    def labels(self) -> str | None:
        """The name of the part that is compared with the result and kept from the model, if there is one."""
        if self.layout is None or not self.output.takes_labels:
            return None
        names = [part.name for part in self.layout.parts]
        if self.layout.named:
            return LABELS if LABELS in names else None
        return names[-1] if len(names) > 1 else None

    def model_pass(self) -> AbstractContextManager[None]:
        """Surround one forward pass (`nntk_dist.models.passes`)."""
        return model_pass(factory_dtype=self.factory_dtype, widened=self.widened, without_cudnn=self.without_cudnn)

    def arguments(self, x: Tensor, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        """Return what the model is called with, positional and by keyword, and all parts of the examples by name.

        Args:
            x: examples, (n, …), or packed, (n, b).
            dtype: the dtype of the model, in which floating-point parts are passed.
        """
        if self.layout is None:
            return (x,), {}, {"0": x}
        parts = self.layout.unpack(x, dtype)
        passed = {name: parts[name] for name in self._passed_names()}
        if self.passing == Passing.KEYWORDS:
            return (), passed, parts
        if self.passing == Passing.WHOLE:
            return ((passed if self.layout.named else tuple(passed.values())),), {}, parts
        return tuple(passed.values()), {}, parts

    def function(self, result: Any, parts: Mapping[str, Tensor]) -> Any:
        """Return f from the model's result, and what it was called with."""
        if self.output == _WHOLE_RESULT:
            return result
        own = self.labels
        given = {name: part for name, part in parts.items() if name != own}
        return self.output.of(result, given, None if own is None else parts[own])

    def _passed_names(self) -> tuple[str, ...]:
        assert self.layout is not None
        return tuple(part.name for part in self.layout.parts if part.name != self.labels)


def calling_of(model: nn.Module) -> Calling | None:
    """Return how a prepared model is called; None for a model that was not prepared."""
    return getattr(model, _ATTRIBUTE, None)


def attach_calling(model: nn.Module, calling: Calling) -> None:
    """Let a private copy of a model carry how it is called."""
    setattr(model, _ATTRIBUTE, calling)


def frozen_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the frozen parameters: `requires_grad=False`, before the model was prepared."""
    calling = calling_of(model)
    if calling is not None:
        return calling.frozen
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad)


def _binds(model: nn.Module, *, keywords: tuple[str, ...] = (), positions: int = 0) -> bool:
    """Whether the model's `forward` takes these arguments."""
    try:
        inspect.signature(model.forward).bind(*[None] * positions, **dict.fromkeys(keywords))
    except (TypeError, ValueError):
        return False
    return True
