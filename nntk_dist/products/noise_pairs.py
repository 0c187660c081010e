"""Block products of gradients D_c η ⊗ q over all pairs of draws, without forming a gradient.

⟨g_s(x), g_t(x')⟩ = D_s·D'_t Σ_layers Σ_kl ⟨q_k, q'_l⟩⟨η_k, η'_l⟩. The outputs enter through one number a draw, so a
pair of draws costs two Gram matrices a layer for any number of outputs. Many pairs share a matrix product. No models,
no randomness.

Axes: n/m rows and columns, s/t their draws, r/q their blocks, k/l basis vectors, c/d outputs, i numbers of a vector.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.products.block_sums import BlockSums, Meeting

# Numbers of one chunk of pairs of draws (64 MiB in float32); three or four chunks are held at a time.
CHUNK_NUMBERS = 1 << 24


@dataclass(frozen=True)
class NoiseFeatures:
    """One row set.

    Attributes:
        differences: D = Δ/σ by draw and output.
        directions: For each layer its basis vectors q.
        noise: For each layer the normals η of its basis vectors.
    """

    differences: Float[Tensor, "n s c"]
    directions: tuple[Float[Tensor, "n s k _"], ...]
    noise: tuple[Float[Tensor, "n s k _"], ...]

    @property
    def num_draws(self) -> int:
        """S, the number of draws."""
        return self.differences.shape[1]


def add_pairs_(sums: BlockSums, rows: NoiseFeatures, columns: NoiseFeatures, meeting: Meeting) -> None:
    """Add the products of all pairs of blocks; an entry takes S² products of the layers' widths."""
    for left, right, products in _chunks(rows, columns, meeting, sums.num_blocks):
        shift = left.start - right.start  # pairs of one block lie on this diagonal
        row, column = (torch.arange(len(blocks), device=products.device) for blocks in (left, right))
        same = row[:, None] + shift == column
        apart = products.masked_fill(same.reshape(*same.shape, *[1] * (products.ndim - 2)), 0.0)
        if -len(left) < shift < len(right):
            sums.within += products.diagonal(shift, 0, 1).sum(-1)
        assert sums.between is not None
        sums.between += apart.sum((0, 1))
        if sums.by_block is not None:
            sums.by_block[left.start : left.stop] += 0.5 * apart.sum(1)
            sums.by_block[right.start : right.stop] += 0.5 * apart.sum(0)


def pair_block_products(
    rows: NoiseFeatures, columns: NoiseFeatures, meeting: Meeting, num_blocks: int
) -> Float64[Tensor, "r q *tile"]:
    """Return H_rq for all pairs of blocks, (R, R, *tile), in float64: for few entries."""
    shape = meeting.shape(len(rows.differences), len(columns.differences), rows.differences.shape[2])
    result = torch.zeros(num_blocks, num_blocks, *shape, dtype=torch.float64, device=rows.differences.device)
    for left, right, products in _chunks(rows, columns, meeting, num_blocks):
        result[left.start : left.stop, right.start : right.stop] += products
    return result


def _chunks(
    rows: NoiseFeatures, columns: NoiseFeatures, meeting: Meeting, num_blocks: int
) -> Iterator[tuple[range, range, Float64[Tensor, "r q *tile"]]]:
    """Yield (blocks of rows, blocks of columns, their products or a part of them), a chunk of pairs at a time."""
    size = rows.num_draws // num_blocks
    entries = len(rows.differences) * (1 if meeting.paired else len(columns.differences))
    rank = max((part.shape[2] for part in rows.directions), default=1)
    steps = _steps(rows.num_draws, size, CHUNK_NUMBERS // (entries * rank**2))
    for first in steps:
        left = _draws(rows, first)
        for second in steps:
            products = _products(left, _draws(columns, second), meeting, min(size, len(first)), min(size, len(second)))
            yield _blocks(first, size), _blocks(second, size), products.div_(size**2)


def _steps(num_draws: int, size: int, pairs: int) -> Sequence[range]:
    """Return consecutive draws, about √pairs at a time: whole blocks, or equal parts of one."""
    side = max(1, math.isqrt(pairs))
    step = side // size * size if side >= size else max(d for d in range(1, side + 1) if size % d == 0)
    return [range(start, min(start + step, num_draws)) for start in range(0, num_draws, step)]


def _blocks(draws: range, size: int) -> range:
    return range(draws.start // size, (draws.stop - 1) // size + 1)


def _draws(features: NoiseFeatures, draws: range) -> NoiseFeatures:
    chosen = slice(draws.start, draws.stop)
    return NoiseFeatures(
        features.differences[:, chosen],
        tuple(part[:, chosen] for part in features.directions),
        tuple(part[:, chosen] for part in features.noise),
    )


def _products(
    rows: NoiseFeatures, columns: NoiseFeatures, meeting: Meeting, size: int, other_size: int
) -> Float64[Tensor, "r q *tile"]:
    """Σ_s Σ_t of the products, s and t summed over `size` and `other_size` draws at a time."""
    shared: Tensor | None = None
    for parts in zip(rows.directions, columns.directions, rows.noise, columns.noise, strict=True):
        layer = _layer(*parts, paired=meeting.paired)
        shared = layer if shared is None else shared.add_(layer)
    assert shared is not None
    left, right = rows.differences.unflatten(1, (-1, size)), columns.differences.unflatten(1, (-1, other_size))
    if meeting.full:
        left, right = left.double(), right.double()
        if meeting.paired:
            blocks = shared.unflatten(2, right.shape[1:3]).unflatten(1, left.shape[1:3]).double()
            return torch.einsum("nrsc,nrsqt,nqtd->rqncd", left, blocks, right)
        blocks = shared.unflatten(3, right.shape[1:3]).unflatten(1, left.shape[1:3]).double()
        half = torch.einsum("nrsc,nrsmqt->ncrmqt", left, blocks)
        return torch.einsum("ncrmqt,mqtd->rqncmd", half, right).flatten(4).flatten(2, 3)
    outputs = _gram(rows.differences, columns.differences, paired=meeting.paired)
    if meeting.paired:
        product = outputs.mul_(shared).unflatten(2, right.shape[1:3]).unflatten(1, left.shape[1:3])
        return product.sum((2, 4), dtype=torch.float64).permute(1, 2, 0)
    product = outputs.mul_(shared).unflatten(3, right.shape[1:3]).unflatten(1, left.shape[1:3])
    return product.sum((2, 5), dtype=torch.float64).permute(1, 3, 0, 2)


def _layer(q: Tensor, q2: Tensor, noise: Tensor, noise2: Tensor, *, paired: bool) -> Tensor:
    """Σ_kl ⟨q_k, q'_l⟩⟨η_k, η'_l⟩, (n, s, m, t), or paired (n, s, t)."""
    if q.shape[2] == 1:
        return _gram(q[:, :, 0], q2[:, :, 0], paired=paired).mul_(_gram(noise[:, :, 0], noise2[:, :, 0], paired=paired))
    rank, shape = q.shape[2], q.shape[:2]
    product = _gram(q.flatten(1, 2), q2.flatten(1, 2), paired=paired)
    product *= _gram(noise.flatten(1, 2), noise2.flatten(1, 2), paired=paired)
    if paired:
        return product.unflatten(2, (-1, rank)).unflatten(1, (shape[1], rank)).sum((2, 4))
    return product.unflatten(3, (-1, rank)).unflatten(1, (shape[1], rank)).sum((2, 5))


def _gram(a: Float[Tensor, "n s i"], b: Float[Tensor, "m t i"], *, paired: bool) -> Tensor:
    """Inner products of all vectors, (n, s, m, t), or paired (n, s, t)."""
    if paired:
        return torch.bmm(a, b.mT)
    return (a.flatten(0, 1) @ b.flatten(0, 1).T).unflatten(1, b.shape[:2]).unflatten(0, a.shape[:2])
