"""Block products of features by draw with a matrix of the draws' products between them: H = Φ M Φ'ᵀ, block by block.

H_rr' = Σ_{s in r, t in r'} φ_s M_st φ'_t. M is multiplied to one row set beforehand (`Mixed`), once for all of its
tiles; a tile is then one product of length C·S for all pairs of blocks together and one for pairs of different blocks,
or, with sums by block, one and two.
No models, no randomness.

Axes: n rows, s/t draws, r/R blocks, b draws of a block, c outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.block_sums import BlockSums, Meeting

_NAMES = ("right", "total", "apart")


@dataclass(frozen=True)
class Mixed:
    """One row set, by blocks of draws: Φ itself, Φ M, and Φ times the part of M that pairs different blocks."""

    right: Float[Tensor, "n r c b"]
    total: Float[Tensor, "n r c b"]
    apart: Float[Tensor, "n r c b"]

    @property
    def arrays(self) -> dict[str, Tensor]:
        """As arrays with a leading row axis."""
        return {name: getattr(self, name) for name in _NAMES}

    @staticmethod
    def of(arrays: Mapping[str, Tensor]) -> "Mixed":
        return Mixed(*(arrays[name] for name in _NAMES))


def mixed_by_metric(columns: Float[Tensor, "n c s"], metric: Float64[Tensor, "s s"], num_blocks: int) -> Mixed:
    """A row set with M multiplied to it, 4·S² operations a row and output, in the features' dtype."""

    def by_block(values: Float[Tensor, "n c s"]) -> Float[Tensor, "n r c b"]:
        return values.unflatten(2, (num_blocks, -1)).transpose(1, 2).contiguous()

    block = torch.arange(len(metric), device=metric.device) // (len(metric) // num_blocks)
    apart = metric.masked_fill(block[:, None] == block[None, :], 0.0)
    return Mixed(
        by_block(columns), by_block(columns @ metric.to(columns.dtype)), by_block(columns @ apart.to(columns.dtype))
    )


def add_metric_(sums: BlockSums, rows: Mixed, columns: Mixed, meeting: Meeting) -> None:
    """Add the block products of features with a metric between them, all pairs of blocks."""
    assert sums.between is not None
    within, between = sums.within, sums.between
    meeting.add_outputs_([(within, 1.0)], rows.total, columns.right)
    if sums.by_block is None:
        meeting.add_outputs_([(within, -1.0), (between, 1.0)], rows.apart, columns.right)
        return
    for r, total in enumerate(sums.by_block):
        one = slice(r, r + 1)
        for left, right in ((rows.apart, columns.right), (rows.right, columns.apart)):
            meeting.add_outputs_([(within, -0.5), (between, 0.5), (total, 0.5)], left[:, one], right[:, one])


def metric_products(
    rows: Float[Tensor, "n1 c s"],
    columns: Float[Tensor, "n2 c s"],
    metric: Float64[Tensor, "s s"],
    num_blocks: int,
    meeting: Meeting,
) -> Float64[Tensor, "r r *tile"]:
    """H_rr' of columns by draw for all pairs of blocks, by definition and in float64: for few entries."""
    size = len(metric) // num_blocks
    right = columns.double().unflatten(2, (num_blocks, size))
    products = []
    for r in range(num_blocks):
        block = slice(r * size, (r + 1) * size)
        mixed = (rows[:, :, block].double() @ metric[block]).unflatten(2, (num_blocks, size))
        products.append(torch.stack([meeting.outputs(mixed[:, :, q], right[:, :, q]) for q in range(num_blocks)]))
    return torch.stack(products)
