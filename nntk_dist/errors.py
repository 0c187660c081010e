"""The one error type that a user of this library should ever meet, and the one warning.

An `NNTKError` says what was wrong (the argument, what came), what is allowed and what to do next, in one line.
The command line prints it and exits with code 2; everything else is a bug and keeps its traceback. An `NNTKWarning`
says which numbers are not to be trusted, and why, where nothing is refused.
"""

import difflib
from collections.abc import Iterable


class NNTKError(ValueError):
    """Something that the caller can put right: a wrong argument, file, model or store.

    The message is one line: what, where, allowed values, next step.
    """


class NNTKWarning(UserWarning):
    """Numbers are given, but not as good as was asked for, or not to be trusted as they stand; says what helps."""


def nearest_name(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the allowed name nearest to `name`, or an empty string where none is near."""
    matches = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raise an `NNTKError` naming the allowed values unless `value` is one of them."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise NNTKError(f"{what} is '{value}'; allowed: {', '.join(allowed)}{nearest_name(value, allowed)}")
