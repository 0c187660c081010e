"""The types of configuration fields: the base class of sections, and numbers and texts with their allowed values.

Each description is the text after `allowed:` in an error message (see `pipeline.config.schema`).
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, Strict

from nntk_dist.errors import ArgumentError, nearest_name
from nntk_dist.models.output import as_output
from nntk_dist.registration.registry import PYTHON, Registry

Text = Annotated[str, Field(min_length=1, pattern=r"^[^\n]+$", description="text, not empty")]
Flag = Annotated[bool, Field(description="true or false")]
Count = Annotated[int, Field(ge=1, description="a whole number, 1 or more")]
CountOrAll = Annotated[Count | None, Field(description="a whole number, 1 or more, or null for all there are")]
CountOrAuto = Annotated[Literal["auto"] | Count, Field(description="auto, or a whole number, 1 or more")]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0")]
MemoryOrAuto = Annotated[
    Literal["auto"] | Annotated[ByteSize, Field(gt=0)],
    Field(description="auto, or bytes as a whole number or with a unit, such as 4GiB"),
]
# Lists become tuples, so that no part of a section can change; strict mode would not convert a list.
Names = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1, description="a list of one or more names")]


def names_in(registry: Registry[Any], *others: str) -> str:
    """Return the allowed names of a registry, as text."""
    return ", ".join((*others, *registry.locations, f"{PYTHON}module:Name"))


def registered(key: str, registry: Registry[Any], *others: str) -> AfterValidator:
    """Return the check of the key `key`: a name in a registry, `python:module:Name`, or one of `others`."""

    def check(name: str) -> str:
        if name not in others and name not in registry:
            names = (*others, *registry, f"{PYTHON}module:Name")
            raise ValueError(f"{key} is '{name}'; allowed: {', '.join(names)}{nearest_name(name, names)}")
        return name

    return AfterValidator(check)


def check_output(value: Any) -> Any:
    """Return the key `model.output` as it came, if it describes an output of a model."""
    try:
        as_output(value)
    except ArgumentError as error:
        raise ValueError(f"model.{error}") from error
    return value


OutputChoice = Annotated[
    Any,
    AfterValidator(check_output),
    Field(
        description="what of the model's result is f: null, a key or index, loss, next_token_loss, margin, last, mean, "
        "all, python:module:function, or a mapping with part, position, classes, measure"
    ),
]


class Section(BaseModel):
    """A part of the configuration: frozen, no unknown key, no silent conversion (`"3"` and `true` are no numbers)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
