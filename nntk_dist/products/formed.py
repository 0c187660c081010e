"""Block products of gradients that are formed: features are columns, and sums are plain matrix products.

Blocks are combined before rows meet columns, so that a tile takes one product of the features' whole length:
`contrasts`  ĝ = Q g over the blocks, Q orthogonal, its first row 1/√R: Σ_rr' H_rr' = R⟨ĝ_0, ĝ'_0⟩ and
             Σ_r H_rr = Σ_w ⟨ĝ_w, ĝ'_w⟩. What the blocks agree in is in ĝ_0 alone, and nothing of it cancels.
`halves`     with sums by block: G = Σ_r g_r and c_r = g_r − G/2: T_r = ¼⟨G, G'⟩ − ⟨c_r, c'_r⟩, 1 + 1/R products.
Combinations belong to one row set and are made once for all tiles. No models, no randomness.

Axes: n rows, r/R blocks, w combinations of blocks, c outputs, k feature columns of one output, q groups of columns.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.products.block_sums import BETWEEN, WITHIN, Meeting, block, group
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import WeightedProduct

# Numbers of features that are copied to float64 at a time for products of all pairs of blocks (32 MiB).
_PORTION_NUMBERS = 1 << 22


def combined(gradients: Float[Tensor, "n r c k"], wanted: Wanted) -> Float[Tensor, "n w c k"]:
    """Combine block means as `formed_weighted_products` takes them.

    Returns:
        R contrasts; or, with standard errors, G and R halves.
    """
    blocks = gradients.shape[1]
    if wanted.stderr:
        result = gradients.new_empty(len(gradients), 1 + blocks, *gradients.shape[2:])
        total = result[:, :1].copy_(gradients.sum(1, keepdim=True))
        torch.sub(gradients, total, alpha=0.5, out=result[:, 1:])
        return result
    mixing = _contrasts(blocks).to(gradients)
    return (mixing @ gradients.flatten(2)).reshape(gradients.shape)


def products_per_block(num_blocks: int, wanted: Wanted) -> float:
    """Return the products of a tile over R, each as long as the features of one block."""
    return 1.0 + 1.0 / num_blocks if wanted.stderr else 1.0


def _contrasts(blocks: int) -> Float64[Tensor, "w r"]:
    """Return Helmert's orthogonal matrix: 1/√R, then each block against the mean of the blocks before it."""
    rows = torch.arange(blocks, dtype=torch.float64)
    matrix = torch.ones(blocks, blocks, dtype=torch.float64).tril(-1)
    matrix -= torch.diag(rows)
    matrix /= (rows * (rows + 1)).sqrt().clamp(min=1.0)[:, None]
    matrix[0] = 1.0 / math.sqrt(blocks)
    return matrix


def formed_weighted_products(
    rows: Float[Tensor, "n1 w c k"], columns: Float[Tensor, "n2 w c k"], num_blocks: int, wanted: Wanted
) -> list[WeightedProduct]:
    """Return the products of `combined` features, for all pairs of blocks.

    In float32, products of up to `INNER_TERMS` terms are summed in float64. What cancels between them is known to the
    rounding of `within`, so the relative error grows with `within` over `between`.
    """
    if not wanted.stderr:
        return [
            WeightedProduct(rows[:, :1], columns[:, :1], {WITHIN: 1.0, BETWEEN: num_blocks - 1.0}),
            WeightedProduct(rows[:, 1:], columns[:, 1:], {WITHIN: 1.0, BETWEEN: -1.0}),
        ]
    quarters = 0.25 * num_blocks
    everywhere = {WITHIN: 1.0 - quarters, BETWEEN: quarters} | {block(r): 0.25 for r in range(num_blocks)}
    halves = [
        WeightedProduct(rows[:, r + 1 : r + 2], columns[:, r + 1 : r + 2], {WITHIN: 1.0, BETWEEN: -1.0, block(r): -1.0})
        for r in range(num_blocks)
    ]
    return [WeightedProduct(rows[:, :1], columns[:, :1], everywhere), *halves]


def column_weighted_products(
    rows: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    names: Sequence[str],
    num_blocks: int,
    wanted: Wanted,
    *,
    pair_blocks: bool,
) -> list[WeightedProduct]:
    """Return the products of the named prepared features, as far as they exist, and of sketches."""
    products = []
    for name in names:
        if name in rows and pair_blocks:
            products += formed_weighted_products(rows[name], columns[name], num_blocks, wanted)
        elif name in rows:
            products += alone_weighted_products(rows[name], columns[name], wanted)
    if "sketch_columns" in rows:
        products += sketched_weighted_products(rows, columns, num_blocks, wanted)
    return products


def prepared_sketch(
    sketch: Float[Tensor, "n r c k"], num_groups: int, wanted: Wanted
) -> dict[str, Float[Tensor, "n ..."]]:
    """Combine sketches as `sketched_weighted_products` takes them.

    With standard errors, the contrasts are kept once more, group by group.
    """
    prepared = {"sketch_columns": combined(sketch, wanted)}
    if wanted.stderr:
        contrasts = combined(sketch, Wanted(stderr=False)).unflatten(3, (num_groups, -1))
        prepared["sketch_groups"] = contrasts.permute(0, 3, 1, 2, 4).contiguous()
    return prepared


def sketched_weighted_products(
    rows: Mapping[str, Tensor], columns: Mapping[str, Tensor], num_blocks: int, wanted: Wanted
) -> list[WeightedProduct]:
    """Return the products of sketches.

    With standard errors, the products of every group are made once more, in one further product of the whole length:
    R·Q products of blocks and groups would be too short to be fast.
    """
    products = formed_weighted_products(rows["sketch_columns"], columns["sketch_columns"], num_blocks, wanted)
    if not wanted.stderr:
        return products
    left, right = rows["sketch_groups"], columns["sketch_groups"]
    weights = torch.full((num_blocks, 1, 1), -1.0, dtype=left.dtype, device=left.device)
    weights[0] += num_blocks
    return [
        *products,
        *(WeightedProduct(left[:, q], right[:, q], {group(q): 1.0}, weights) for q in range(left.shape[1])),
    ]


def alone_weighted_products(
    rows: Float[Tensor, "n1 r c k"], columns: Float[Tensor, "n2 r c k"], wanted: Wanted
) -> list[WeightedProduct]:
    """Return the products of every block with itself, for kernels that pair no blocks.

    Without standard errors they are one product.
    """
    if not wanted.stderr:
        return [WeightedProduct(rows, columns, {WITHIN: 1.0})]
    return [
        WeightedProduct(rows[:, r : r + 1], columns[:, r : r + 1], {WITHIN: 1.0, block(r): 1.0})
        for r in range(rows.shape[1])
    ]


def formed_block_products(
    rows: Float[Tensor, "n1 r c k"], columns: Float[Tensor, "n2 r c k"], meeting: Meeting
) -> Float64[Tensor, "r r *tile"]:
    """Return H_rr' of block-mean gradients for all pairs of blocks, (R, R, *tile), by definition and in float64.

    For few entries. The columns are copied to float64 a portion at a time, never as a whole.
    """
    total: Tensor | None = None
    step = max(1, _PORTION_NUMBERS // (rows[..., 0].numel() + columns[..., 0].numel()))
    for left, right in zip(rows.split(step, -1), columns.split(step, -1), strict=True):
        product = _all_pairs(left.double(), right.double(), meeting)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _all_pairs(rows: Tensor, columns: Tensor, meeting: Meeting) -> Tensor:
    """Return H_rr' of a portion, in one product if rows meet all columns."""
    num_blocks = rows.shape[1]
    if meeting.paired:
        blocks = range(num_blocks)
        return torch.stack([torch.stack([meeting.outputs(rows[:, r], columns[:, q]) for q in blocks]) for r in blocks])
    product = meeting.outputs(rows.transpose(0, 1).flatten(0, 1), columns.transpose(0, 1).flatten(0, 1))
    return product.unflatten(1, (num_blocks, -1)).unflatten(0, (num_blocks, -1)).transpose(1, 2)


def alone_block_products(
    rows: Float[Tensor, "n1 r c k"], columns: Float[Tensor, "n2 r c k"], meeting: Meeting
) -> Float64[Tensor, "r *tile"]:
    """Return H_rr of every block with itself, (R, *tile), in float64: for few entries."""
    blocks = range(rows.shape[1])
    return torch.stack([meeting.outputs(rows[:, r].double(), columns[:, r].double()) for r in blocks])
