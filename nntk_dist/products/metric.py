"""Block products of features by draw with a matrix M between them: H = Φ M Φ'ᵀ, block by block.

H_rr' = Σ_{s in r, t in r'} φ_s M_st φ'_t. M is multiplied to the columns of tiles (`mixed_by_metric`), once for all
tiles of those columns. A tile is then one product of length C·S for all pairs of blocks, and one for pairs of different
blocks. Sums by block take one and two, and rows that M was multiplied to as well. No models, no randomness.

Axes: n rows, s/t draws, r/R blocks, b draws of a block, c outputs.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.products.block_sums import BETWEEN, WITHIN, Meeting, block
from nntk_dist.products.wanted import Side, Wanted
from nntk_dist.products.weighted_products import WeightedProduct

# Prepared features, (n, R, C, S/R): Φ by blocks of draws, Φ M, and Φ times the part of M that pairs different blocks.
PLAIN, TOTAL, APART = "plain", "total", "apart"


def mixed_by_metric(
    features: Mapping[str, Float[Tensor, "n r c b"]], metric: Float64[Tensor, "s s"], wanted: Wanted
) -> dict[str, Float[Tensor, "n r c b"]]:
    """Multiply M to a row set as far as `metric_weighted_products` needs it.

    Args:
        features: A row set, at least its `PLAIN` features.
        metric: M.
        wanted: Columns take 4·S² operations a row and output; rows take none, or half of that with standard errors.

    Returns:
        The features with what was missing, in their dtype.
    """
    mixed = dict(features)
    plain = mixed[PLAIN]
    if (APART not in mixed) and (wanted.stderr or Side.COLUMNS in wanted.side):
        blocks = torch.arange(len(metric), device=metric.device) // plain.shape[3]
        mixed[APART] = _times(plain, metric.masked_fill(blocks[:, None] == blocks[None, :], 0.0))
    if (TOTAL not in mixed) and Side.COLUMNS in wanted.side:
        mixed[TOTAL] = _times(plain, metric)
    return mixed


def by_blocks(features: Float[Tensor, "n c s"], num_blocks: int) -> Float[Tensor, "n r c b"]:
    """Return features of draws by their blocks."""
    return features.unflatten(2, (num_blocks, -1)).transpose(1, 2).contiguous()


def _times(features: Float[Tensor, "n r c b"], matrix: Float64[Tensor, "s s"]) -> Float[Tensor, "n r c b"]:
    return by_blocks(features.transpose(1, 2).flatten(2) @ matrix.to(features.dtype), features.shape[1])


def metric_weighted_products(
    rows: Mapping[str, Float[Tensor, "n1 r c b"]],
    columns: Mapping[str, Float[Tensor, "n2 r c b"]],
    wanted: Wanted,
) -> list[WeightedProduct]:
    """Return the products of mixed features, for all pairs of blocks."""
    products = [WeightedProduct(rows[PLAIN], columns[TOTAL], {WITHIN: 1.0})]
    if not wanted.stderr:
        return [*products, WeightedProduct(rows[PLAIN], columns[APART], {WITHIN: -1.0, BETWEEN: 1.0})]
    for r in range(rows[PLAIN].shape[1]):
        for left, right in ((APART, PLAIN), (PLAIN, APART)):
            parts = rows[left][:, r : r + 1], columns[right][:, r : r + 1]
            products.append(WeightedProduct(*parts, {WITHIN: -0.5, BETWEEN: 0.5, block(r): 0.5}))
    return products


def metric_block_products(
    rows: Float[Tensor, "n1 c s"],
    columns: Float[Tensor, "n2 c s"],
    metric: Float64[Tensor, "s s"],
    num_blocks: int,
    meeting: Meeting,
) -> Float64[Tensor, "r r *tile"]:
    """Return H_rr' for all pairs of blocks, (R, R, *tile), by definition and in float64: for few entries."""
    size = len(metric) // num_blocks
    right = columns.double().unflatten(2, (num_blocks, size))
    products = []
    for r in range(num_blocks):
        block = slice(r * size, (r + 1) * size)
        mixed = (rows[:, :, block].double() @ metric[block]).unflatten(2, (num_blocks, size))
        products.append(torch.stack([meeting.outputs(mixed[:, :, q], right[:, :, q]) for q in range(num_blocks)]))
    return torch.stack(products)
