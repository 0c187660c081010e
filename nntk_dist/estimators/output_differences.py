"""Features made of output differences Δ_s(x) = f(x; θ+z_s) − f(x; θ): the estimator `weight` and the kernel
`covariance`.

Valid for anything that can be evaluated: no gradient is taken. The kernel is Φ M Φᵀ with Φ = Δ:
`weight`       M_st = ⟨v_s,v_t⟩ of the draws' directions, since g = E[Δ v], for radial laws v = P·z/|z|²; blocks are
paired, error of `unbiased` ~ √(2P)/S; with attention, differences carry the factors B·α of
`nntk_dist.weighting.attention`;
`covariance`   M_ss = P/|z_s|², C(x,x') = P·E[ΔΔ'/|z|²]; PSD, error ~ 1/√S whatever P, *not* the NNTK unless γ → 0.

Axes: n rows, s draws, r blocks, b draws of a block, c outputs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.errors import NNTKError
from nntk_dist.layers.low_rank_passes import LowRankPasses
from nntk_dist.models.evaluation import Evaluator, check_finite, output_index
from nntk_dist.products.block_sums import BlockSums, Meeting, empty_sums
from nntk_dist.products.features import ArraySpec, Rows
from nntk_dist.products.formed import alone_terms
from nntk_dist.products.metric import PLAIN, by_blocks, metric_products, metric_terms, mixed_by_metric
from nntk_dist.products.wanted import Side, Wanted
from nntk_dist.products.weighted_products import Term, add_terms_
from nntk_dist.sampling.draws import Drawing, draw_chunks
from nntk_dist.weighting.attention import Attention

_PORTION = 2**22  # numbers of a row set that are copied in float64 at a time


@dataclass(frozen=True)
class DifferenceFeatures:
    """Output differences under all draws; `pair_blocks` False gives the covariance kernel.

    `product` evaluates low-rank draws without their weights, where the model allows it and scores do not need them.

    `metric`, (S, S) float64, is M scaled so that the mean over all pairs of blocks is Φ M Φᵀ; it is made from the
    draws where not given. It is the same for all rows, so a pipeline makes it once.
    """

    evaluator: Evaluator
    drawing: Drawing
    columns: tuple[int, ...]
    pair_blocks: bool = True
    metric: Float64[Tensor, "s s"] | None = None
    shows_unresolved: bool = True
    num_sketch_groups: int = 0
    attention: Attention | None = None
    product: LowRankPasses | None = None

    @property
    def num_draws(self) -> int:
        return self.drawing.num_draws

    @property
    def num_blocks(self) -> int:
        return self.drawing.num_blocks

    @property
    def num_parameters(self) -> int:
        return self.drawing.num_parameters

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return (ArraySpec("differences", ("draw", "output"), (self.num_draws, len(self.columns))),)

    def outputs(self, x: Tensor, *, batch: int | None = None) -> Float[Tensor, "n c"]:
        return self.evaluator.expected(x, self.drawing.seed, batch)

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
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
            differences *= self.attention.factors(torch.cat(scores)).T[:, :, None].to(differences.dtype)
        return {"differences": differences}

    def _passes(
        self, x: Tensor, base: Float[Tensor, "n c"], draws: range, batch: int | None
    ) -> Iterator[tuple[range, Float[Tensor, "s P"] | None, Float[Tensor, "n c"], Float[Tensor, "s n c"]]]:
        """(draws, z, f(x; θ), f(x; θ+z)), some draws at a time; z None where it is not made."""
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
        """M such that `plugin` (or the covariance kernel) is Φ M Φᵀ; 2·S²·P operations and S² numbers where blocks are
        paired; otherwise M is diagonal.

        Raises: NNTKError where products of blocks do not fit into the model's dtype: draws as short as those of
        `fractional` may be have directions z/|z|² of any length.
        """
        if not self.pair_blocks:
            return torch.diag(self._weights)
        products = self.drawing.direction_products(device=self._device)
        self._check_fits(float(products.abs().max()) / self.drawing.draws_per_block**2)
        return products.div_(self.num_draws**2)

    def _check_fits(self, largest: float) -> None:
        """Raise an NNTKError where such a product of block directions does not fit into the model's dtype."""
        dtype = next(self.evaluator.model.parameters()).dtype
        most = min(torch.finfo(dtype).max, math.sqrt(torch.finfo(torch.float64).max))  # errors are made of squares
        if not largest <= most:
            name = str(dtype).removeprefix("torch.")
            gradients = ", or estimator autodiff, where the model has no jumps" if self.pair_blocks else ""
            raise NNTKError(
                f"products of the draws' directions z/|z|² overflow {name}; use a smaller alpha or another "
                f"distribution, or dtype float64{gradients}"
            )

    @property
    def _device(self) -> torch.device:
        return next(self.evaluator.model.parameters()).device

    @cached_property
    def _weights(self) -> Float64[Tensor, " s"]:
        """The diagonal of the covariance kernel's metric: P/|z_s|²/S.

        Raises: NNTKError where one times R does not fit into the model's dtype.
        """
        weights = self.num_parameters / self.num_draws / self.drawing.squared_norms(device=self._device)
        self._check_fits(float(weights.max()) * self.num_blocks)
        return weights

    @cached_property
    def _block_metric(self) -> Float64[Tensor, "s s"]:
        """M for products of single block means, ⟨g_r, g_r'⟩, instead of the mean over all pairs of blocks."""
        return (self.make_metric() if self.metric is None else self.metric) * self.num_blocks**2

    def prepare(self, rows: Rows, wanted: Wanted) -> dict[str, Tensor]:
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
        rows = self.prepare(rows, wanted.on(Side.ROWS))
        others = self.prepare(others, wanted.on(Side.COLUMNS))
        first, second = (next(iter(part.values())) for part in (rows, others))
        shape = meeting.shape(len(first), len(second), first.shape[2])
        sums = empty_sums(shape, self.num_blocks, wanted, pair_blocks=self.pair_blocks, device=first.device)
        add_terms_(sums, self.terms(rows, others, wanted), meeting)
        return sums

    def terms(self, rows: Rows, others: Rows, wanted: Wanted) -> list[Term]:
        if self.pair_blocks:
            return metric_terms(rows, others, wanted)
        return alone_terms(rows["weighted"], others["weighted"], wanted)

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "..."]:
        left, right = (part["differences"].transpose(1, 2) for part in (rows, others))
        if meeting.full:
            return self._products(left, right, meeting)
        step = max(1, _PORTION // (max(len(left), len(right)) * self.num_draws))
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
            return metric_products(left, right, self._block_metric, self.num_blocks, meeting)
        weighted = by_blocks(left.double() * (self._weights * self.num_blocks), self.num_blocks)
        columns = by_blocks(right.double(), self.num_blocks)
        return torch.stack([meeting.outputs(weighted[:, r], columns[:, r]) for r in range(self.num_blocks)])
