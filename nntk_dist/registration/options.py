"""Options declared once: the type, default, check and description of a dataclass field, kept in its metadata.

A frozen dataclass declares its options with `option` and calls `convert_options` when it is made. Signatures, sections
of the configuration, error messages and reference pages read the same declarations. No option is declared here.
"""

import dataclasses
import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from nntk_dist.errors import ArgumentError, NNTKError, nearest_name
from nntk_dist.registration.registry import PYTHON, Registry

REQUIRED = dataclasses.MISSING
_METADATA = "option"
_GROUP_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


class Automatic(StrEnum):
    """The word that leaves a choice to the planner."""

    AUTO = "auto"


@dataclass(frozen=True)
class Spelling:
    """How a language writes the values that Python and YAML write differently."""

    none: str
    infinity: str
    flags: str


PYTHON_SPELLING = Spelling("None", "infinity", "True or False")
YAML_SPELLING = Spelling("null", ".inf", "true or false")


@dataclass(frozen=True)
class Check(ABC):
    """What is allowed for an option.

    Args:
        text: what is allowed, in words, if the check does not say it itself.
    """

    text: str = field(default="", kw_only=True)

    @property
    def words(self) -> tuple[str, ...]:
        """The words that are allowed, from which an error message suggests the nearest."""
        return ()

    def allowed(self, spelling: Spelling = PYTHON_SPELLING) -> str:
        """Return what is allowed, as an error message and the reference page say it."""
        return self.text

    @abstractmethod
    def take(self, value: Any) -> Any:
        """Return the value in its final type. Raises: TypeError or ValueError if it is not allowed."""


@dataclass(frozen=True)
class Choice(Check):
    """One of the members of an enum, given as itself or as its value."""

    choices: type[StrEnum]

    @property
    def words(self) -> tuple[str, ...]:
        """The values of the enum."""
        return tuple(str(choice) for choice in self.choices)

    def allowed(self, spelling: Spelling = PYTHON_SPELLING) -> str:
        """Return the values, separated by commas."""
        return ", ".join(self.words)

    def take(self, value: Any) -> str:
        """Return the member."""
        return self.choices(value)


@dataclass(frozen=True)
class Registered(Choice):
    """A member of an enum, or another name in a registry: an installed package's, or `python:module:name`.

    Args:
        choices: the project's own names, and words such as `auto`.
        registry: where other names are looked up.
    """

    registry: Registry[Any]

    @property
    def words(self) -> tuple[str, ...]:
        """The values of the enum, then the names of installed packages."""
        return tuple(dict.fromkeys((*super().words, *self.registry)))

    def allowed(self, spelling: Spelling = PYTHON_SPELLING) -> str:
        """Return all names, separated by commas, and the form of an importable one."""
        return ", ".join((*self.words, f"{PYTHON}module:name"))

    def take(self, value: Any) -> str:
        """Return the member, or the name."""
        if value in set(self.choices):
            return self.choices(value)
        if value not in self.registry:
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class WholeNumber(Check):
    """An integer of any integer type in a range, or one of some words; a boolean is not an integer.

    Args:
        minimum: smallest value.
        below: first value that is too large.
        choices: words that are allowed too.
    """

    minimum: int
    below: int | None = None
    choices: type[StrEnum] | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The words that are allowed beside numbers."""
        return () if self.choices is None else tuple(str(choice) for choice in self.choices)

    def allowed(self, spelling: Spelling = PYTHON_SPELLING) -> str:
        """Return the words and the range."""
        number = self.text or f"a whole number, {self.minimum} or more"
        return f"{', '.join(self.words)}, or {number}" if self.words else number

    def take(self, value: Any) -> Any:
        """Return an int or a word."""
        if isinstance(value, str) and self.choices is not None:
            return self.choices(value)
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
        if number < self.minimum or (self.below is not None and number >= self.below):
            raise ValueError
        return number


@dataclass(frozen=True)
class Number(Check):
    """A real number in a range; NaN and booleans are refused, infinity unless it is allowed.

    In `text`, `{none}` and `{infinity}` are replaced by the language's words for them.

    Args:
        above: the value must be larger.
        at_least: the value must be this or larger.
        below: the value must be smaller.
        none: whether None is allowed.
        infinite: whether infinity is allowed.
    """

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    none: bool = False
    infinite: bool = False

    def allowed(self, spelling: Spelling = PYTHON_SPELLING) -> str:
        """Return the range."""
        if self.text:
            return self.text.format(none=spelling.none, infinity=spelling.infinity)
        if math.isfinite(self.at_least):
            text = f"a number from {self.at_least:g} to below {self.below:g}"
        else:
            text = f"a number above {self.above:g}" + (f" and below {self.below:g}" if self.below < math.inf else "")
        return f"{spelling.none}, or {text}" if self.none else text

    def take(self, value: Any) -> float | None:
        """Return a float, or None."""
        if value is None and self.none:
            return None
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        number = float(value)
        inside = number > self.above and number >= self.at_least and number < self.below
        if not (inside or (self.infinite and number == math.inf)):
            raise ValueError
        return number


@dataclass(frozen=True)
class Flag(Check):
    """True or False."""

    def allowed(self, spelling: Spelling = PYTHON_SPELLING) -> str:
        """Return both values."""
        return spelling.flags

    def take(self, value: Any) -> bool:
        """Return the value if it is a boolean."""
        if not isinstance(value, bool):
            raise TypeError
        return value


@dataclass(frozen=True)
class Names(Check):
    """One name or several, kept as a tuple."""

    def take(self, value: Any) -> tuple[str, ...]:
        """Return a tuple of names."""
        names = (value,) if isinstance(value, str) else tuple(value)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError
        return names


@dataclass(frozen=True)
class NamesOrGroups(Names):
    """Names as `Names` takes them, or a mapping of group names to names; a group's name can be a folder's."""

    def take(self, value: Any) -> Any:
        """Return a tuple of names, or a dict of such tuples."""
        if not isinstance(value, Mapping):
            return super().take(value)
        if not value or not all(isinstance(group, str) and _GROUP_NAME.fullmatch(group) for group in value):
            raise ValueError
        return {group: super(NamesOrGroups, self).take(names) for group, names in value.items()}


@dataclass(frozen=True)
class Converted(Check):
    """A value that a function converts; the function raises an ArgumentError if the value is not allowed."""

    convert: Callable[[Any], Any]

    def take(self, value: Any) -> Any:
        """Return what the function makes of the value."""
        return self.convert(value)


@dataclass(frozen=True)
class Option:
    """One declared option.

    Attributes:
        name: its name as an argument and as a key.
        default: its default, `REQUIRED` if it has none.
        check: what is allowed.
        text: what it means, in one line.
        facts: what else the declaring class says of it.
    """

    name: str
    default: Any
    check: Check
    text: str
    facts: Mapping[str, Any]


def option(
    default: Any, check: Check, text: str, *, compare: bool = True, repr: bool = True, **facts: Any
) -> Any:  # dataclass field
    """Declare an option as a field of a dataclass.

    Args:
        default: its default, or `REQUIRED`.
        check: what is allowed.
        text: what it means, in one line.
        compare: whether it counts when two objects are compared.
        repr: whether it is shown.
        facts: what the declaring class reads from the declaration.

    Returns:
        The dataclass field.
    """
    metadata = {_METADATA: (check, text, MappingProxyType(facts))}
    return dataclasses.field(default=default, compare=compare, repr=repr, metadata=metadata)


def options_of(declaring: Any) -> dict[str, Option]:
    """Return the options that a dataclass, or an object of it, declares, in their order."""
    found = {}
    for name, each in declaring.__dataclass_fields__.items():
        if _METADATA in each.metadata:
            check, text, facts = each.metadata[_METADATA]
            found[name] = Option(name, each.default, check, text, facts)
    return found


def convert_options(instance: Any, prefix: str = "") -> None:
    """Check the options of a dataclass object that is being made, and set them in their final types.

    Args:
        instance: the object, frozen or not.
        prefix: what precedes a name in a message, such as "weighting.".

    Raises:
        ArgumentError: a value is not allowed; the message begins with the option's name.
    """
    declared = options_of(instance)
    for each in dataclasses.fields(instance):
        if each.name in declared:
            value = getattr(instance, each.name)
            taken = convert(f"{prefix}{each.name}", value, declared[each.name].check)
            object.__setattr__(instance, each.name, taken)


def convert(name: str, value: Any, check: Check) -> Any:
    """Return a value in its final type.

    Raises:
        ArgumentError: it is not allowed; the message begins with `name`.
    """
    try:
        return check.take(value)
    except NNTKError:
        raise
    except (TypeError, ValueError, OverflowError):
        hint = nearest_name(value, check.words) if isinstance(value, str) else ""
        raise ArgumentError(f"{name} is {_shown(value)}; allowed: {check.allowed()}{hint}") from None


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, Enum | str) else repr(value)


@dataclass(frozen=True)
class OptionRow:
    """One row of a reference table: name, what is allowed, default and meaning, all as text."""

    name: str
    allowed: str
    default: str
    text: str


def option_rows(
    declaring: Any, wanted: Sequence[str] | None = None, spelling: Spelling = PYTHON_SPELLING
) -> Iterator[OptionRow]:
    """Yield a row for each option that a dataclass declares, for reference pages.

    Args:
        declaring: the dataclass.
        wanted: the options to list, all by default.
        spelling: how values are written.

    Example:
        >>> from nntk_dist.sampling.laws import Student
        >>> next(row for row in option_rows(Student) if row.name == "nu").default
        '5.0'
    """
    for name, declared in options_of(declaring).items():
        if wanted is None or name in wanted:
            yield OptionRow(name, declared.check.allowed(spelling), _default_text(declared.default), declared.text)


def _default_text(default: Any) -> str:
    if default is REQUIRED:
        return "required"
    return str(default) if isinstance(default, Enum) else repr(default)


def is_integer(value: object) -> bool:
    """Return whether a value is an integer of any type; a boolean is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
