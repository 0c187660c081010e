"""The section `kernel` of the configuration, generated from `KernelSpec`, the laws and `Weighting`.

Each option is declared there, with its default, check and allowed values. This module only says which keys are nested
and turns a section into a `KernelSpec`. It computes nothing.
"""

import math
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from nntk_dist.errors import NNTKError
from nntk_dist.registration.options import YAML_SPELLING, Check, Option, options_of
from nntk_dist.registration.registry import PYTHON
from nntk_dist.sampling.laws import LAWS, option_owners
from nntk_dist.spec import KernelSpec, kernel_options
from nntk_dist.weighting.options import Weighting
from pipeline.config.types import Section

_DECLARED = kernel_options()


def _section(name: str, fields: dict[str, Any]) -> Any:
    """A section with these fields, each a pair of annotation and pydantic field."""
    return create_model(name, __base__=Section, **fields)


def _field(check: Check, default: Any, allowed: str | None = None) -> tuple[Any, Any]:
    """A pydantic field with the check, default and allowed text of an option."""
    allowed = check.allowed(YAML_SPELLING) if allowed is None else allowed

    def take(value: Any) -> Any:
        try:
            return _plain(check.take(value))
        except NNTKError as error:  # which begins with the option's name
            raise ValueError(f"kernel.{error}") from error
        except (TypeError, ValueError, OverflowError):
            # pydantic shows neither template nor context: `pipeline.config.schema` makes the message of them.
            raise PydanticCustomError("option", "not allowed", {"words": check.words}) from None

    return Annotated[Any, BeforeValidator(take)], Field(default=_plain(default), description=allowed)


def _plain(value: Any) -> Any:
    """An enum as its text, other values as they are: sections hold what YAML and JSON have."""
    return value.value if isinstance(value, Enum) else value


def _law_fields() -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The options of all laws of this project; null stands for a law's default."""
    for name, law in option_owners().items():
        declared = options_of(LAWS.get(law))[name]
        allowed = f"{declared.check.allowed(YAML_SPELLING)}, for distribution {law}; null for {declared.default:g}"
        yield name, _optional(declared, allowed)


def _optional(declared: Option, allowed: str) -> tuple[Any, Any]:
    annotation, _ = _field(declared.check, None, allowed)
    return annotation | None, Field(default=None, description=allowed)


_law = _DECLARED["distribution"].default
_gamma = options_of(LAWS.get(_law))["gamma"]
_DistributionFields: Any = _section(
    "_DistributionFields",
    {
        "name": (str, Field(default=_law, description=f"{', '.join(LAWS.locations)}, or python:module:Name")),
        "gamma": _field(_gamma.check, _DECLARED["gamma"].facts["in_configuration"]),
        "gamma_scale": _field(_DECLARED["gamma_scale"].check, _DECLARED["gamma_scale"].default),
        **dict(_law_fields()),
        "options": (dict[str, Any], Field(default={}, description="a mapping with the options of a user's law")),
    },
)


class DistributionConfig(_DistributionFields):
    """The law ρ of the perturbations; `gamma` is their range: E|z|² = P·γ²/2.

    With `gamma_scale` relative, the range of each tensor is in units of its root mean square. An option that is null
    takes the law's default.
    """

    @field_validator("name")
    @classmethod
    def _name_exists(cls, value: str) -> str:
        if value not in LAWS:
            raise PydanticCustomError("option", "not allowed", {"words": tuple(LAWS)})
        return value


_WEIGHTING = {
    name: declared
    for name, declared in options_of(Weighting).items()
    if declared.facts.get("in_configuration", declared.check) is not None
}
_WeightingFields: Any = _section(
    "_WeightingFields",
    {
        name: _field(declared.facts.get("in_configuration", declared.check), declared.default)
        for name, declared in _WEIGHTING.items()
    },
)


class WeightingConfig(_WeightingFields):
    """How the draws of a block are weighted against each other: by the softmax of a score over the temperature.

    `dimension` is the length of queries and keys (score `parameter`); `reference` is the number of training examples on
    which the other scores compare outputs. Infinity gives equal weights; it is stored as null, because JSON lacks it.
    """

    @field_validator("temperature")
    @classmethod
    def _infinity_is_null(cls, value: float | None) -> float | None:
        return None if value is None or math.isinf(value) else value

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        try:
            self.weighting()
        except NNTKError as error:
            raise ValueError(f"kernel.{error}") from error
        return self

    def weighting(self) -> Weighting:
        """Return the weighting that the section describes."""
        return Weighting(**{name: getattr(self, name) for name in _WEIGHTING})


_NESTED: dict[str, Any] = {
    "distribution": (DistributionConfig, DistributionConfig()),
    "weighting": (WeightingConfig, WeightingConfig()),
}
# The options at the top of the section: neither nested ones, nor those that stand in `distribution`.
_TOP = {name: declared for name, declared in _DECLARED.items() if "section" not in declared.facts}
_KernelFields: Any = _section(
    "_KernelFields",
    {name: _NESTED.get(name) or _field(declared.check, declared.default) for name, declared in _TOP.items()},
)


class KernelConfig(_KernelFields):
    """Which kernel, by which estimator, from how many draws."""

    if TYPE_CHECKING:  # its fields are generated

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.distribution.name.startswith(PYTHON):  # its module need not be here; planning imports it
            return self
        try:
            self.spec()
        except NNTKError as error:
            name = str(error).partition(" ")[0]
            nested = name in DistributionConfig.model_fields and name not in _TOP
            raise ValueError(f"kernel.{'distribution.' if nested else ''}{error}") from error
        return self

    def spec(self) -> KernelSpec:
        """Return the kernel that the section describes.

        Raises:
            ArgumentError: options do not go together, or a law cannot be imported.
        """
        values = {name: getattr(self, name) for name in _TOP if name not in _NESTED}
        law = self.distribution.model_dump()
        gamma_scale = law.pop("gamma_scale")
        return KernelSpec(**values, distribution=law, gamma_scale=gamma_scale, weighting=self.weighting.weighting())
