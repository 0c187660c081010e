"""What every kind of feature offers: arrays with a leading row axis, and the block sums of two row sets.

The interface only. `differences` (weight, covariance) and `gradients` (autodiff, averaged, local) fulfil it; the
in-memory functions and the pipeline use nothing else of them, so that a tile is the same whichever made its features.

Axes: n rows, s draws, r blocks, c outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nntk_dist.products.block_sums import BlockSums, Meeting
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import Term
from nntk_dist.runtime.batches import in_batches

Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class ArraySpec:
    """One feature array: its name, and the names and lengths of the axes behind the row axis.

    The first of them, "draw" or "block", is what chunks of draws divide.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]


@runtime_checkable
class FeatureMap(Protocol):
    """Features of rows under all draws; for the meaning of the sums see `nntk_dist.products.block_sums`."""

    @property
    def num_draws(self) -> int:
        """S, perturbed models."""
        ...

    @property
    def num_blocks(self) -> int:
        """R, independent blocks of draws."""
        ...

    @property
    def num_parameters(self) -> int:
        """P."""
        ...

    @property
    def columns(self) -> tuple[int, ...]:
        """The model outputs that the kernel is made of."""
        ...

    @property
    def pair_blocks(self) -> bool:
        """Whether products of different blocks are made (the nonlocal kernel), or only of each draw with itself."""
        ...

    @property
    def shows_unresolved(self) -> bool:
        """Whether blocks that all agree mean that no draw changed the output, rather than that there is no noise."""
        ...

    @property
    def num_sketch_groups(self) -> int:
        """Q, independent groups of sketch columns; 0 where products are exact."""
        ...

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that `compute` returns."""
        ...

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        """Features of inputs under a whole number of blocks of draws, for some of the outputs.

        `ids`, (n,) int64 from 0 to 2^32 − 1, name the examples: an example's own noise is a function of its id. Rows
        pass through the model in padded batches of `batch`, or all at once.
        """
        ...

    def outputs(self, x: Tensor, *, batch: int | None = None) -> Tensor:
        """f(x; θ), (n, C), all outputs."""
        ...

    def prepare(self, rows: Rows, wanted: Wanted) -> Rows:
        """Precompute what a row set contributes to all of its tiles.

        Arrays keep their leading row axis. Rows that are prepared already stay as they are; what they lack for another
        side is added.

        Args:
            rows: Features as `compute` returns them, or prepared before.
            wanted: Whether standard errors are wanted, and the side of its tiles on which the set stands.

        Returns:
            The prepared arrays, by name.
        """
        ...

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        """Sum the block products of one tile, or with a paired meeting of its diagonal.

        Args:
            rows: Features of the tile's rows, as computed or prepared with the same `wanted.stderr`.
            others: Features of its columns, likewise.
            meeting: Which pairs of examples meet, and whether outputs are summed.
            wanted: Whether sums by block are wanted, for standard errors.

        Returns:
            The sums in float64.
        """
        ...

    def terms(self, rows: Rows, others: Rows, wanted: Wanted) -> list[Term] | None:
        """The matrix products that the sums of prepared row sets are made of, which are added up faster than by
        `block_sums`; None where sums take more than these.
        """
        ...

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Tensor:
        """All products, for calibration on few entries: (R, R, *tile) where blocks are paired, else (R, *tile);
        float64.
        """
        ...


def block_range(draws: range, draws_per_block: int) -> range:
    """The blocks that a whole number of blocks of draws covers."""
    if draws.start % draws_per_block or draws.stop % draws_per_block:
        raise ValueError(f"draws {draws.start}:{draws.stop} are not whole blocks of {draws_per_block}")
    return range(draws.start // draws_per_block, draws.stop // draws_per_block)


def concatenate_rows(parts: Sequence[Rows]) -> dict[str, Tensor]:
    """Row sets one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def join_batches(
    compute: Callable[[Tensor, Tensor], Rows], x: Tensor, ids: Tensor, batch: int | None
) -> dict[str, Tensor]:
    """Features of rows and their ids, a padded batch after the other."""
    parts = []
    for (rows, own), (names, _) in zip(in_batches(x, batch), in_batches(ids, batch), strict=True):
        parts.append(slice_rows(compute(rows, names), slice(own.stop - own.start)))
    return concatenate_rows(parts)


def slice_rows(rows: Rows, selection: slice | Tensor) -> dict[str, Tensor]:
    """Some of the rows."""
    return {name: array[selection] for name, array in rows.items()}
