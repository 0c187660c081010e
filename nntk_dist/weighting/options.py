"""How the draws of a block count against each other, in words: `Weighting`, checked when it is made.

The words are those of the section `kernel.weighting` of a configuration and of the argument `weighting` of the public
functions. Scores are made in `nntk_dist.weighting.scores`, weights in `nntk_dist.weighting.attention`; no model is met
here.

Axes: n reference examples, C outputs, P parameters, s draws.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nntk_dist.errors import NNTKError, check_choice

NAMES = ("fixed", "parameter", "output", "loss")
PYTHON = "python:"
_KEYS = ("name", "temperature", "per_example", "dimension", "reference", "targets")
_WITHOUT_EXAMPLES = {
    "fixed": "all draws count the same",
    "parameter": "a score of parameters knows no example",
    "loss": "the loss of an example would need its target, which a test example must not give away",
}

# (θ (P,), θ_s (s, P), f(X;θ) (n, C), f(X;θ_s) (s, n, C)) to scores (s,) or, for each example its own, (s, n); float64.
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """The examples that scores are compared on, (n, …), and where there are any their targets, (n,) or (n, C)."""

    inputs: Tensor
    targets: Tensor | None = None


@dataclass(frozen=True)
class Weighting:
    """Weights α_s = softmax over the draws of a block of score_s/τ, in ĝ(x) = P Σ_s α_s Δ_s z_s/|z_s|².

    `name` is the score (`nntk_dist.weighting.scores`): parameter, output, loss, a `ScoreFunction` or
    `python:module:function`; fixed has none. `temperature` is τ; infinity or None weights all draws alike.
    `per_example` gives every example its own weights. `dimension` is d_k of `parameter`. `reference` is the reference
    batch, or how many of the first examples to take for one; `targets` are theirs, or those of all these examples.
    Neither counts when weightings are compared.

    Raises: NNTKError for words that do not exist or do not go together.
    """

    name: str | ScoreFunction = "fixed"
    temperature: float | None = 1.0
    per_example: bool = False
    dimension: int = 16
    reference: int | Tensor = field(default=256, compare=False, repr=False)
    targets: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.name, str):
            if not self.name.startswith(PYTHON):
                check_choice("weighting", self.name, (*NAMES, f"{PYTHON}module:function"))
        elif not callable(self.name):
            raise NNTKError(
                f"weighting is {self.name!r}; allowed: {', '.join(NAMES)}, a function, or a mapping of name, "
                "temperature and other options"
            )
        temperature = math.inf if self.temperature is None else self.temperature
        if isinstance(temperature, bool) or not isinstance(temperature, Real) or not temperature > 0:
            raise NNTKError(
                f"weighting.temperature is {temperature!r}; allowed: a number above 0, infinity or None for equal "
                "weights"
            )
        object.__setattr__(self, "temperature", float(temperature))
        if not isinstance(self.per_example, bool):
            raise NNTKError(f"weighting.per_example is {self.per_example!r}; allowed: True, False")
        if self.per_example and isinstance(self.name, str) and self.name in _WITHOUT_EXAMPLES:
            raise NNTKError(
                f"weighting.per_example is True; allowed for weighting {self.name}: False "
                f"({_WITHOUT_EXAMPLES[self.name]})"
            )
        object.__setattr__(self, "dimension", _count(self.dimension, "dimension"))
        take = _count if isinstance(self.reference, Integral) else _examples
        object.__setattr__(self, "reference", take(self.reference, "reference"))
        if self.targets is not None:
            object.__setattr__(self, "targets", _examples(self.targets, "targets"))

    @property
    def label(self) -> str:
        """The name; of a function its own."""
        return self.name if isinstance(self.name, str) else getattr(self.name, "__name__", type(self.name).__name__)

    @property
    def tau(self) -> float:
        """τ as a number."""
        assert self.temperature is not None
        return self.temperature

    @property
    def is_fixed(self) -> bool:
        return self.name == "fixed"

    @property
    def compares_outputs(self) -> bool:
        """Whether scores look at outputs, for which there has to be a reference batch."""
        return self.name not in ("fixed", "parameter")

    @property
    def text(self) -> str:
        """The weighting in words."""
        if self.is_fixed:
            return "fixed"
        whose = "for each example its own" if self.per_example else "shared by all examples"
        dimension = f" (d_k {self.dimension})" if self.name == "parameter" else ""
        return f"softmax of the score {self.label}{dimension} at temperature {self.tau:g}, {whose}"

    def reference_of(self, x: Tensor) -> Reference:
        """The reference batch that was given, or the first of the examples x; at their device and, numbers, dtype.

        Raises: NNTKError where it has examples of another shape, or not one target for each.
        """
        given = None if isinstance(self.reference, int) else self.reference
        inputs = x[: self.reference] if given is None else given
        inputs = inputs.to(x.device, x.dtype if inputs.is_floating_point() else inputs.dtype)
        if inputs.shape[1:] != x.shape[1:]:
            raise NNTKError(
                f"weighting.reference has examples of shape {tuple(inputs.shape[1:])}; allowed: {tuple(x.shape[1:])}, "
                "as the inputs"
            )
        if self.targets is None:
            return Reference(inputs)
        count = len(x) if given is None else len(given)
        if len(self.targets) != count:
            raise NNTKError(
                f"weighting.targets has {len(self.targets)} rows; allowed: {count}, one for each of the "
                f"{'reference batch' if given is not None else 'inputs, of which the first are the reference batch'}"
            )
        return Reference(inputs, self.targets[: len(inputs)].to(x.device))


def as_weighting(value: object) -> Weighting:
    """What the argument `weighting` may be: None, a name, a callable, a mapping of options, or a Weighting.

    Raises: NNTKError as `Weighting`, and for a key that does not exist.
    """
    if value is None:
        return Weighting()
    if isinstance(value, Weighting):
        return value
    if isinstance(value, Mapping):
        for key in value:
            check_choice("a key of weighting", key, _KEYS)
        if "name" not in value:
            raise NNTKError(f"weighting has no name; allowed: {', '.join(NAMES)}, or a function")
        return Weighting(**value)
    return Weighting(value)  # type: ignore[arg-type]  # it refuses what is neither a name nor a function


def check_weighting(weighting: Weighting, *, kind: str, estimator: str) -> None:
    """Raise an NNTKError, its first word the argument to change, unless the kernel is one of weighted differences."""
    if weighting.is_fixed:
        return
    if kind != "nonlocal":
        raise NNTKError(
            f"weighting is '{weighting.label}'; allowed for kind {kind}: fixed (only kind nonlocal weights its draws)"
        )
    if estimator not in ("auto", "weight"):
        raise NNTKError(
            f"estimator is '{estimator}'; allowed for weighting {weighting.label}, which weights differences of "
            "outputs: auto, weight"
        )


def _examples(values: object, name: str) -> Tensor:
    tensor = torch.as_tensor(values) if isinstance(values, Tensor | np.ndarray) else None
    if tensor is None or tensor.ndim < 1 or len(tensor) == 0:
        came = repr(values) if tensor is None else f"shape {tuple(tensor.shape)}"
        number = "a whole number, 1 or more, or " if name == "reference" else ""
        raise NNTKError(
            f"weighting.{name} is {came}; allowed: {number}a tensor with one example or more along its first axis"
        )
    return tensor


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        also = ", or a tensor of examples" if name == "reference" else ""
        raise NNTKError(f"weighting.{name} is {value!r}; allowed: a whole number, 1 or more{also}")
    return int(value)
