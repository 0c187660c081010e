"""Frozen values as plain JSON values, and back: dataclasses, enums, tuples, frozen sets, numbers, words, None.

`from_plain(type(value), to_plain(value)) == value` also after JSON. The types of the fields say what is restored; a
union may hold None and one other type. No references, no versions.
"""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Value = TypeVar("Value")


def to_plain(value: Any) -> Any:
    """Return a value in terms of dicts, lists, numbers, strings and None.

    Example:
        >>> from nntk_dist.layers.sites import Site
        >>> to_plain(Site("0", (("weight", "0.weight"),)))
        {'module': '0', 'parameters': [['weight', '0.weight']]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, frozenset):
        return sorted(map(to_plain, value))
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} has no plain form")


def from_plain(kind: type[Value], plain: Any, **types_of_fields: type) -> Value:
    """Restore a value of a type from its plain form.

    Args:
        kind: its class.
        plain: the result of `to_plain`, also after a round trip through JSON.
        types_of_fields: the classes of fields that are declared with a base class.

    Raises:
        ValueError: something is missing, unknown, or of another type; the message names the key.
    """
    restored: Value = _dataclass(kind, plain, "", types_of_fields)
    return restored


def _restored(kind: Any, plain: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return plain
    if origin in (Union, types.UnionType):
        if plain is None and type(None) in arguments:
            return None
        (kind,) = [each for each in arguments if each is not type(None)]
        return _restored(kind, plain, where)
    if is_dataclass(kind):
        return _dataclass(kind, plain, where, {})
    if origin in (tuple, frozenset):
        return _collection(origin, arguments, plain, where)
    if kind is float and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    if isinstance(kind, type) and issubclass(kind, Enum) and plain in {choice.value for choice in kind}:
        return kind(plain)
    if type(plain) is not kind:
        raise ValueError(f"{where or 'the value'} is {plain!r:.60}; expected {kind.__name__}")
    return plain


def _dataclass(kind: Any, plain: Any, where: str, types_of_fields: Mapping[str, type]) -> Any:
    if not isinstance(plain, Mapping):
        raise ValueError(f"{where or 'the value'} is {plain!r:.60}; expected the fields of {kind.__name__}")
    hints = get_type_hints(kind) | dict(types_of_fields)
    prefix = f"{where}." if where else ""
    names = [field.name for field in fields(kind)]
    for name in names:
        if name not in plain:
            raise ValueError(f"{prefix}{name} is missing")
    for name in plain:
        if name not in names:
            raise ValueError(f"{prefix}{name} is unknown")
    return kind(**{name: _restored(hints[name], plain[name], f"{prefix}{name}") for name in names})


def _collection(origin: Any, arguments: tuple[Any, ...], plain: Any, where: str) -> Any:
    if not isinstance(plain, list | tuple):
        raise ValueError(f"{where or 'the value'} is {plain!r:.60}; expected a list")
    if origin is tuple and Ellipsis not in arguments:
        if len(plain) != len(arguments):
            raise ValueError(f"{where or 'the value'} has {len(plain)} items; expected {len(arguments)}")
        kinds = arguments
    else:
        kinds = (arguments[0],) * len(plain)
    return origin(_restored(kind, item, where) for kind, item in zip(kinds, plain, strict=True))
