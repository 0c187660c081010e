"""The errors that a user can meet, typed by what the user can do about them, and the one warning.

Every message is one line: what came, what is allowed, and a next step that exists. The command line prints it and exits
with code 2. Any other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class NNTKError(ValueError):
    """Base class of all errors that the caller can fix. Raise one of its subclasses."""


class ArgumentError(NNTKError):
    """An argument or a configuration key has a value that is not allowed, alone or beside the others."""


class ModelError(NNTKError):
    """No kernel can be computed for this model: it fails, is not finite, or depends on its batch."""


class DataError(NNTKError):
    """The examples or targets are missing, malformed, not finite, or do not fit the model."""


class StoreError(NNTKError):
    """A run directory, or a file in it, is missing, damaged, unreadable, or belongs to another run."""


class Unavailable(NNTKError):
    """This way does not work for this model or machine, but another one may. `auto` then tries the next one."""


class NNTKWarning(UserWarning):
    """The numbers are less accurate than requested, or cannot be trusted; the message says why, and what helps."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if it has no message."""
    return str(error).partition("\n")[0] or type(error).__name__


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line."""
    return " ".join(str(error).split())


def nearest_name(name: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the allowed name nearest to `name`, or an empty string if none is near."""
    matches = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    """Check that `value` is one of the allowed names.

    Args:
        what: the argument's name, with which the message begins.
        value: what came.
        allowed: the names to choose from.

    Raises:
        ArgumentError: it is not; the message lists the allowed names and the nearest one.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ArgumentError(f"{what} is '{value}'; allowed: {', '.join(allowed)}{nearest_name(value, allowed)}")
