"""Calling functions that a configuration names: importing them and checking the arguments that it gives them.

Refuses to guess: an argument that a function does not take is an error naming the nearest one that it does.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nntk_dist.errors import NNTKError, nearest_name


def import_function(location: str, *, what: str) -> Callable[..., Any]:
    """The callable that `location`, of the form `module:function`, names; `function` may be dotted (`Class.method`).

    Raises:
        NNTKError: the form is wrong, the module cannot be imported, or it holds no such callable.
    """
    found = import_object(location, what=what)
    if not callable(found):
        raise NNTKError(
            f"{what} 'python:{location}' is a {type(found).__name__}, not a function; name one that is called"
        )
    return found


def import_object(location: str, *, what: str) -> Any:
    """Import whatever `location`, of the form `module:name`, names; `name` may be dotted.

    Raises:
        NNTKError: the form is wrong, the module cannot be imported, or it holds no such name.
    """
    module_name, _, function_name = location.partition(":")
    if not module_name or not function_name:
        raise NNTKError(f"{what} 'python:{location}' has the wrong form; write python:module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a module's own code may raise anything while it is imported
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise NNTKError(
            f"{what} 'python:{location}': cannot import '{module_name}' ({reason}); put its folder on PYTHONPATH"
        ) from error
    for name in function_name.split("."):
        near = nearest_name(name, dir(found))
        found = getattr(found, name, None)
        if found is None:
            raise NNTKError(f"{what} 'python:{location}': '{module_name}' has no '{function_name}'{near}")
    return found


def call_checked(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, what: str, offered: Mapping[str, Any] | None = None
) -> Any:
    """`function(**arguments)`, with those of the `offered` arguments that its signature accepts and `arguments` lack.

    Raises:
        NNTKError: an argument that the function does not take, one that it needs and did not get, or a value that it
            refuses (any exception of its own is the cause of the error raised here).
    """
    parameters = _named_parameters(function)
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if not accepts_any:
        for name in arguments:
            if name not in accepted:
                allowed = ", ".join(accepted) or "none"
                raise NNTKError(f"{what} takes no argument '{name}'; allowed: {allowed}{nearest_name(name, accepted)}")
    extra = {name: value for name, value in (offered or {}).items() if accepts_any or name in accepted}
    given = {**extra, **arguments}
    missing = [name for name in accepted if parameters[name].default is inspect.Parameter.empty and name not in given]
    if missing:
        raise NNTKError(f"{what} needs the argument '{missing[0]}', which was not given")
    try:
        return function(**given)
    except NNTKError:
        raise
    except Exception as error:  # the function may be anyone's; its exception stays visible as the cause
        given_by_user = f" with {_shown(arguments)}" if arguments else ""
        raise NNTKError(f"{what} failed{given_by_user}: {type(error).__name__}: {_one_line(error)}") from error


def check_integer(what: str, value: Any, minimum: int) -> None:
    """Raise an `NNTKError` unless `value` is an integer (a boolean is not one) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise NNTKError(f"{what} is {value!r}; give an integer of at least {minimum}")


def check_integers(what: str, values: Any, minimum: int) -> None:
    """Raise an `NNTKError` unless `values` is a list or tuple of integers of at least `minimum`."""
    if not isinstance(values, list | tuple):
        raise NNTKError(f"{what} is {values!r}; give a list of integers of at least {minimum}")
    for index, value in enumerate(values):
        check_integer(f"{what}[{index}]", value, minimum)


def _named_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature: they judge their arguments
        return {"arguments": inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)}
    not_by_name = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return {name: parameter for name, parameter in signature.parameters.items() if parameter.kind not in not_by_name}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _shown(arguments: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {value!r}" for name, value in arguments.items()) + "}"
