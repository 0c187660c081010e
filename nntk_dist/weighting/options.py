"""`Weighting`: the options for the weights of draws, checked when an object is made; and the table of scores.

Scores are in `nntk_dist.weighting.scores`, weights in `nntk_dist.weighting.attention`. No model is evaluated here.

Axes: n reference examples, C outputs, P parameters, s draws.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nntk_dist.errors import ArgumentError, check_choice
from nntk_dist.registration.options import (
    Converted,
    Flag,
    Number,
    WholeNumber,
    convert_options,
    is_integer,
    option,
    options_of,
)
from nntk_dist.registration.registry import PYTHON, Registry
from nntk_dist.runtime.arrays import as_examples
from nntk_dist.weighting.scores.base import ScoreRule
from nntk_dist.weighting.scores.function import FunctionRule

SCORES: Registry[Any] = Registry(
    "weighting",
    "nntk_dist.scores",
    {
        "parameter": "nntk_dist.weighting.scores.parameter:ParameterRule",
        "output": "nntk_dist.weighting.scores.output:OutputRule",
        "loss": "nntk_dist.weighting.scores.loss:LossRule",
    },
)
FIXED = "fixed"
_REFERENCE_COUNT = WholeNumber(1)


@dataclass(frozen=True)
class Reference:
    """The examples on which scores compare outputs, (n, …), and their targets, (n,) or (n, C), if there are any."""

    inputs: Tensor
    targets: Tensor | None = None


def _take_name(value: Any) -> Any:
    if isinstance(value, str):
        if not value.startswith(PYTHON):
            check_choice("weighting", value, (FIXED, *SCORES, f"{PYTHON}module:function"))
        return value
    if callable(value) or isinstance(value, ScoreRule):
        return value
    raise ArgumentError(
        f"weighting is {value!r}; allowed: {', '.join((FIXED, *SCORES))}, a function, or a mapping of name, "
        "temperature and other options"
    )


def _take_reference(value: Any) -> Any:
    allowed = f"{_REFERENCE_COUNT.allowed()}, or a tensor or NumPy array"
    if not is_integer(value):
        return as_examples(value, "weighting.reference", allowed)
    if value < 1:
        raise ArgumentError(f"weighting.reference is {value}; allowed: {allowed} of examples")
    return int(value)


def _take_targets(value: Any) -> Any:
    return None if value is None else as_examples(value, "weighting.targets")


@dataclass(frozen=True)
class Weighting:
    """Weights α_s in ĝ(x) = P Σ_s α_s Δ_s z_s/|z_s|²: the softmax of score_s/τ over the draws of a block.

    `targets` belong to the examples of `reference`, or to all examples if `reference` is a number. Comparisons of
    weightings ignore both.

    Raises:
        ArgumentError: an option is not allowed, alone or together with the others.

    Example:
        >>> Weighting("output", temperature=0.5).text
        'softmax of the score output at temperature 0.5, shared by all examples'
    """

    name: Any = option(
        FIXED,
        Converted(_take_name, text="fixed, parameter, output, loss, or python:module:function"),
        "the score: a name, a function of (θ, θ_s, f(X;θ), f(X;θ_s)), or a ScoreRule; fixed means equal weights",
    )
    temperature: float | None = option(
        1.0,
        Number(above=0, none=True, infinite=True, text="a number above 0, or {infinity} or {none} for equal weights"),
        "τ of the softmax",
    )
    per_example: bool = option(False, Flag(), "whether each example has its own weights")
    dimension: int = option(16, WholeNumber(1), "length d_k of the queries and keys of the score parameter")
    reference: int | Tensor = option(
        256,
        Converted(_take_reference, text="a whole number, 1 or more, or a tensor or NumPy array of examples"),
        "the reference batch, or how many of the first examples to take",
        compare=False,
        repr=False,
        in_configuration=_REFERENCE_COUNT,
    )
    targets: Tensor | None = option(
        None,
        Converted(_take_targets, text="None, or a tensor or NumPy array with one target for each example"),
        "targets of the reference batch",
        compare=False,
        repr=False,
        in_configuration=None,
    )

    def __post_init__(self) -> None:
        convert_options(self, "weighting.")
        if self.temperature is None:
            object.__setattr__(self, "temperature", math.inf)
        if not self.per_example:
            return
        why = "all draws have the same weight" if self.is_fixed else ""
        if not self.is_fixed and not _is_imported(self.name):
            why = self.rule.shared_because
        if why:
            raise ArgumentError(f"weighting.per_example is True; allowed for weighting {self.label}: False ({why})")

    @property
    def label(self) -> str:
        """The name of the score or of the function."""
        if isinstance(self.name, str):
            return self.name
        own = getattr(self.name, "name", None) or getattr(self.name, "__name__", None)
        return own or type(self.name).__name__

    @property
    def rule(self) -> ScoreRule:
        """The rule that makes the score.

        Raises:
            ArgumentError: the score is given by name and cannot be imported.
        """
        found = SCORES.get(self.name) if isinstance(self.name, str) else self.name
        if isinstance(found, type):
            found = found()
        return found if isinstance(found, ScoreRule) else FunctionRule(found, self.label)

    @property
    def tau(self) -> float:
        """The temperature τ, infinity for equal weights."""
        assert self.temperature is not None
        return self.temperature

    @property
    def is_fixed(self) -> bool:
        """Whether all draws have the same weight, without any score."""
        return self.name == FIXED

    @property
    def compares_outputs(self) -> bool:
        """Whether the score compares outputs, and so needs a reference batch."""
        return not self.is_fixed and (_is_imported(self.name) or self.rule.compares_outputs)

    @property
    def text(self) -> str:
        """The weighting in words."""
        if self.is_fixed:
            return FIXED
        scope = "separate for each example" if self.per_example else "shared by all examples"
        dimension = f" (d_k {self.dimension})" if self.name == "parameter" else ""
        return f"softmax of the score {self.label}{dimension} at temperature {self.tau:g}, {scope}"

    def reference_of(self, x: Tensor) -> Reference:
        """Return the reference batch: the given one, or the first of the examples x, on their device.

        Raises:
            ArgumentError: its examples have another shape than x, or the number of targets differs from theirs.
        """
        given = None if isinstance(self.reference, int) else self.reference
        inputs = x[: self.reference] if given is None else given
        inputs = inputs.to(x.device, x.dtype if inputs.is_floating_point() else inputs.dtype)
        if inputs.shape[1:] != x.shape[1:]:
            raise ArgumentError(
                f"weighting.reference has examples of shape {tuple(inputs.shape[1:])}; allowed: {tuple(x.shape[1:])}, "
                "as the inputs"
            )
        if self.targets is None:
            return Reference(inputs)
        count = len(x) if given is None else len(given)
        if len(self.targets) != count:
            raise ArgumentError(
                f"weighting.targets has {len(self.targets)} rows; allowed: {count}, one for each example of the "
                f"{'reference batch' if given is not None else 'inputs (the first ones are the reference batch)'}"
            )
        return Reference(inputs, self.targets[: len(inputs)].to(x.device))


def as_weighting(value: object) -> Weighting:
    """Convert the argument `weighting`: None, a name, a function, a ScoreRule, a mapping of options, or a Weighting.

    Raises:
        ArgumentError: `Weighting` raises it, or a key does not exist.
    """
    if value is None:
        return Weighting()
    if isinstance(value, Weighting):
        return value
    if isinstance(value, Mapping):
        for key in value:
            check_choice("a key of weighting", key, options_of(Weighting))
        if "name" not in value:
            raise ArgumentError(f"weighting has no name; allowed: {', '.join((FIXED, *SCORES))}, or a function")
        return Weighting(**value)
    return Weighting(value)


def check_weighting(weighting: Weighting, *, kind: str, estimator: str) -> None:
    """Check that a kernel can have weighted draws: kind nonlocal, from differences of outputs.

    Raises:
        ArgumentError: it cannot; the message begins with the argument to change.
    """
    if weighting.is_fixed:
        return
    if kind != "nonlocal":
        raise ArgumentError(
            f"weighting is '{weighting.label}'; allowed for kind {kind}: fixed (only kind nonlocal weights its draws)"
        )
    if estimator not in ("auto", "weight"):
        raise ArgumentError(
            f"estimator is '{estimator}'; allowed for weighting {weighting.label}, which weights differences of "
            "outputs: auto, weight"
        )


def _is_imported(name: object) -> bool:
    """Whether a name refers to a module, which is imported only when the score is made."""
    return isinstance(name, str) and name.startswith(PYTHON)
