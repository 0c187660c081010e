"""What of a model's result is the function f: a part, a position, some classes, or a loss; or a function of the result.

A model may return a tensor, or a dict, tuple or dataclass of several. f has one number or vector for each example.
Nothing is called and nothing differentiated here.

Axes: n examples, t positions (tokens), c outputs or classes.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nntk_dist.errors import ArgumentError, ModelError, check_choice
from nntk_dist.registration.callables import import_function
from nntk_dist.registration.options import Check, Converted, WholeNumber, convert_options, option, options_of
from nntk_dist.registration.registry import PYTHON

LABELS = "labels"  # the part of the examples that holds what a loss compares with
MASK = "attention_mask"  # the part that says which positions count
_IGNORED = -100  # as in torch's cross-entropy: a label that does not count

Arguments = Mapping[str, Tensor]  # the parts of the examples by name
OutputFunction = Callable[..., Tensor]


class Measure(StrEnum):
    """A number for each example that compares the result with the labels."""

    LOSS = "loss"
    NEXT_TOKEN_LOSS = "next_token_loss"
    MARGIN = "margin"


class Position(StrEnum):
    """Which positions of a result (n, t, …) are kept."""

    LAST = "last"
    MEAN = "mean"
    ALL = "all"


@dataclass(frozen=True)
class _Choice(Check):
    """None, or a member of an enum."""

    choices: type[StrEnum]

    def allowed(self, *_: Any) -> str:
        return ", ".join(map(str, self.choices))

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(map(str, self.choices))

    def take(self, value: Any) -> StrEnum | None:
        return None if value is None else self.choices(value)


def _take_part(value: Any) -> str | int | None:
    if value is None or isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise TypeError


def _take_position(value: Any) -> Position | int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    return Position(value)


def _take_classes(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    return tuple(WholeNumber(0).take(each) for each in ([value] if isinstance(value, int) else value))


def _take_function(value: Any) -> Any:
    if value is not None and not callable(value) and not (isinstance(value, str) and value.startswith(PYTHON)):
        raise TypeError
    return value


@dataclass(frozen=True)
class Output:
    """How f(x; θ), (n,) or (n, c), follows from a model's result.

    The steps are taken in this order: part, position, classes, measure. A function replaces them all.

    `loss` is the cross-entropy with whole-number labels (the mean over positions if there are several; −100 does not
    count), or ½|f − y|² for floating-point labels. `next_token_loss` compares the result at a position with the label
    at the next one; without labels, the token ids are their own. `margin` is the label's logit less the logsumexp of
    all others, log p/(1 − p). Labels are the part `labels` of the examples, or the last part of a tuple; the model does
    not get them.

    Example:
        >>> import torch
        >>> result = {"logits": torch.arange(12.0).reshape(2, 3, 2)}
        >>> Output(part="logits", position="last", classes=(1,)).of(result, {})
        tensor([[ 5.],
                [11.]])
    """

    part: str | int | None = option(
        None, Converted(_take_part, text="a key or an index"), "which part of a dict, tuple or dataclass"
    )
    position: Position | int | None = option(
        None,
        Converted(_take_position, text="last, mean, all or an index"),
        "which positions of (n, t, …): the last, the mean of all (both without what attention_mask leaves out), or all",
    )
    classes: tuple[int, ...] | None = option(
        None, Converted(_take_classes, text="one index or several, from 0"), "which entries of the last axis"
    )
    measure: Measure | None = option(None, _Choice(Measure), "a number that compares the result with the labels")
    function: Any = option(
        None,
        Converted(_take_function, text="a function (result) or (result, parts), or python:module:function"),
        "a function of the whole result that returns f; with two arguments, it gets the parts of the examples too",
    )

    def __post_init__(self) -> None:
        convert_options(self, "output.")
        others = [name for name in options_of(Output) if name != "function" and getattr(self, name) is not None]
        if self.function is not None and others:
            raise ArgumentError(f"output.function replaces all other options of output; leave out output.{others[0]}")

    @property
    def needs_labels(self) -> bool:
        """Whether the examples have to hold labels; `next_token_loss` can take the token ids in their place."""
        return self.measure in (Measure.LOSS, Measure.MARGIN)

    @property
    def takes_labels(self) -> bool:
        """Whether labels among the examples are compared with the result, and kept from the model."""
        return self.measure is not None

    @property
    def text(self) -> str:
        """The choice in words; empty if the result is f itself."""
        if self.function is not None:
            return getattr(self.function, "__name__", str(self.function))
        given = {name: getattr(self, name) for name in options_of(Output) if getattr(self, name) is not None}
        return ", ".join(f"{name} {value}" for name, value in given.items())

    def of(self, result: Any, arguments: Arguments, labels: Tensor | None = None) -> Tensor:
        """Return f from a model's result.

        Args:
            result: what the model returned.
            arguments: the parts of the examples that the model got.
            labels: what a measure compares with.

        Raises:
            ModelError: the result has no such part, position or class, or does not fit the labels.
        """
        if self.function is not None:
            return self._by_function(result, arguments if labels is None else {**arguments, LABELS: labels})
        values = _part_of(result, self.part)
        if self.measure is None:
            return self._chosen_classes(self._at_position(values, arguments))
        if self.measure == Measure.NEXT_TOKEN_LOSS:
            values, labels = _shifted(values, _token_ids(values, arguments) if labels is None else labels, arguments)
            return _loss(values, labels)
        if labels is None:
            raise ArgumentError(
                f"output is {self.measure}, which compares with labels; give the examples as a dict with the part "
                f"'{LABELS}', or as a tuple whose last part they are"
            )
        values = self._chosen_classes(self._at_position(values, arguments))
        return _loss(values, labels) if self.measure == Measure.LOSS else _margin(values, labels)

    def _by_function(self, result: Any, parts: Arguments) -> Tensor:
        function = self.function
        if isinstance(function, str):
            function = import_function(function.removeprefix(PYTHON), what="output.function")
        return function(result, parts) if _takes_two(function) else function(result)

    def _at_position(self, values: Tensor, arguments: Arguments) -> Tensor:
        if self.position is None:
            return values
        if values.ndim < 3:
            raise ModelError(
                f"output.position is '{self.position}', but the result has shape {tuple(values.shape)}; allowed for a "
                "result with a position axis, (n, t, …)"
            )
        if self.position == Position.ALL:
            return values.flatten(1)
        mask = _mask_of(values, arguments)
        if self.position == Position.MEAN:
            kept = mask.to(values.dtype)
            return torch.einsum("nt,nt...->n...", kept / kept.sum(1, keepdim=True).clamp_min(1.0), values)
        if self.position == Position.LAST:
            places = torch.arange(values.shape[1], device=values.device)
            index = torch.where(mask, places, -1).amax(1).clamp_min(0)
            return values.gather(1, index.reshape(-1, 1, *[1] * (values.ndim - 2)).expand(-1, 1, *values.shape[2:]))[
                :, 0
            ]
        if not -values.shape[1] <= self.position < values.shape[1]:
            raise ModelError(f"output.position is {self.position}; allowed: one of {values.shape[1]} positions")
        return values[:, self.position]

    def _chosen_classes(self, values: Tensor) -> Tensor:
        if self.classes is None:
            return values
        if max(self.classes) >= values.shape[-1]:
            raise ModelError(f"output.classes holds {max(self.classes)}; allowed: 0 to {values.shape[-1] - 1}")
        return values[..., list(self.classes)]


def as_output(value: Any) -> Output:
    """Convert the argument `output`: None, a key, an index, a word, a function, a mapping of options, or an `Output`.

    Words are `loss`, `next_token_loss`, `margin` (measures) and `last`, `mean`, `all` (positions); any other text is a
    key of the result.

    Raises:
        ArgumentError: an option is unknown or not allowed.

    Example:
        >>> as_output("logits").part
        'logits'
        >>> as_output({"part": "logits", "position": "last"}).text
        'part logits, position last'
    """
    if isinstance(value, Output):
        return value
    if value is None:
        return Output()
    if isinstance(value, Mapping):
        for key in value:
            check_choice("a key of output", key, options_of(Output))
        return Output(**value)
    if isinstance(value, str) and value in set(Measure):
        return Output(measure=Measure(value))
    if isinstance(value, str) and value in set(Position):
        return Output(position=Position(value))
    if callable(value) or (isinstance(value, str) and value.startswith(PYTHON)):
        return Output(function=value)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return Output(part=value)
    raise ArgumentError(
        f"output is {value!r}; allowed: a key or an index of the model's result, {', '.join((*Measure, *Position))}, a "
        f"function, or a mapping with {', '.join(options_of(Output))}"
    )


def described(result: Any) -> str:
    """Say what a model's result is, with the shapes of its parts, for messages."""
    parts = _named_parts(result)
    if parts is None:
        return f"a {type(result).__name__}"
    shown = ", ".join(
        f"{key} {tuple(part.shape)}" if isinstance(part, Tensor) else f"{key} ({type(part).__name__})"
        for key, part in parts.items()
    )
    return f"a {type(result).__name__} with {shown or 'nothing in it'}"


def _named_parts(result: Any) -> dict[str | int, Any] | None:
    """The parts of a container, by key or index; None if it is none."""
    if isinstance(result, Mapping):
        return dict(result)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, Sequence) and not isinstance(result, str):
        fields = getattr(result, "_fields", range(len(result)))
        return dict(zip(fields, result, strict=True))
    return None


def _part_of(result: Any, wanted: str | int | None) -> Tensor:
    parts = _named_parts(result)
    if wanted is not None:
        if parts is None:
            raise ModelError(f"output.part is {wanted!r}, but the model returned {described(result)}; leave it out")
        by_place = isinstance(wanted, int) and wanted not in parts
        kept = [part for part in parts.values() if part is not None]
        if by_place and -len(kept) <= wanted < len(kept):  # type: ignore[operator]
            result = kept[wanted]  # type: ignore[index]
        elif wanted in parts:
            result = parts[wanted]
        else:
            raise ModelError(f"output.part is {wanted!r}, but the model returned {described(result)}")
    if not isinstance(result, Tensor):
        raise ModelError(
            f"the model returned {described(result)}; allowed: one tensor of shape (n,) or (n, C). Choose a part with "
            "the argument output"
        )
    return result


def _mask_of(values: Float[Tensor, "n t ..."], arguments: Arguments) -> Bool[Tensor, "n t"]:
    mask = arguments.get(MASK)
    if mask is None or mask.shape != values.shape[:2]:
        return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    return mask != 0


def _token_ids(values: Tensor, arguments: Arguments) -> Tensor:
    """The first part of the examples with one whole number for each position of the result."""
    for part in arguments.values():
        if part.shape == values.shape[:2] and not part.is_floating_point() and part.dtype != torch.bool:
            return part
    raise ModelError(
        f"output is next_token_loss, but the result has shape {tuple(values.shape)} and no part of the examples holds "
        "a whole number for each of its positions; choose the logits with output.part, or give labels"
    )


def _shifted(values: Tensor, labels: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Logits at a position beside the label at the next one; masked labels do not count."""
    if values.ndim != 3 or labels.shape != values.shape[:2]:
        raise _unfit(Measure.NEXT_TOKEN_LOSS, values, labels, "(n, t, C) and (n, t)")
    labels = torch.where(_mask_of(values, arguments), labels, _IGNORED)
    return values[:, :-1], labels[:, 1:]


def _loss(values: Tensor, labels: Tensor) -> Float[Tensor, " n"]:
    if labels.is_floating_point():
        if labels.shape != values.shape:
            raise _unfit(Measure.LOSS, values, labels, "equal shapes")
        return (
            0.5 * (values - labels).square().flatten(1).sum(1) if values.ndim > 1 else 0.5 * (values - labels).square()
        )
    if values.ndim < 2 or labels.shape != values.shape[:-1]:
        raise _unfit(Measure.LOSS, values, labels, "(n, C) and (n,), or (n, t, C) and (n, t)")
    counted = labels != _IGNORED
    logits = values.gather(-1, torch.where(counted, labels, 0).long()[..., None])[..., 0]
    losses = torch.where(counted, values.logsumexp(-1) - logits, 0.0).reshape(len(values), -1)
    return losses.sum(1) / counted.reshape(len(values), -1).sum(1).clamp_min(1)


def _margin(values: Tensor, labels: Tensor) -> Float[Tensor, " n"]:
    fits = values.ndim == 2 and values.shape[1] > 1 and labels.shape == values.shape[:1]
    if not fits or labels.is_floating_point():
        raise _unfit(Measure.MARGIN, values, labels, "(n, C) with C of 2 or more, and whole numbers (n,)")
    own = torch.arange(values.shape[1], device=values.device) == labels[:, None]
    return torch.where(own, values, 0.0).sum(1) - torch.where(own, -torch.inf, values).logsumexp(1)


def _unfit(measure: Measure, values: Tensor, labels: Tensor, allowed: str) -> ModelError:
    return ModelError(
        f"output is {measure}, but the result has shape {tuple(values.shape)} and the labels {tuple(labels.shape)}, "
        f"{labels.dtype}; allowed: {allowed}"
    )


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether a function of the result asks for the parts of the examples too."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len([p for p in positional if p.default is p.empty]) >= 2
