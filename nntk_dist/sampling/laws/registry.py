"""The table of laws by name, and the conversion of names, mappings and objects to laws."""

import inspect
from collections.abc import Mapping
from typing import Any

from nntk_dist.errors import ArgumentError, check_choice
from nntk_dist.registration.callables import call_checked
from nntk_dist.registration.options import Number, convert, options_of
from nntk_dist.registration.registry import Registry
from nntk_dist.sampling.laws.base import Law

LAWS: Registry[type[Law]] = Registry(
    "distribution",
    "nntk_dist.laws",
    {
        "gaussian": "nntk_dist.sampling.laws.gaussian:Gaussian",
        "sphere": "nntk_dist.sampling.laws.sphere:Sphere",
        "ball": "nntk_dist.sampling.laws.ball:Ball",
        "fractional": "nntk_dist.sampling.laws.fractional:Fractional",
        "student": "nntk_dist.sampling.laws.student:Student",
        "lowrank": "nntk_dist.sampling.laws.low_rank:LowRank",
    },
)


def as_law(value: object, gamma: float | None = None) -> Law:
    """Convert the argument `distribution` to a law.

    Args:
        value: a law, its name, or a mapping of `name`, `gamma` and the law's options (directly or under `options`).
        gamma: the range, if `value` does not contain it.

    Raises:
        ArgumentError: there is no such law, an option is not allowed, or the range is missing or given twice.
    """
    if isinstance(value, Law) and not isinstance(value, type):
        _check_given_once(gamma, value.gamma, value)
        return value
    if isinstance(value, str):
        return make_law(value, _given(gamma))
    if not isinstance(value, Mapping):
        names = ", ".join(LAWS)
        raise ArgumentError(
            f"distribution is {value!r}; allowed: {names}, python:module:name, a mapping of name, gamma and options, "
            "or an object such as Gaussian(gamma=0.1)"
        )
    options = {key: option for key, option in value.items() if key not in ("name", "gamma", "options")}
    options |= value.get("options") or {}
    own = value.get("gamma")
    if own is not None:
        _check_given_once(gamma, own, dict(value))
    return make_law(value.get("name", "gaussian"), _given(gamma if own is None else own), **options)


def has_gamma(value: object) -> bool:
    """Return whether the argument `distribution` contains the range: a law, or a mapping with `gamma`."""
    if isinstance(value, Mapping):
        return value.get("gamma") is not None
    return not isinstance(value, str)


def make_law(name: str, gamma: float, **options: Any) -> Law:
    """Make the law called `name`.

    Args:
        name: a name in `LAWS`, or `python:module:Name`.
        gamma: the range.
        options: the options of this law; None keeps the default.

    Raises:
        ArgumentError: there is no such law, or γ or an option is not allowed.
    """
    kind = LAWS.get(name)
    gamma = convert("gamma", gamma, Number(above=0))
    given = {option: value for option, value in options.items() if value is not None}
    own = [parameter for parameter in inspect.signature(kind).parameters if parameter != "gamma"]
    owners = option_owners()
    for option, value in given.items():
        if option in owners and option not in own:
            raise ArgumentError(
                f"{option} is {value}, but it is an option of {owners[option]}; allowed for distribution {name}: "
                f"{', '.join(own) or 'none'}"
            )
        check_choice(f"an option of distribution {name}", option, own or ("none",))
    law = call_checked(kind, {"gamma": gamma} | given, what=f"distribution {name}")
    if not isinstance(law, Law):
        raise ArgumentError(
            f"distribution {name} made a {type(law).__name__}; allowed: an object with the members of RadialLaw, name, "
            "gamma, normalised and scale"
        )
    return law


def law_options(law: Law) -> dict[str, Any]:
    """Return the options of a law without γ, with their values."""
    return {name: getattr(law, name) for name in _declared(law) if name != "gamma"}


def option_owners() -> dict[str, str]:
    """Return the option names of this project's laws, mapped to the names of the laws."""
    return {option: name for name in LAWS.locations for option in _declared(LAWS.get(name)) if option != "gamma"}


def radial_names() -> tuple[str, ...]:
    """Return the names of this project's radial laws."""
    return tuple(name for name in LAWS.locations if hasattr(LAWS.get(name), "scale"))


def _declared(law: Any) -> list[str]:
    return list(options_of(law)) if hasattr(law, "__dataclass_fields__") else []


def _given(gamma: float | None) -> float:
    if gamma is None:
        raise ArgumentError(
            "gamma is missing; give the range of the perturbations, such as gamma=0.1, or a distribution with a range, "
            "such as Gaussian(gamma=0.1)"
        )
    return gamma


def _check_given_once(gamma: float | None, own: float, owner: object) -> None:
    if gamma is not None and gamma != own:
        raise ArgumentError(f"gamma is {gamma!r}, but the distribution {owner!r} has its own; give one of them")
