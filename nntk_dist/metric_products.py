"""Block products of features by draw with a matrix of the draws' products between them: H = Φ M Φ'ᵀ, block by block.

H_rr' = Σ_{s in r, t in r'} φ_s M_st φ'_t. M is multiplied to the columns of tiles (`mixed_by_metric`), once for all
tiles that a row set is the columns of; a tile is then one product of length C·S for all pairs of blocks together and
one for pairs of different blocks. Sums by block take one and two, and rows that M was multiplied to as well.
No models, no randomness.

Axes: n rows, s/t draws, r/R blocks, b draws of a block, c outputs.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.block_sums import BlockSums, Meeting

# Prepared features, (n, R, C, S/R): Φ by blocks of draws, Φ M, and Φ times the part of M that pairs different blocks.
PLAIN, TOTAL, APART = "plain", "total", "apart"


def mixed_by_metric(
    features: Mapping[str, Float[Tensor, "n r c b"]], metric: Float64[Tensor, "s s"], *, by_block: bool, only_rows: bool
) -> dict[str, Float[Tensor, "n r c b"]]:
    """A row set, at least its `PLAIN` features, and what `add_metric_` needs of it besides: as columns 4·S² operations
    a row and output, as rows none, with sums by block half of that. In the features' dtype.
    """
    mixed = dict(features)
    plain = mixed[PLAIN]
    if (APART not in mixed) and (by_block or not only_rows):
        block = torch.arange(len(metric), device=metric.device) // plain.shape[3]
        mixed[APART] = _times(plain, metric.masked_fill(block[:, None] == block[None, :], 0.0))
    if (TOTAL not in mixed) and not only_rows:
        mixed[TOTAL] = _times(plain, metric)
    return mixed


def by_blocks(features: Float[Tensor, "n c s"], num_blocks: int) -> Float[Tensor, "n r c b"]:
    """Features of draws by their blocks."""
    return features.unflatten(2, (num_blocks, -1)).transpose(1, 2).contiguous()


def _times(features: Float[Tensor, "n r c b"], matrix: Float64[Tensor, "s s"]) -> Float[Tensor, "n r c b"]:
    return by_blocks(features.transpose(1, 2).flatten(2) @ matrix.to(features.dtype), features.shape[1])


def add_metric_(
    sums: BlockSums,
    rows: Mapping[str, Float[Tensor, "n1 r c b"]],
    columns: Mapping[str, Float[Tensor, "n2 r c b"]],
    meeting: Meeting,
) -> None:
    """Add the block products of mixed features, all pairs of blocks."""
    assert sums.between is not None
    within, between = sums.within, sums.between
    meeting.add_outputs_([(within, 1.0)], rows[PLAIN], columns[TOTAL])
    if sums.by_block is None:
        meeting.add_outputs_([(within, -1.0), (between, 1.0)], rows[PLAIN], columns[APART])
        return
    for r, total in enumerate(sums.by_block):
        one = slice(r, r + 1)
        for left, right in ((APART, PLAIN), (PLAIN, APART)):
            parts = rows[left][:, one], columns[right][:, one]
            meeting.add_outputs_([(within, -0.5), (between, 0.5), (total, 0.5)], *parts)


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
