"""From features of two sets of rows to sums of block products, all that the statistics of a kernel need.

A block product is H_rr'(x, x') = ⟨g_r(x), g_r'(x')⟩, g_r the mean gradient of block r. Two forms:
*factored*, where features are columns and products are plain matrix products, and *layered*, where the gradient of a
layer is an outer product δ ⊗ h̃ that is never formed: ⟨h̃, h̃'⟩⟨δ, δ'⟩ for every pair of draws.
No models, no randomness; standard errors are made of these sums in `nntk_dist.statistics`.

Axes: n rows, r/R blocks, s/S draws, c outputs, k feature columns of one output.
Pairings: "blocks" pairs all blocks (nonlocal kernel), "draws" only a draw with itself (averaged, covariance, local).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


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


@dataclass
class BlockSums:
    """Sums over blocks of the products of one tile, in float64.

    within = Σ_r H_rr; between = Σ_{r≠r'} H_rr' (pairing "blocks" only); by_block, where asked: T_r = Σ_{r'≠r} h_rr',
    h_rr' = ½(H_rr' + H_r'r) for "blocks", H_rr for "draws"; its leading axis is r.
    """

    num_blocks: int
    within: Float64[Tensor, "*tile"]
    between: Float64[Tensor, "*tile"] | None
    by_block: Float64[Tensor, "r *tile"] | None

    def add_(self, other: "BlockSums") -> "BlockSums":
        """Add the sums of further outputs or layers, in place."""
        self.within += other.within
        if self.between is not None and other.between is not None:
            self.between += other.between
        if self.by_block is not None and other.by_block is not None:
            self.by_block += other.by_block
        return self


def empty_sums(
    shape: Sequence[int], num_blocks: int, *, pair_blocks: bool, by_block: bool, device: torch.device
) -> BlockSums:
    """Sums of nothing."""

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=device)

    return BlockSums(
        num_blocks,
        zeros(*shape),
        zeros(*shape) if pair_blocks else None,
        zeros(num_blocks, *shape) if by_block else None,
    )


@dataclass(frozen=True)
class Factored:
    """Columns of one row set, ready to be multiplied: H_rr = together_r·right_rᵀ and Σ_{r'≠r} H_r'r =
    apart_r·right_rᵀ.
    """

    right: Float[Tensor, "n r c k"]
    together: Float[Tensor, "n r c k"]
    apart: Float[Tensor, "n r c k"] | None


def formed_gradients(gradients: Float[Tensor, "n r c k"]) -> Factored:
    """Block-mean gradients themselves as columns: every pair of blocks counts."""
    return Factored(right=gradients, together=gradients, apart=gradients.sum(1, keepdim=True) - gradients)


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
    """Add the block products of layered features, S² (pairing "blocks") or S products of the layers' widths."""
    draws_per_block = rows.num_draws // num_blocks
    for s in range(rows.num_draws):
        block = block_of(s)
        partners = range(rows.num_draws) if sums.between is not None else (s,)
        for t in partners:
            other = block_of(t)
            product = draw_products(rows, columns, s, t, meeting)
            if sums.between is None:
                product /= draws_per_block
                sums.within += product
                if sums.by_block is not None:
                    sums.by_block[block] += product
            elif block == other:
                sums.within += product.div_(draws_per_block**2)
            else:
                sums.between += product.div_(draws_per_block**2)
                if sums.by_block is not None:
                    product *= 0.5
                    sums.by_block[block] += product
                    sums.by_block[other] += product
