"""The estimator `weight` and the kernel `covariance`: output differences Δ_s(x) = f(x; θ+z_s) − f(x; θ).

Valid for everything that can be evaluated: no gradient is taken. The kernel is Φ M Φᵀ with Φ = Δ:
`weight`       M_st = ⟨v_s, v_t⟩, v_s the draw's direction, P·z/|z|² for radial laws, since g = E[Δ v]. Blocks are
               paired; the error of `unbiased` is about √(2P)/S. With attention, differences carry the factors B·α of
               `nntk_dist.weighting.attention`.
`covariance`   M_ss = P/|z_s|²: C(x, x') = P·E[ΔΔ'/|z|²]; positive semidefinite, with an error of about 1/√S for every
               P. It equals the nonlocal kernel only as γ → 0.

Axes: n rows, s draws, r blocks, b draws of a block, c outputs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.errors import ArgumentError
from nntk_dist.estimators.drawn_features import DrawnFeatures
from nntk_dist.layers.low_rank_passes import LowRankPasses
from nntk_dist.models.evaluation import check_finite, output_index
from nntk_dist.products.block_sums import BlockSums, Changes, Meeting, empty_sums
from nntk_dist.products.factor_form import METRIC_DRAWS
from nntk_dist.products.feature_description import ArraySpec, FeatureCosts, FeatureStorage
from nntk_dist.products.features import Rows, num_rows
from nntk_dist.products.formed import alone_weighted_products
from nntk_dist.products.metric import PLAIN, by_blocks, metric_block_products, metric_weighted_products, mixed_by_metric
from nntk_dist.products.wanted import Side, Wanted
from nntk_dist.products.weighted_products import WeightedProduct, add_products_
from nntk_dist.sampling.draws import draw_chunks
from nntk_dist.weighting.attention import Attention

_PORTION_NUMBERS = 2**22  # of a row set, which are copied to float64 at a time


@dataclass(frozen=True)
class DifferenceFeatures(DrawnFeatures):
    """Output differences under all draws.

    Attributes:
        pair_blocks: Whether blocks are paired; False gives the covariance kernel.
        metric: M, (S, S) float64, scaled such that the mean over all pairs of blocks is Φ M Φᵀ. None makes it from the
            draws when it is needed. It is the same for all rows, so a pipeline makes it once.
        attention: Weights of the draws; None weights them equally.
        product: Evaluates low-rank draws without forming their weights; None if the model does not allow it, or if
            attention scores need the weights.
        counted: The tensors whose gradients count, of all that are perturbed; empty if all do. Paired blocks only.
    """

    zero_stderr_is_unresolved: ClassVar[bool] = True  # 0 means that no draw changed the output

    pair_blocks: bool = True
    metric: Float64[Tensor, "s s"] | None = None
    attention: Attention | None = None
    product: LowRankPasses | None = None
    counted: tuple[str, ...] = ()

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """One array: Δ, draw by draw."""
        return (ArraySpec("differences", ("draw", "output"), (self.num_draws, len(self.columns))),)

    @property
    def storage(self) -> FeatureStorage:
        """One array, with M if products need it or if it is small."""
        keeps_metric = self.pair_blocks or self.num_draws <= METRIC_DRAWS
        metric = ArraySpec("metric", ("draw", "draw_col"), (self.num_draws, self.num_draws))
        return FeatureStorage(self.arrays, True, metric if keeps_metric else None, needs_metric=self.pair_blocks)

    def costs(self, meeting: Meeting, wanted: Wanted) -> FeatureCosts:
        """Return the costs: 2 products of length S an entry and output, 3 with standard errors, 1 without pairs."""
        draws, outputs, item = self.num_draws, len(self.columns), 8
        products = (3.0 if wanted.stderr else 2.0) if self.pair_blocks else 1.0
        held = 4 * item * draws**2 if self.pair_blocks else 0
        return FeatureCosts(
            entry_operations=2.0 * products * draws * outputs * meeting.width(outputs),
            passes_per_draw=self.difference_passes(),
            metric_operations=0.0 if self.storage.metric is None else 2.0 * draws**2 * self.num_parameters,
            held_bytes=held + (0 if self.product is None else self.product.trial_bytes),
            prepared_share=3.0 if self.pair_blocks else 1.0,
        )

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        """Compute the differences; see `FeatureMap.compute`."""
        base = self.evaluator.base(x, batch)
        check_finite(base, "the model's output")
        differences = base.new_empty(len(x), len(draws), len(columns))
        chosen = output_index(columns)
        scores = []
        for members, z, unmoved, moved in self._passes(x, base, draws, batch):
            if z is not None and self.attention is not None:
                scores.append(self.attention.scores(members, z, unmoved, moved))
            changes = moved.sub_(unmoved)[:, :, chosen]
            differences[:, members.start - draws.start : members.stop - draws.start] = changes.transpose(0, 1)
        check_finite(differences, f"the model's output under draws {draws.start} to {draws.stop - 1}")
        if self.attention is not None:
            differences *= self.attention.softmax_factors(torch.cat(scores)).T[:, :, None].to(differences.dtype)
        return {"differences": differences}

    def _passes(
        self, x: Tensor, base: Float[Tensor, "n c"], draws: range, batch: int | None
    ) -> Iterator[tuple[range, Float[Tensor, "s P"] | None, Float[Tensor, "n c"], Float[Tensor, "s n c"]]]:
        """Yield (draws, z, f(x; θ), f(x; θ+z)), some draws at a time; z is None if it is not made."""
        group = self.drawing.group_size
        if self.product is not None:
            for part in draw_chunks(draws, max(self.product.numbers_of_a_draw, base.numel()), group):
                yield part, None, base, self.product.perturbed(x, part, batch)
            return
        for part in draw_chunks(draws, self.num_parameters, group):
            z = self.drawing.perturbations(part, dtype=base.dtype, device=base.device)
            for members, unmoved, moved in self.evaluator.pairs(x, base, self.drawing, part, z, batch):
                yield members, z[members.start - part.start : members.stop - part.start], unmoved, moved

    def make_metric(self) -> Float64[Tensor, "s s"]:
        """Make M such that `plugin`, or the covariance kernel, is Φ M Φᵀ.

        2·S²·P operations and S² numbers if blocks are paired; otherwise M is diagonal.

        Raises:
            ArgumentError: products of blocks do not fit into the model's dtype. Draws of a law like `fractional` can be
                so short that their directions z/|z|² overflow.
        """
        if not self.pair_blocks:
            return torch.diag(self._weights)
        counted = self.evaluator.space.intervals(self.counted) if self.counted else None
        products = self.drawing.direction_products(counted, device=self._device)
        self._check_fits(float(products.abs().max()) / self.drawing.draws_per_block**2)
        return products.div_(self.num_draws**2)

    def with_metric(self, metric: Float64[Tensor, "s s"]) -> Self:
        """Return the same features with M given."""
        return replace(self, metric=metric)

    def _check_fits(self, largest: float) -> None:
        """Raise an ArgumentError if a product of block directions of this size does not fit into the model's dtype."""
        dtype = next(self.evaluator.model.parameters()).dtype
        most = min(torch.finfo(dtype).max, math.sqrt(torch.finfo(torch.float64).max))  # errors sum squares
        if not largest <= most:
            name = str(dtype).removeprefix("torch.")
            gradients = ", or estimator autodiff, if the model has no jumps" if self.pair_blocks else ""
            raise ArgumentError(
                f"products of the draws' directions z/|z|² overflow {name}; use a smaller alpha or another "
                f"distribution, or dtype float64{gradients}"
            )

    @property
    def _device(self) -> torch.device:
        return next(self.evaluator.model.parameters()).device

    @cached_property
    def _weights(self) -> Float64[Tensor, " s"]:
        """The diagonal of the covariance kernel's metric: P/|z_s|²/S; an ArgumentError if it overflows."""
        weights = self.num_parameters / self.num_draws / self.drawing.squared_norms(device=self._device)
        self._check_fits(float(weights.max()) * self.num_blocks)
        return weights

    @cached_property
    def _block_metric(self) -> Float64[Tensor, "s s"]:
        """M for products of single block means, ⟨g_r, g_r'⟩, instead of the mean over all pairs of blocks."""
        return (self.make_metric() if self.metric is None else self.metric) * self.num_blocks**2

    def changes(self, rows: Rows) -> Changes:
        """Return how often draws changed the outputs, by block; of the covariance kernel, by draw."""
        differences = rows["differences"]
        counts = (differences != 0).to(torch.float32)
        if not self.pair_blocks:
            sizes = (self._weights * self.num_draws).sqrt().to(differences.dtype)
            return Changes(counts, float((differences.abs() * sizes[:, None]).max()), self.num_groups)
        lengths = self._block_metric.diagonal().sqrt() * self.drawing.draws_per_block
        sizes = (lengths * self.component_share(self.counted)).to(differences.dtype)
        counts = counts.unflatten(1, (self.num_blocks, -1)).sum(2)
        return Changes(counts, float((differences.abs() * sizes[:, None]).max()), self.num_groups)

    def prepare(self, rows: Rows, wanted: Wanted) -> dict[str, Tensor]:
        """Multiply M to rows that are columns of tiles; without pairs, weight the differences."""
        if self.pair_blocks:
            plain = rows if PLAIN in rows else {PLAIN: self._by_block(rows["differences"])}
            return mixed_by_metric(plain, self._block_metric, wanted)
        if "weighted" in rows:
            return dict(rows)
        weights = (self._weights * self.num_blocks).sqrt().to(rows["differences"].dtype)
        return {"weighted": self._by_block(rows["differences"] * weights[:, None])}

    def _by_block(self, differences: Float[Tensor, "n s c"]) -> Float[Tensor, "n r c b"]:
        return by_blocks(differences.transpose(1, 2), self.num_blocks)

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        """Sum the block products of one tile."""
        rows = self.prepare(rows, wanted.on(Side.ROWS))
        others = self.prepare(others, wanted.on(Side.COLUMNS))
        shape = meeting.shape(num_rows(rows), num_rows(others), next(iter(rows.values())).shape[2])
        device = next(iter(rows.values())).device
        sums = empty_sums(shape, self.num_blocks, wanted, pair_blocks=self.pair_blocks, device=device)
        add_products_(sums, self.weighted_products(rows, others, wanted), meeting)
        return sums

    def weighted_products(self, rows: Rows, others: Rows, wanted: Wanted) -> list[WeightedProduct]:
        """Return the matrix products of prepared row sets."""
        if self.pair_blocks:
            return metric_weighted_products(rows, others, wanted)
        return alone_weighted_products(rows["weighted"], others["weighted"], wanted)

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "..."]:
        """Return every block product of few entries, in float64."""
        left, right = (part["differences"].transpose(1, 2) for part in (rows, others))
        if meeting.full:
            return self._products(left, right, meeting)
        step = max(1, _PORTION_NUMBERS // (max(len(left), len(right)) * self.num_draws))
        total: Tensor | None = None
        for some, those in zip(left.split(step, 1), right.split(step, 1), strict=True):
            part = self._products(some, those, meeting)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _products(
        self, left: Float[Tensor, "n1 c s"], right: Float[Tensor, "n2 c s"], meeting: Meeting
    ) -> Float64[Tensor, "..."]:
        if self.pair_blocks:
            return metric_block_products(left, right, self._block_metric, self.num_blocks, meeting)
        weighted = by_blocks(left.double() * (self._weights * self.num_blocks), self.num_blocks)
        columns = by_blocks(right.double(), self.num_blocks)
        return torch.stack([meeting.outputs(weighted[:, r], columns[:, r]) for r in range(self.num_blocks)])
