"""Parameter grids that are smaller than their product and still hold every pair of values."""

from collections.abc import Iterable
from typing import Any


def pairwise(first: Iterable[Any], second: Iterable[Any], third: Iterable[Any]) -> list[tuple[Any, Any, Any]]:
    """Combine three parameters so that every pair of values of any two of them occurs.

    All pairs of the first two are taken, the third in rotation: `a·b` combinations in place of `a·b·c`. Neither of the
    first two may have fewer values than the third.
    """
    rows, columns, turns = list(first), list(second), list(third)
    assert len(turns) <= min(len(rows), len(columns))
    return [(a, b, turns[(i + j) % len(turns)]) for i, a in enumerate(rows) for j, b in enumerate(columns)]
