"""Calling functions that a configuration names: importing them and checking the arguments that it gives them.

It never guesses: an argument that a function does not take is an error that names the nearest one it does take.
`inspect.Signature.bind` finds the same mistakes, but its messages name neither what is allowed nor what is near.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nntk_dist.errors import ArgumentError, NNTKError, nearest_name, one_line


def import_function(location: str, *, what: str) -> Callable[..., Any]:
    """Import the callable that `location` names.

    Args:
        location: `module:function`; `function` may be dotted (`Class.method`).
        what: the kind of thing, with which messages begin.

    Raises:
        ArgumentError: the form is wrong, the module cannot be imported, or it has no such callable.

    Example:
        >>> import_function("math:isqrt", what="root")(10)
        3
    """
    found = import_object(location, what=what)
    if not callable(found):
        raise ArgumentError(
            f"{what} 'python:{location}' is a {type(found).__name__}, not a function; name one that is called"
        )
    return found


def import_object(location: str, *, what: str) -> Any:
    """Import the object that `location` names.

    Args:
        location: `module:name`; `name` may be dotted.
        what: the kind of thing, with which messages begin.

    Raises:
        ArgumentError: the form is wrong, the module cannot be imported, or it has no such name.
    """
    module_name, _, function_name = location.partition(":")
    if not module_name or not function_name:
        raise ArgumentError(f"{what} 'python:{location}' has the wrong form; write python:module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a module's own code may raise anything while it is imported
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ArgumentError(
            f"{what} 'python:{location}': cannot import '{module_name}' ({reason}); put its folder on PYTHONPATH"
        ) from error
    for name in function_name.split("."):
        owner, found = found, getattr(found, name, None)
        if found is None:
            near = nearest_name(name, dir(owner))
            raise ArgumentError(f"{what} 'python:{location}': '{module_name}' has no '{function_name}'{near}")
    return found


def call_checked(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    what: str,
    offered: Mapping[str, Any] | None = None,
    failure: type[NNTKError] = ArgumentError,
) -> Any:
    """Call `function(**arguments)` after checking the arguments against its signature.

    Args:
        function: anyone's.
        arguments: that the user gives.
        what: names the function in messages.
        offered: further arguments, passed if the signature accepts them and `arguments` lack them.
        failure: the error to raise if the function raises an exception, which becomes its cause; an NNTKError passes
            unchanged.

    Returns:
        What the function returns.

    Raises:
        ArgumentError: not a function, an argument that it does not take, or one that it needs and did not get.

    Example:
        >>> call_checked(round, {"number": 2.75}, what="rounding", offered={"ndigits": 1, "other": 0})
        2.8
    """
    if not callable(function):
        raise ArgumentError(f"{what} is a {type(function).__name__}, not a function; name one that is called")
    parameters = _named_parameters(function)
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if not accepts_any:
        for name in arguments:
            if name not in accepted:
                allowed = ", ".join(accepted) or "none"
                near = nearest_name(name, accepted)
                raise ArgumentError(f"{what} takes no argument '{name}'; allowed: {allowed}{near}")
    extra = {name: value for name, value in (offered or {}).items() if accepts_any or name in accepted}
    given = {**extra, **arguments}
    missing = [name for name in accepted if parameters[name].default is inspect.Parameter.empty and name not in given]
    if missing:
        raise ArgumentError(f"{what} needs the argument '{missing[0]}', which was not given")
    try:
        return function(**given)
    except NNTKError:
        raise
    except Exception as error:  # the function may be anyone's; its exception stays visible as the cause
        given_by_user = f" with {_shown(arguments)}" if arguments else ""
        raise failure(f"{what} failed{given_by_user}: {type(error).__name__}: {one_line(error)}") from error


def takes_argument(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function takes an argument of this name.

    Example:
        >>> takes_argument(round, "ndigits")
        True
    """
    parameters = _named_parameters(function)
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def check_integer(what: str, value: Any, minimum: int) -> None:
    """Check that `value` is an integer (a boolean is not one) of at least `minimum`.

    Args:
        what: the argument's name, with which the message begins.
        value: what came.
        minimum: the smallest allowed value.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ArgumentError(f"{what} is {value!r}; give an integer of at least {minimum}")


def check_integers(what: str, values: Any, minimum: int) -> None:
    """Check that `values` is a list or tuple of integers of at least `minimum`.

    Args:
        what: the argument's name, with which the message begins.
        values: what came.
        minimum: the smallest allowed value.

    Raises:
        ArgumentError: it is not.
    """
    if not isinstance(values, list | tuple):
        raise ArgumentError(f"{what} is {values!r}; give a list of integers of at least {minimum}")
    for index, value in enumerate(values):
        check_integer(f"{what}[{index}]", value, minimum)


def _named_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature: they judge their arguments
        return {"arguments": inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)}
    not_by_name = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return {name: parameter for name, parameter in signature.parameters.items() if parameter.kind not in not_by_name}


def _shown(arguments: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {value!r}" for name, value in arguments.items()) + "}"
