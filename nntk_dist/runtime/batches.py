"""Rows in padded batches: so the rounding of a row's result depends on its place in its batch and on nothing else.

Axes: n examples.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def in_batches(x: Tensor, batch: int | None) -> Iterator[tuple[Tensor, slice]]:
    """Batches of exactly `batch` rows and which rows of x they are: the last is padded with its last row.

    So the rounding of a row's result depends on its place in its batch and on nothing else. None takes all rows at
    once.
    """
    batch = batch or len(x)
    for start in range(0, len(x), batch):
        rows = x[start : start + batch]
        missing = batch - len(rows)
        padded = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        yield padded, slice(start, start + len(rows))


def by_batches(function: Callable[[Tensor], Tensor], x: Tensor, batch: int | None) -> Tensor:
    """A function's values, a row for each example, of any number of examples."""
    parts = [function(rows)[: own.stop - own.start] for rows, own in in_batches(x, batch)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
