"""From features of two sets of rows to sums of block products, all that the statistics of a kernel need.

A block product is H_rr'(x, x') = ⟨g_r(x), g_r'(x')⟩, g_r the mean gradient of block r. Two forms:
*factored*, where features are columns and products are plain matrix products, and *layered*, where the gradient of a
layer is an outer product δ ⊗ h̃ that is never formed: ⟨h̃, h̃'⟩⟨δ, δ'⟩ for every pair of draws.
Sketched columns come in independent groups, whose sums are kept apart too. No models, no randomness; standard errors
are made of these sums in `nntk_dist.statistics`.

Axes: n rows, r/R blocks, s/S draws, c outputs, k feature columns of one output, q/Q groups of sketch columns.
Pairings: "blocks" pairs all blocks (nonlocal kernel), "draws" only a draw with itself (averaged, covariance, local).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

# Numbers of the products of one draw with several (16 MiB in float32), of which three are held at a time.
PRODUCT_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Meeting:
    """How two row sets meet: all rows with all (`cross`) or each with its namesake (`paired`), outputs summed or kept.

    Shapes of a product: cross (n1, n2) or, with `full`, (n1·C, n2·C); paired (n,) or (n, C, C).
    """

    full: bool = False
    paired: bool = False

    def outputs(self, a: Float[Tensor, "n1 c k"], b: Float[Tensor, "n2 c k"]) -> Tensor:
        """Products of features that carry outputs."""
        if self.paired:
            return torch.einsum("nck,ndk->ncd", a, b) if self.full else torch.einsum("nck,nck->n", a, b)
        if self.full:
            return a.flatten(0, 1) @ b.flatten(0, 1).T
        return a.flatten(1) @ b.flatten(1).T

    def shared(self, a: Float[Tensor, "n1 k"], b: Float[Tensor, "n2 k"], num_outputs: int) -> Tensor:
        """Products of features that all outputs share, shaped to multiply those of `outputs`."""
        if self.paired:
            product = torch.einsum("nk,nk->n", a, b)
            return product[:, None, None] if self.full else product
        product = a @ b.T
        if self.full:
            return product.repeat_interleave(num_outputs, 0).repeat_interleave(num_outputs, 1)
        return product

    def shape(self, num_rows: int, num_columns: int, num_outputs: int) -> tuple[int, ...]:
        if self.paired:
            return (num_rows, num_outputs, num_outputs) if self.full else (num_rows,)
        width = num_outputs if self.full else 1
        return (num_rows * width, num_columns * width)

    def both(self, a: Bool[Tensor, "n1 *c"], b: Bool[Tensor, "n2 *c"]) -> Bool[Tensor, "*tile"]:
        """Where a row's property and a column's are both true; with `full` each output has its own."""
        if self.paired:
            return a[:, :, None] & b[:, None, :] if self.full else a & b
        return a.flatten()[:, None] & b.flatten()[None, :]

    def same_output(self, values: Float[Tensor, "*lead tile"], num_outputs: int) -> Tensor:
        """Products that are `values` for an output with itself and 0 for two different ones."""
        if not self.full:
            return values * num_outputs
        identity = torch.eye(num_outputs, dtype=values.dtype, device=values.device)
        if self.paired:
            return values[..., None, None] * identity
        return torch.kron(values.contiguous(), identity)


@dataclass
class BlockSums:
    """Sums over blocks of the products of one tile, in float64.

    within = Σ_r H_rr; between = Σ_{r≠r'} H_rr' (pairing "blocks" only); by_block, where asked: T_r = Σ_{r'≠r} h_rr',
    h_rr' = ½(H_rr' + H_r'r) for "blocks", H_rr for "draws"; its leading axis is r. by_group, where features are
    sketched: what each group of sketch columns contributes to `between`, its leading axis is q. resolved: entries of
    whose every part some draw told something; None where all are, or where `by_block` shows it.
    """

    num_blocks: int
    within: Float64[Tensor, "*tile"]
    between: Float64[Tensor, "*tile"] | None
    by_block: Float64[Tensor, "r *tile"] | None
    by_group: Float64[Tensor, "q *tile"] | None = None
    resolved: Bool[Tensor, "*tile"] | None = None

    def add_(self, other: "BlockSums") -> "BlockSums":
        """Add the sums of further outputs or layers, in place."""
        self.within += other.within
        if self.between is not None and other.between is not None:
            self.between += other.between
        if self.by_block is not None and other.by_block is not None:
            self.by_block += other.by_block
        if self.by_group is not None and other.by_group is not None:
            self.by_group += other.by_group
        if self.resolved is not None and other.resolved is not None:
            self.resolved |= other.resolved
        return self


def empty_sums(
    shape: Sequence[int],
    num_blocks: int,
    *,
    pair_blocks: bool,
    by_block: bool,
    device: torch.device,
    num_groups: int = 0,
) -> BlockSums:
    """Sums of nothing; groups are kept apart only together with blocks, for the standard error."""

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=device)

    return BlockSums(
        num_blocks,
        zeros(*shape),
        zeros(*shape) if pair_blocks else None,
        zeros(num_blocks, *shape) if by_block else None,
        zeros(num_groups, *shape) if by_block and num_groups else None,
    )


@dataclass(frozen=True)
class Factored:
    """Columns of one row set, ready to be multiplied: H_rr = together_r·right_rᵀ and Σ_{r'≠r} H_r'r =
    apart_r·right_rᵀ.
    """

    right: Float[Tensor, "n r c k"]
    together: Float[Tensor, "n r c k"]
    apart: Float[Tensor, "n r c k"] | None

    def columns(self, selection: slice) -> "Factored":
        """Some of the columns."""
        apart = None if self.apart is None else self.apart[..., selection]
        return Factored(self.right[..., selection], self.together[..., selection], apart)


def formed_gradients(gradients: Float[Tensor, "n r c k"]) -> Factored:
    """Block-mean gradients themselves as columns: every pair of blocks counts."""
    return Factored(right=gradients, together=gradients, apart=gradients.sum(1, keepdim=True) - gradients)


def formed_products(
    rows: Float[Tensor, "n1 r c k"], columns: Float[Tensor, "n2 r c k"], meeting: Meeting
) -> Float[Tensor, "r r *tile"]:
    """H_rr' of block-mean gradients for all pairs of blocks: for few entries, in one product where rows meet all."""
    num_blocks = rows.shape[1]
    if meeting.paired:
        blocks = range(num_blocks)
        return torch.stack([torch.stack([meeting.outputs(rows[:, r], columns[:, q]) for q in blocks]) for r in blocks])
    product = meeting.outputs(rows.transpose(0, 1).flatten(0, 1), columns.transpose(0, 1).flatten(0, 1))
    return product.unflatten(1, (num_blocks, -1)).unflatten(0, (num_blocks, -1)).transpose(1, 2)


def factored_by_metric(columns: Float[Tensor, "n c s"], metric: Float64[Tensor, "s s"], num_blocks: int) -> Factored:
    """Columns by draw, with the products M_st of the draws: H_rr' = Σ_{s in r, t in r'} φ_s M_st φ'_t."""

    def by_block(values: Float[Tensor, "n c s"]) -> Float[Tensor, "n r c b"]:
        return values.unflatten(2, (num_blocks, -1)).transpose(1, 2)

    block = torch.arange(len(metric), device=metric.device) // (len(metric) // num_blocks)
    same = block[:, None] == block[None, :]
    together = torch.where(same, metric, 0.0).to(columns.dtype)
    apart = torch.where(same, 0.0, metric).to(columns.dtype)
    return Factored(by_block(columns), by_block(columns @ together), by_block(columns @ apart))


def metric_products(
    rows: Float[Tensor, "n1 c s"],
    columns: Float[Tensor, "n2 c s"],
    metric: Float64[Tensor, "s s"],
    num_blocks: int,
    meeting: Meeting,
) -> Tensor:
    """H_rr' of columns by draw for all pairs of blocks, (R, R, *tile): the slow form, for few entries."""
    size = len(metric) // num_blocks
    right = columns.unflatten(2, (num_blocks, size))
    products = []
    for r in range(num_blocks):
        block = slice(r * size, (r + 1) * size)
        mixed = (rows[:, :, block] @ metric[block]).unflatten(2, (num_blocks, size))
        products.append(torch.stack([meeting.outputs(mixed[:, :, q], right[:, :, q]) for q in range(num_blocks)]))
    return torch.stack(products)


def add_factored_(sums: BlockSums, rows: Factored, columns: Factored, meeting: Meeting) -> None:
    """Add the block products of factored features; 3 products of the tile's full inner dimension with standard errors,
    else 2.
    """
    for r in range(rows.right.shape[1]):
        together = meeting.outputs(rows.together[:, r], columns.right[:, r])
        sums.within += together
        if sums.between is None:
            if sums.by_block is not None:
                sums.by_block[r] += together
            continue
        assert rows.apart is not None
        assert columns.apart is not None
        apart = meeting.outputs(rows.apart[:, r], columns.right[:, r])
        if sums.by_block is None:
            sums.between += apart
            continue
        apart = (apart + meeting.outputs(rows.right[:, r], columns.apart[:, r])).mul_(0.5)
        sums.between += apart
        sums.by_block[r] += apart


def add_sketched_(sums: BlockSums, rows: Factored, columns: Factored, meeting: Meeting, num_groups: int) -> None:
    """Add the block products of sketched gradients, group by group where the standard error wants them."""
    if sums.by_group is None or sums.between is None:
        add_factored_(sums, rows, columns, meeting)
        return
    width = rows.right.shape[-1] // num_groups
    for group in range(num_groups):
        own = slice(group * width, (group + 1) * width)
        part = replace(sums, between=torch.zeros_like(sums.between))
        add_factored_(part, rows.columns(own), columns.columns(own), meeting)
        assert part.between is not None
        sums.between += part.between
        sums.by_group[group] += part.between


@dataclass(frozen=True)
class Layered:
    """Outer-product features of one row set: for every layer its inputs h̃ and its output gradients δ, draw by draw."""

    inputs: tuple[Float[Tensor, "n s _"], ...]
    gradients: tuple[Float[Tensor, "n s c _"], ...]

    @property
    def num_draws(self) -> int:
        return self.inputs[0].shape[1]

    @property
    def num_outputs(self) -> int:
        return self.gradients[0].shape[2]


def draw_products(rows: Layered, columns: Layered, s: int, t: int, meeting: Meeting) -> Tensor:
    """⟨g_s(x), g_t(x')⟩ of two draws, summed over the layers."""
    total: Tensor | None = None
    for h, delta, h2, delta2 in zip(rows.inputs, rows.gradients, columns.inputs, columns.gradients, strict=True):
        product = meeting.outputs(delta[:, s], delta2[:, t])
        product *= meeting.shared(h[:, s], h2[:, t], rows.num_outputs)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def add_layered_(
    sums: BlockSums, rows: Layered, columns: Layered, meeting: Meeting, block_of: Callable[[int], int], num_blocks: int
) -> None:
    """Add the block products of layered features, S² (pairing "blocks") or S products of the layers' widths.

    A row set that meets itself takes half of the S²: the other half is the transposed.
    """
    draws_per_block = rows.num_draws // num_blocks
    if sums.between is None:
        for s in range(rows.num_draws):
            product = draw_products(rows, columns, s, s, meeting).div_(draws_per_block)
            sums.within += product
            if sums.by_block is not None:
                sums.by_block[block_of(s)] += product
        return
    mirrored = not meeting.paired and rows.inputs[0] is columns.inputs[0]
    blocks = [block_of(s) for s in range(rows.num_draws)]
    step = max(1, PRODUCT_ELEMENTS // sums.within.numel())
    for start in range(0, rows.num_draws, step):
        stop = min(start + step, rows.num_draws)
        partners = [
            tuple(part[:, start:stop].transpose(0, 1).contiguous() for part in layer)
            for layer in zip(columns.inputs, columns.gradients, strict=True)
        ]
        for s in range(stop if mirrored else rows.num_draws):
            first = max(s, start) if mirrored else start
            products = _products_with(rows, s, [(h[first - start :], d[first - start :]) for h, d in partners], meeting)
            products /= draws_per_block**2
            if mirrored and first == s:
                products[0] *= 0.5
            _add_pairs_(sums, products, blocks[s], blocks[first:stop], mirrored=mirrored)


def _add_pairs_(
    sums: BlockSums, products: Float[Tensor, "t *tile"], block: int, others: Sequence[int], *, mirrored: bool
) -> None:
    """Add the products of one draw with several, whose blocks ascend; `mirrored` adds the transposed too."""
    assert sums.between is not None
    for other in dict.fromkeys(others):
        first = others.index(other)
        total = products[first : first + others.count(other)].sum(0, dtype=torch.float64)
        if mirrored:
            total = total + total.T
        if block == other:
            sums.within += total
            continue
        sums.between += total
        if sums.by_block is not None:
            total *= 0.5
            sums.by_block[block] += total
            sums.by_block[other] += total


def _products_with(
    rows: Layered,
    s: int,
    partners: Sequence[tuple[Float[Tensor, "t n2 _"], Float[Tensor, "t n2 c _"]]],
    meeting: Meeting,
) -> Float[Tensor, "t *tile"]:
    """⟨g_s(x), g_t(x')⟩ of one draw with several: to the rows, partners are so many more columns."""
    count = len(partners[0][0])
    total: Tensor | None = None
    for h, delta, (h2, delta2) in zip(rows.inputs, rows.gradients, partners, strict=True):
        h, delta = h[:, s], delta[:, s]
        if meeting.paired:
            h, delta = h.repeat(count, 1), delta.repeat(count, 1, 1)
        product = meeting.outputs(delta, delta2.flatten(0, 1))
        product *= meeting.shared(h, h2.flatten(0, 1), rows.num_outputs)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total.unflatten(0, (count, -1)) if meeting.paired else total.unflatten(1, (count, -1)).transpose(0, 1)
