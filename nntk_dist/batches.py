"""Rows in padded batches: so the rounding of a row's result depends on its place in its batch and on nothing else.

Axes: n examples.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nntk_dist.features import FeatureMap, concatenate_rows, slice_rows


def in_batches(x: Tensor, batch: int) -> Iterator[tuple[Tensor, int]]:
    """Batches of exactly `batch` rows and how many of them count: the last is padded with its last row.

    So the rounding of a row's result depends on its place in its batch and on nothing else.
    """
    for start in range(0, len(x), batch):
        rows = x[start : start + batch]
        missing = batch - len(rows)
        padded = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        yield padded, len(rows)


def compute_rows(
    features: FeatureMap, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int
) -> dict[str, Tensor]:
    """Features of any number of rows, in padded batches."""
    parts = []
    for (rows, count), (names, _) in zip(in_batches(x, batch), in_batches(ids, batch), strict=True):
        parts.append(slice_rows(features.compute(rows, names, draws, columns), slice(count)))
    return concatenate_rows(parts)


def compute_outputs(features: FeatureMap, x: Tensor, *, batch: int) -> Tensor:
    """f(x; θ) of any number of rows, in padded batches."""
    return torch.cat([features.outputs(rows)[:count] for rows, count in in_batches(x, batch)])
