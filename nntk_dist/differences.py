"""Features made of output differences Δ_s(x) = f(x; θ+z_s) − f(x; θ): the estimator `weight` and the kernel
`covariance`.

Valid for anything that can be evaluated: no gradient is taken. The kernel is Φ M Φᵀ with Φ = Δ:
`weight`       M_st = ⟨v_s,v_t⟩ of the draws' directions, since g = E[Δ v], for radial laws v = P·z/|z|²; blocks are
paired, error of `unbiased` ~ √(2P)/S; with attention, differences carry the factors B·α of `nntk_dist.attention`;
`covariance`   M_ss = P/|z_s|², C(x,x') = P·E[ΔΔ'/|z|²]; PSD, error ~ 1/√S whatever P, *not* the NNTK unless γ → 0.

Axes: n rows, s draws, r blocks, b draws of a block, c outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.attention import Attention
from nntk_dist.block_sums import (
    BlockSums,
    Factored,
    Meeting,
    add_factored_,
    empty_sums,
    factored_by_metric,
    metric_products,
)
from nntk_dist.drawing import Drawing, draw_chunks
from nntk_dist.evaluation import Evaluator, check_finite
from nntk_dist.features import ArraySpec, Rows
from nntk_dist.shared_product import SharedProduct


@dataclass(frozen=True)
class DifferenceFeatures:
    """Output differences under all draws; `pair_blocks` False gives the covariance kernel.

    `shared` evaluates low-rank draws without their weights, where the model allows it and scores do not need them.

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
    shared: SharedProduct | None = None

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
        everything = tuple(columns) == tuple(range(base.shape[1]))
        scores = []
        for members, z, unmoved, moved in self._passes(x, base, draws, batch):
            if z is not None and self.attention is not None:
                scores.append(self.attention.scores(members, z, unmoved, moved))
            changes = moved.sub_(unmoved)
            changes = changes if everything else changes[:, :, list(columns)]
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
        if self.shared is not None:
            for part in draw_chunks(draws, max(self.shared.numbers_of_a_draw, base.numel()), group):
                yield part, None, base, self.shared.perturbed(x, part, batch)
            return
        for part in draw_chunks(draws, self.num_parameters, group):
            z = self.drawing.perturbations(part, dtype=base.dtype, device=base.device)
            for members, unmoved, moved in self.evaluator.pairs(x, base, self.drawing, part, z, batch):
                yield members, z[members.start - part.start : members.stop - part.start], unmoved, moved

    def make_metric(self) -> Float64[Tensor, "s s"]:
        """M such that `plugin` (or the covariance kernel) is Φ M Φᵀ; 2·S²·P operations and S² numbers where blocks are
        paired; otherwise M is diagonal.
        """
        if not self.pair_blocks:
            return torch.diag(self._weights)
        return self.drawing.direction_products(device=self._device).div_(self.num_draws**2)

    @property
    def _device(self) -> torch.device:
        return next(self.evaluator.model.parameters()).device

    @cached_property
    def _weights(self) -> Float64[Tensor, " s"]:
        """The diagonal of the covariance kernel's metric: P/|z_s|²/S."""
        return self.num_parameters / self.num_draws / self.drawing.squared_norms(device=self._device)

    @cached_property
    def _block_metric(self) -> Float64[Tensor, "s s"]:
        """M for products of single block means, ⟨g_r, g_r'⟩, instead of the mean over all pairs of blocks."""
        return (self.make_metric() if self.metric is None else self.metric) * self.num_blocks**2

    def _by_block(self, features: Float[Tensor, "n c s"]) -> Float[Tensor, "n r c b"]:
        return features.unflatten(2, (self.num_blocks, -1)).transpose(1, 2)

    def _factored(self, rows: Rows) -> Factored:
        features = rows["differences"].transpose(1, 2)
        if not self.pair_blocks:
            weights = (self._weights * self.num_blocks).to(features.dtype)
            return Factored(self._by_block(features), together=self._by_block(features * weights), apart=None)
        return factored_by_metric(features, self._block_metric, self.num_blocks)

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, *, by_block: bool) -> BlockSums:
        first = rows["differences"]
        shape = meeting.shape(len(first), len(others["differences"]), first.shape[2])
        sums = empty_sums(shape, self.num_blocks, pair_blocks=self.pair_blocks, by_block=by_block, device=first.device)
        add_factored_(sums, self._factored(rows), self._factored(others), meeting)
        return sums

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "..."]:
        left = rows["differences"].transpose(1, 2).double()
        right = others["differences"].transpose(1, 2).double()
        if self.pair_blocks:
            return metric_products(left, right, self._block_metric, self.num_blocks, meeting)
        weighted, columns = self._by_block(left * (self._weights * self.num_blocks)), self._by_block(right)
        return torch.stack([meeting.outputs(weighted[:, r], columns[:, r]) for r in range(self.num_blocks)])
