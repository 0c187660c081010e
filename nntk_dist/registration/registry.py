"""Registries: named things of one kind, from this project and from a user's own package.

A registry is an immutable table from names to `module:attribute` locations, so that registering is one line and nothing
is imported before it is used. A name that the table lacks is looked up among the installed entry points of the
registry's group; `python:module:attribute` names anything that can be imported.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from nntk_dist.errors import ArgumentError, nearest_name
from nntk_dist.registration.callables import import_object

PYTHON = "python:"

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Registry(Generic[Entry]):
    """All objects of one kind, by name.

    Args:
        kind: what the entries are, for messages, such as "distribution".
        group: the entry-point group in which other packages register theirs, such as "nntk_dist.laws".
        locations: name to `module:attribute`.

    Example:
        >>> ROOTS = Registry("root", "nntk_dist.roots", {"square": "math:sqrt"})
        >>> ROOTS.get("square")(9.0)
        3.0
        >>> ROOTS.get("python:math:isqrt")(10)
        3
    """

    kind: str
    group: str
    locations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "locations", MappingProxyType(dict(self.locations)))

    def __iter__(self) -> Iterator[str]:
        """Iterate over all names: the project's own first, then the names of installed packages."""
        yield from self.locations
        yield from (point.name for point in self._installed() if point.name not in self.locations)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return name.startswith(PYTHON) or name in self.locations or name in self._installed().names

    def get(self, name: str) -> Entry:
        """Import and return the entry called `name`.

        Args:
            name: a registered name, or `python:module:attribute`.

        Returns:
            The entry itself; it is imported on first use.

        Raises:
            ArgumentError: there is no such entry, or it cannot be imported.
        """
        if name.startswith(PYTHON):
            return self._imported(name.removeprefix(PYTHON))
        if name in self.locations:
            return self._imported(self.locations[name])
        for point in self._installed().select(name=name):
            return self._imported(point.value)
        names = (*self, f"{PYTHON}module:name")
        raise ArgumentError(f"{self.kind} is '{name}'; allowed: {', '.join(names)}{nearest_name(name, names)}")

    def _installed(self) -> EntryPoints:
        return _entry_points(self.group, *sys.path)

    def _imported(self, location: str) -> Any:
        return import_object(location, what=self.kind)


@cache
def _entry_points(group: str, *_search_path: str) -> EntryPoints:
    """The group's entry points, read once for a search path: to read those of all packages takes milliseconds."""
    return entry_points(group=group)
