"""Parameter grids that are smaller than their product and still hold every pair of values."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def pairwise(first: Iterable[Any], second: Iterable[Any], third: Iterable[Any]) -> list[tuple[Any, Any, Any]]:
    """Combine three parameters so that every pair of values of any two of them occurs.

    Takes all pairs of the first two and cycles through the third: `a·b` combinations instead of `a·b·c`. Neither of the
    first two may have fewer values than the third.
    """
    rows, columns, turns = list(first), list(second), list(third)
    assert len(turns) <= min(len(rows), len(columns))
    return [(a, b, turns[(i + j) % len(turns)]) for i, a in enumerate(rows) for j, b in enumerate(columns)]


def all_but(
    fast: Iterable[str], cases: Mapping[str, Any], mark: pytest.MarkDecorator, *, unpack: bool = False
) -> list[Any]:
    """Parameters from a table's rows; all but the named rows get a mark.

    Args:
        fast: Names of the rows without the mark.
        cases: Values by name.
        mark: The mark for the rows that only `scripts/test --all` runs.
        unpack: Whether a value is a tuple of several parameters.
    """
    fast = set(fast)
    assert fast <= set(cases)
    return [
        pytest.param(*(value if unpack else (value,)), id=name, marks=() if name in fast else mark)
        for name, value in cases.items()
    ]


def few_and_many(few: int, many: int) -> list[Any]:
    """Parameters of a test that loops over seeds: the first few for the fast tests, the others marked `statistical`."""
    return [
        pytest.param(range(few), id="few"),
        pytest.param(range(few, many), id="many", marks=pytest.mark.statistical),
    ]
