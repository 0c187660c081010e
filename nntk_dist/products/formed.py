"""Block products of gradients that are formed: features are columns, and sums are made of plain matrix products.

Blocks are combined before rows meet columns, so that a tile takes one product of the features' whole length:
`contrasts`  ĝ = Q g over the blocks, Q orthogonal, its first row 1/√R: Σ_rr' H_rr' = R⟨ĝ_0, ĝ'_0⟩ and
             Σ_r H_rr = Σ_w ⟨ĝ_w, ĝ'_w⟩; what the blocks agree in is in ĝ_0 alone, and nothing of it cancels;
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
from nntk_dist.products.weighted_products import Term

# Numbers of a portion of features that is taken to float64 for products of all pairs of blocks (32 MiB).
_PORTION_ELEMENTS = 1 << 22


def combined(gradients: Float[Tensor, "n r c k"], wanted: Wanted) -> Float[Tensor, "n w c k"]:
    """The combinations of block means that `formed_terms` takes: R contrasts, or G and R halves where sums by block are
    wanted.
    """
    blocks = gradients.shape[1]
    if wanted.stderr:
        result = gradients.new_empty(len(gradients), 1 + blocks, *gradients.shape[2:])
        total = result[:, :1].copy_(gradients.sum(1, keepdim=True))
        torch.sub(gradients, total, alpha=0.5, out=result[:, 1:])
        return result
    mixing = _contrasts(blocks).to(gradients)
    return (mixing @ gradients.flatten(2)).reshape(gradients.shape)


def _contrasts(blocks: int) -> Float64[Tensor, "w r"]:
    """Helmert's orthogonal matrix: 1/√R, then each block against the mean of those before it."""
    rows = torch.arange(blocks, dtype=torch.float64)
    matrix = torch.ones(blocks, blocks, dtype=torch.float64).tril(-1)
    matrix -= torch.diag(rows)
    matrix /= (rows * (rows + 1)).sqrt().clamp(min=1.0)[:, None]
    matrix[0] = 1.0 / math.sqrt(blocks)
    return matrix


def formed_terms(
    rows: Float[Tensor, "n1 w c k"], columns: Float[Tensor, "n2 w c k"], num_blocks: int, wanted: Wanted
) -> list[Term]:
    """The products of `combined` features, for all pairs of blocks.

    Float32 products of up to `INNER_TERMS` terms, summed in float64: what cancels between them, the more the larger
    `within` is against `between`, is known to the rounding of `within`.
    """
    if not wanted.stderr:
        return [
            Term(rows[:, :1], columns[:, :1], {WITHIN: 1.0, BETWEEN: num_blocks - 1.0}),
            Term(rows[:, 1:], columns[:, 1:], {WITHIN: 1.0, BETWEEN: -1.0}),
        ]
    quarters = 0.25 * num_blocks
    everywhere = {WITHIN: 1.0 - quarters, BETWEEN: quarters} | {block(r): 0.25 for r in range(num_blocks)}
    halves = [
        Term(rows[:, r + 1 : r + 2], columns[:, r + 1 : r + 2], {WITHIN: 1.0, BETWEEN: -1.0, block(r): -1.0})
        for r in range(num_blocks)
    ]
    return [Term(rows[:, :1], columns[:, :1], everywhere), *halves]


def terms_of_columns(
    rows: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    names: Sequence[str],
    num_blocks: int,
    wanted: Wanted,
    *,
    pair_blocks: bool,
) -> list[Term]:
    """The products of those of these prepared features that there are, and of sketches."""
    terms = []
    for name in names:
        if name in rows and pair_blocks:
            terms += formed_terms(rows[name], columns[name], num_blocks, wanted)
        elif name in rows:
            terms += alone_terms(rows[name], columns[name], wanted)
    if "sketch_columns" in rows:
        terms += sketched_terms(rows, columns, num_blocks, wanted)
    return terms


def prepared_sketch(
    sketch: Float[Tensor, "n r c k"], num_groups: int, wanted: Wanted
) -> dict[str, Float[Tensor, "n ..."]]:
    """What `sketched_terms` takes: the combinations, and with sums by block the contrasts again, group by group."""
    prepared = {"sketch_columns": combined(sketch, wanted)}
    if wanted.stderr:
        contrasts = combined(sketch, Wanted(stderr=False)).unflatten(3, (num_groups, -1))
        prepared["sketch_groups"] = contrasts.permute(0, 3, 1, 2, 4).contiguous()
    return prepared


def sketched_terms(
    rows: Mapping[str, Tensor], columns: Mapping[str, Tensor], num_blocks: int, wanted: Wanted
) -> list[Term]:
    """The products of sketches; where the standard error wants them, those of every group once more, in one further
    product of the whole length: R·Q products of blocks and groups would be too short to be fast.
    """
    terms = formed_terms(rows["sketch_columns"], columns["sketch_columns"], num_blocks, wanted)
    if not wanted.stderr:
        return terms
    left, right = rows["sketch_groups"], columns["sketch_groups"]
    weights = torch.full((num_blocks, 1, 1), -1.0, dtype=left.dtype, device=left.device)
    weights[0] += num_blocks
    return [*terms, *(Term(left[:, q], right[:, q], {group(q): 1.0}, weights) for q in range(left.shape[1]))]


def alone_terms(rows: Float[Tensor, "n1 r c k"], columns: Float[Tensor, "n2 r c k"], wanted: Wanted) -> list[Term]:
    """The products of every block with itself, for kernels that pair no blocks; one in all without sums by block."""
    if not wanted.stderr:
        return [Term(rows, columns, {WITHIN: 1.0})]
    return [Term(rows[:, r : r + 1], columns[:, r : r + 1], {WITHIN: 1.0, block(r): 1.0}) for r in range(rows.shape[1])]


def formed_products(
    rows: Float[Tensor, "n1 r c k"], columns: Float[Tensor, "n2 r c k"], meeting: Meeting
) -> Float64[Tensor, "r r *tile"]:
    """H_rr' of block-mean gradients for all pairs of blocks, by definition and in float64: for few entries.

    A portion of the columns at a time: no features are copied to float64 as a whole.
    """
    total: Tensor | None = None
    step = max(1, _PORTION_ELEMENTS // (rows[..., 0].numel() + columns[..., 0].numel()))
    for left, right in zip(rows.split(step, -1), columns.split(step, -1), strict=True):
        product = _all_pairs(left.double(), right.double(), meeting)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _all_pairs(rows: Tensor, columns: Tensor, meeting: Meeting) -> Tensor:
    """H_rr' of a portion, in one product where rows meet all."""
    num_blocks = rows.shape[1]
    if meeting.paired:
        blocks = range(num_blocks)
        return torch.stack([torch.stack([meeting.outputs(rows[:, r], columns[:, q]) for q in blocks]) for r in blocks])
    product = meeting.outputs(rows.transpose(0, 1).flatten(0, 1), columns.transpose(0, 1).flatten(0, 1))
    return product.unflatten(1, (num_blocks, -1)).unflatten(0, (num_blocks, -1)).transpose(1, 2)


def alone_products(
    rows: Float[Tensor, "n1 r c k"], columns: Float[Tensor, "n2 r c k"], meeting: Meeting
) -> Float64[Tensor, "r *tile"]:
    """H_rr of every block with itself, in float64: for few entries."""
    blocks = range(rows.shape[1])
    return torch.stack([meeting.outputs(rows[:, r].double(), columns[:, r].double()) for r in blocks])
