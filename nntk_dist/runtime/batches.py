"""Rows in padded batches, so that the rounding of a row's result depends only on its place in its batch.

Axes: n examples.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def in_batches(x: Tensor, batch: int | None) -> Iterator[tuple[Tensor, slice]]:
    """Yield batches of exactly `batch` rows, and which rows of x they are; copies of the last row pad the last batch.

    Args:
        x: rows.
        batch: rows of a batch; None for one batch of all rows.
    """
    batch = batch or len(x)
    for start in range(0, len(x), batch):
        rows = x[start : start + batch]
        missing = batch - len(rows)
        padded = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        yield padded, slice(start, start + len(rows))


def by_batches(function: Callable[[Tensor], Tensor], x: Tensor, batch: int | None) -> Tensor:
    """Return a function's values, a row for each example, computed batch by batch.

    Args:
        function: from a batch to a row for each of its examples.
        x: the examples.
        batch: examples of a batch; None for one batch of all examples.
    """
    parts = [function(rows)[: own.stop - own.start] for rows, own in in_batches(x, batch)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
