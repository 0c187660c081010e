"""A digest of a user's code for later stages, which run again if it changes.

The code of solvers and stages that a configuration names as `python:module:Name`. It is compared by its instructions:
unlike a kernel, what they compute cannot be tried on a few rows, and to run them again is cheap. So another comment
changes nothing, and another version of Python may run a stage again for nothing.

Axes: none.
"""

import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from pipeline.records.manifest import fingerprint

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_digest(made: type | FunctionType) -> str:
    """Return a digest of the instructions and constants of all functions and classes in an object's module.

    Args:
        made: a class or function; what it takes from other modules does not count.

    Example:
        >>> code_digest(code_digest) == code_digest(code_digest)
        True
    """
    module = sys.modules.get(made.__module__)
    members = {made.__qualname__: made} | ({} if module is None else vars(module))
    described = {name: list(_described(value, made.__module__)) for name, value in members.items()}
    return fingerprint({name: text for name, text in described.items() if text and not _is_hidden(name)})[:16]


def _described(value: Any, module: str) -> Iterator[str]:
    """The parts of a function, class or constant of a module, as texts; nothing for what it has imported."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from _described(part, module)
    elif isinstance(value, FunctionType) and value.__module__ == module:
        yield from _instructions(value.__code__)
        yield _text((value.__defaults__, value.__kwdefaults__))
    elif isinstance(value, type) and value.__module__ == module:
        yield _text(tuple(base.__qualname__ for base in value.__bases__))
        for name, member in sorted(vars(value).items()):
            if not _is_hidden(name) or isinstance(member, FunctionType):
                yield name
                yield from _described(member, module)
    elif isinstance(value, (*_PLAIN, tuple, frozenset, list, dict)):
        yield _text(value)


def _instructions(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield _text(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield _text(constant)


def _text(value: Any) -> str:
    """A constant as a text that does not depend on the order of sets or on addresses."""
    if isinstance(value, frozenset | set):
        return "{" + ", ".join(sorted(map(_text, value))) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_text, value)) + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(each)}" for key, each in value.items()) + "}"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__


def _is_hidden(name: str) -> bool:
    """Whether Python itself has added an attribute, such as the file's name."""
    return name.startswith("__") and name.endswith("__")
