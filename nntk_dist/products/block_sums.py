"""Sums of block products over a tile: everything that the statistics of a kernel need, for all kinds of features.

A block product is H_rr'(x, x') = ⟨g_r(x), g_r'(x')⟩, g_r the mean gradient of block r. This module defines the sums and
how two row sets meet. The modules `formed`, `metric`, `layered` and `noise_pairs` make sums of features;
`nntk_dist.statistics.standard_errors` makes statistics of sums. No models, no randomness.

Axes: n rows, r/R blocks, c outputs, k feature columns of one output, w slots of features (blocks, draws, or
combinations of blocks), q/Q groups of sketch columns.
Pairings: all blocks are paired (nonlocal kernel), or each draw only with itself (averaged, covariance, local).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.products.wanted import Wanted

Sum = tuple[str, int]  # the name of a sum: what it adds up, and the index of its block or group
WITHIN, BETWEEN = ("within", 0), ("between", 0)

# Up to this many terms of an inner product are summed in the features' dtype; longer ones continue in float64.
INNER_TERMS = 4096


@dataclass(frozen=True)
class Meeting:
    """How two row sets meet.

    A product has shape (n1, n2), or (n1·C, n2·C) with `full`; paired (n,), or (n, C, C) with `full`.

    Attributes:
        full: Whether outputs are kept; otherwise they are summed.
        paired: Whether each row meets only its namesake; otherwise all rows meet all.
        column_outputs: With `full`, the places of the outputs that columns have, if not all that rows have.
    """

    full: bool = False
    paired: bool = False
    column_outputs: tuple[int, ...] | None = None

    def width(self, num_outputs: int) -> int:
        """Return the kernel rows of one example."""
        return num_outputs if self.full else 1

    def column_width(self, num_outputs: int) -> int:
        """Return the kernel columns of one example."""
        return self.width(num_outputs if self.column_outputs is None else len(self.column_outputs))

    def outputs(self, a: Float[Tensor, "n1 c k"], b: Float[Tensor, "n2 c k"]) -> Tensor:
        """Multiply features that have an axis of outputs."""
        if self.paired:
            return torch.einsum("nck,ndk->ncd", a, b) if self.full else torch.einsum("nck,nck->n", a, b)
        if self.full:
            return a.flatten(0, 1) @ b.flatten(0, 1).T
        return a.flatten(1) @ b.flatten(1).T

    def paired_product(self, a: Float[Tensor, "n w c k"], b: Float[Tensor, "n w c k"]) -> Float64[Tensor, "n *c"]:
        """Multiply each row with its column, summed over slots.

        At most `INNER_TERMS` terms are summed in the features' dtype, the rest in float64.
        """
        left, right = (part.transpose(1, 2).flatten(2) for part in (a, b))
        if not self.full:
            return (left * right).sum((1, 2), dtype=torch.float64)
        portions = zip(left.split(INNER_TERMS, -1), right.split(INNER_TERMS, -1), strict=True)
        return torch.stack([self.outputs(some, others).double() for some, others in portions]).sum(0)

    def matrix(self, features: Float[Tensor, "n w c k"]) -> Float[Tensor, "rows inner"]:
        """Return one row for each kernel row; a view if the memory order allows it."""
        return features.transpose(1, 2).flatten(2).flatten(0, 1) if self.full else features.flatten(1)

    def multiply_shared_(self, product: Tensor, a: Float[Tensor, "n1 k"], b: Float[Tensor, "n2 k"]) -> Tensor:
        """Multiply a result of `outputs` in place by the product of features that all outputs share."""
        if self.paired:
            product.mul_(torch.einsum("nk,nk->n", a, b).reshape(-1, *[1] * (product.ndim - 1)))
            return product
        product.unflatten(1, (len(b), -1)).unflatten(0, (len(a), -1)).mul_((a @ b.T)[:, None, :, None])
        return product

    def shape(self, num_rows: int, num_columns: int, num_outputs: int) -> tuple[int, ...]:
        """Return the shape of a product."""
        width, other = self.width(num_outputs), self.column_width(num_outputs)
        if self.paired:
            return (num_rows, width, other) if self.full else (num_rows,)
        return (num_rows * width, num_columns * other)

    def in_different_blocks(
        self, rows: Bool[Tensor, "n1 r c"], columns: Bool[Tensor, "n2 r c"]
    ) -> Bool[Tensor, "*tile"]:
        """Return a mask of the entries with an output that is true for the row in one block, for the column in another.

        Masks of outputs that changed give the entries that are resolved: in every other entry all products of two
        different blocks are 0, though products that cancel leave rounding in their sums.
        """
        left, right = rows.float(), columns.float()
        all_pairs = self.outputs(left.sum(1)[..., None], right.sum(1)[..., None])
        for r in range(rows.shape[1]):
            all_pairs -= self.outputs(left[:, r, :, None], right[:, r, :, None])
        return all_pairs > 0

    def same_output(self, values: Float[Tensor, "*lead tile"], num_outputs: int) -> Tensor:
        """Return products that are `values` for each output with itself and 0 for two different outputs."""
        if not self.full:
            return values * num_outputs
        identity = torch.eye(num_outputs, dtype=values.dtype, device=values.device)
        if self.column_outputs is not None:
            identity = identity[:, list(self.column_outputs)]
        if self.paired:
            return values[..., None, None] * identity
        return torch.kron(values.contiguous(), identity)


@dataclass(frozen=True)
class Changes:
    """How often draws changed the outputs of rows, and by how much at most.

    Attributes:
        counts: The draws that changed an output, in each block; by draw if blocks are not paired.
        largest: The largest change D, times the size τ of its direction's component along a unit vector.
        num_groups: The independent groups of draws.
    """

    counts: Float[Tensor, "n r c"]
    largest: float
    num_groups: int


def block(number: int) -> Sum:
    """Return the name of `by_block[number]`."""
    return "block", number


def group(number: int) -> Sum:
    """Return the name of `by_group[number]`."""
    return "group", number


@dataclass
class BlockSums:
    """Sums over blocks of the products of one tile, in float64.

    Attributes:
        num_blocks: R.
        within: Σ_r H_rr.
        between: Σ_{r≠r'} H_rr'; None unless blocks are paired.
        by_block: If wanted, T_r = Σ_{r'≠r} h_rr', h_rr' = ½(H_rr' + H_r'r), for paired blocks, else H_rr; r leading.
        by_group: If features are sketched, what each group of sketch columns adds to `between`; q leading.
        resolved: Mask of the entries whose standard error means something. None if every entry's does, or if a standard
            error of 0 marks the others.
    """

    num_blocks: int
    within: Float64[Tensor, "*tile"]
    between: Float64[Tensor, "*tile"] | None
    by_block: Float64[Tensor, "r *tile"] | None
    by_group: Float64[Tensor, "q *tile"] | None = None
    resolved: Bool[Tensor, "*tile"] | None = None

    def parts(self) -> dict[Sum, Float64[Tensor, "*tile"]]:
        """Return the sums by name, as views: `WITHIN`, `BETWEEN`, `block(r)`, `group(q)`."""
        named = {WITHIN: self.within}
        if self.between is not None:
            named[BETWEEN] = self.between
        for name, stack in ((block, self.by_block), (group, self.by_group)):
            named |= {} if stack is None else {name(index): part for index, part in enumerate(stack)}
        return named

    def of_stack(self, stack: Float64[Tensor, "m *tile"]) -> "BlockSums":
        """Return the same sums as views of a stack, in the order of `parts`."""
        num_blocks = 0 if self.by_block is None else len(self.by_block)
        first = 1 if self.between is None else 2
        pairs, blocks, groups = stack.tensor_split((first, first + num_blocks))
        return BlockSums(
            self.num_blocks,
            pairs[0],
            None if self.between is None else pairs[1],
            None if self.by_block is None else blocks,
            None if self.by_group is None else groups,
        )

    def of_rows(self, rows: slice) -> "BlockSums":
        """Return the sums of some rows of the tile, as views."""
        assert self.resolved is None
        within, between = self.within[rows], None if self.between is None else self.between[rows]
        by_block, by_group = (None if stack is None else stack[:, rows] for stack in (self.by_block, self.by_group))
        return BlockSums(self.num_blocks, within, between, by_block, by_group)

    def add_(self, other: "BlockSums") -> "BlockSums":
        """Add the sums of further outputs or layers in place."""
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
    wanted: Wanted,
    *,
    pair_blocks: bool,
    device: torch.device,
    num_groups: int = 0,
) -> BlockSums:
    """Return sums that are 0; groups are kept apart only together with blocks, for standard errors."""

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=device)

    return BlockSums(
        num_blocks,
        zeros(*shape),
        zeros(*shape) if pair_blocks else None,
        zeros(num_blocks, *shape) if wanted.stderr else None,
        zeros(num_groups, *shape) if wanted.stderr and num_groups else None,
    )
