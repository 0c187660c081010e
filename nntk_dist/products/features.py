"""The interface of features: arrays with a leading row axis, their costs, and the block sums of two row sets.

Every estimator (`nntk_dist.estimators`) fulfils `FeatureMap`. The in-memory functions and the pipeline use nothing
else of an estimator, so a tile has the same bits whoever computes it.

Axes: n rows, s draws, r blocks, c outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.products.block_sums import BlockSums, Changes, Meeting
from nntk_dist.products.feature_description import ArraySpec, FeatureCosts, FeatureStorage
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import WeightedProduct
from nntk_dist.runtime.batches import in_batches

Rows = Mapping[str, Tensor]  # feature arrays by name, with a leading row axis


@runtime_checkable
class FeatureMap(Protocol):
    """Features of examples under all draws of a kernel, and everything that a pipeline must know of them."""

    @property
    def num_draws(self) -> int:
        """S, the number of perturbed models."""

    @property
    def num_blocks(self) -> int:
        """R, the number of independent blocks of draws."""

    @property
    def num_parameters(self) -> int:
        """P, the number of selected parameters."""

    @property
    def columns(self) -> tuple[int, ...]:
        """The indices of the model outputs in the kernel."""

    @property
    def pair_blocks(self) -> bool:
        """Whether products pair all blocks (the nonlocal kernel), or each draw only with itself."""

    @property
    def zero_stderr_is_unresolved(self) -> bool:
        """Whether a standard error of exactly 0 means that no draw changed the output, so that it becomes NaN.

        If not, 0 means that there is no sampling noise.
        """

    def resolved(self, rows: Rows, others: Rows, meeting: Meeting) -> Bool[Tensor, "*tile"] | None:
        """Return a mask of the entries whose standard error means something.

        None if every entry's does, or if a standard error of 0 marks the others.
        """

    def changes(self, rows: Rows) -> Changes | None:
        """Return how often draws changed the outputs of rows, as `compute` returns them.

        From this follows what unresolved entries could hold. None if every entry is resolved.
        """

    @property
    def num_sketch_groups(self) -> int:
        """Q, the number of independent groups of sketch columns; 0 if products are exact."""

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that `compute` returns."""

    @property
    def storage(self) -> FeatureStorage:
        """How a store keeps the arrays, and whether they are an explicit factor of the kernel."""

    def costs(self, meeting: Meeting, wanted: Wanted) -> FeatureCosts:
        """Return what the features and their products cost.

        Args:
            meeting: Whether outputs are summed or kept.
            wanted: Whether standard errors are wanted.
        """

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        """Compute the features of inputs under whole blocks of draws.

        Args:
            x: Inputs, (n, ...).
            ids: Names of the examples, (n,) int64 from 0 to 2^32 − 1. An example's own noise is a function of its id.
            draws: The draws, a whole number of blocks.
            columns: The outputs, all of them or some.
            batch: Rows that pass through the model at a time, padded; None takes all at once.

        Returns:
            The arrays by name, in the model's dtype.
        """

    def outputs(self, x: Tensor, *, batch: int | None = None) -> Float[Tensor, "n c"]:
        """Compute f(x; θ), all outputs, in batches as `compute` does."""

    def make_metric(self) -> Float64[Tensor, "k k"] | None:
        """Make the matrix M with `plugin = Φ M Φᵀ`; None if the features are no explicit factor of the kernel."""

    def with_metric(self, metric: Float64[Tensor, "k k"]) -> Self:
        """Return the same features with a metric that was made before, which spares making it again."""

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

    def weighted_products(self, rows: Rows, others: Rows, wanted: Wanted) -> list[WeightedProduct] | None:
        """Return the matrix products that make up the sums of prepared row sets.

        They are added up faster than by `block_sums`. None if the sums take more than matrix products.
        """

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "..."]:
        """Return every block product of few entries, for calibration.

        Their shape is (R, R, *tile) if blocks are paired, else (R, *tile).
        """


def block_range(draws: range, draws_per_block: int) -> range:
    """Return the blocks that a whole number of blocks of draws covers."""
    if draws.start % draws_per_block or draws.stop % draws_per_block:
        raise ValueError(f"draws {draws.start}:{draws.stop} are not whole blocks of {draws_per_block}")
    return range(draws.start // draws_per_block, draws.stop // draws_per_block)


def concatenate_rows(parts: Sequence[Rows]) -> dict[str, Tensor]:
    """Concatenate row sets."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def join_batches(
    compute: Callable[[Tensor, Tensor], Rows], x: Tensor, ids: Tensor, batch: int | None
) -> dict[str, Tensor]:
    """Compute features of inputs and ids in padded batches, and concatenate them."""
    parts = []
    for (rows, own), (names, _) in zip(in_batches(x, batch), in_batches(ids, batch), strict=True):
        parts.append(slice_rows(compute(rows, names), slice(own.stop - own.start)))
    return concatenate_rows(parts)


def slice_rows(rows: Rows, selection: slice | Tensor) -> dict[str, Tensor]:
    """Select some of the rows."""
    return {name: array[selection] for name, array in rows.items()}


def num_rows(rows: Rows) -> int:
    """Return the number of rows of a row set."""
    return len(next(iter(rows.values())))


def feature_bytes(rows: Rows) -> int:
    """Return the bytes of a row set."""
    return sum(array.nbytes for array in rows.values())
