"""Features made of output differences Δ_s(x) = f(x; θ+z_s) − f(x; θ): the estimator `weight` and the kernel
`covariance`.

Valid for anything that can be evaluated: no gradient is taken. The kernel is Φ M Φᵀ with Φ = Δ:
`weight`       M_st = P²⟨z_s,z_t⟩/(|z_s|²|z_t|²), since g = P·E[Δ z/|z|²]; blocks are paired, error of `unbiased` ~
√(2P)/S;
`covariance`   M_ss = P/|z_s|², C(x,x') = P·E[ΔΔ'/|z|²]; PSD, error ~ 1/√S whatever P, *not* the NNTK unless γ → 0.

Axes: n rows, s draws, r blocks, b draws of a block, c outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.block_sums import BlockSums, Factored, Meeting, add_factored_, empty_sums
from nntk_dist.drawing import Drawing
from nntk_dist.evaluation import Evaluator, check_finite
from nntk_dist.features import ArraySpec, Rows


@dataclass(frozen=True)
class DifferenceFeatures:
    """Output differences under all draws; `pair_blocks` False gives the covariance kernel.

    `metric`, (S, S) float64, is M scaled so that the mean over all pairs of blocks is Φ M Φᵀ; it is made from the
    draws where not given. It is the same for all rows, so a pipeline makes it once.
    """

    evaluator: Evaluator
    drawing: Drawing
    columns: tuple[int, ...]
    pair_blocks: bool = True
    metric: Float64[Tensor, "s s"] | None = None
    shows_unresolved: bool = True

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

    def outputs(self, x: Tensor) -> Float[Tensor, "n c"]:
        return self.evaluator.base(x)

    def compute(self, x: Tensor, draws: range, columns: Sequence[int]) -> dict[str, Tensor]:
        base = self.evaluator.base(x)
        check_finite(base, "the model's output")
        displacements = self.drawing.perturbations(draws, dtype=base.dtype, device=base.device)
        differences = (self.evaluator.perturbed(x, displacements) - base)[:, :, list(columns)].transpose(0, 1)
        check_finite(differences, f"the model's output under draws {draws.start} to {draws.stop - 1}")
        return {"differences": differences.contiguous()}

    def make_metric(self) -> Float64[Tensor, "s s"]:
        """M such that `plugin` (or the covariance kernel) is Φ M Φᵀ; 2·S²·P operations, `covariance` as many as one
        draw takes.
        """
        products = self.drawing.inner_products(device=next(self.evaluator.model.parameters()).device)
        norms = products.diagonal().clone()
        if not self.pair_blocks:
            return torch.diag(self.num_parameters / norms / self.num_draws)
        return products * (self.num_parameters / self.num_draws) ** 2 / (norms[:, None] * norms[None, :])

    @cached_property
    def _metric(self) -> Float64[Tensor, "s s"]:
        return self.make_metric() if self.metric is None else self.metric

    @cached_property
    def _same_block(self) -> Bool[Tensor, "s s"]:
        block = torch.arange(self.num_draws, device=self._metric.device) // self.drawing.draws_per_block
        return block[:, None] == block[None, :]

    def _block_scale(self) -> int:
        """From the mean over all pairs of blocks (or all blocks) to products of single block means."""
        return self.num_blocks**2 if self.pair_blocks else self.num_blocks

    def _by_block(self, features: Float[Tensor, "n c s"]) -> Float[Tensor, "n r c b"]:
        return features.unflatten(2, (self.num_blocks, -1)).transpose(1, 2)

    def _factored(self, rows: Rows) -> Factored:
        features = rows["differences"].transpose(1, 2)
        metric = self._metric * self._block_scale()
        together = torch.where(self._same_block, metric, 0.0).to(features.dtype)
        apart = torch.where(self._same_block, 0.0, metric).to(features.dtype) if self.pair_blocks else None
        return Factored(
            right=self._by_block(features),
            together=self._by_block(features @ together),
            apart=None if apart is None else self._by_block(features @ apart),
        )

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, *, by_block: bool) -> BlockSums:
        first = rows["differences"]
        shape = meeting.shape(len(first), len(others["differences"]), first.shape[2])
        sums = empty_sums(shape, self.num_blocks, pair_blocks=self.pair_blocks, by_block=by_block, device=first.device)
        add_factored_(sums, self._factored(rows), self._factored(others), meeting)
        return sums

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "..."]:
        left = rows["differences"].transpose(1, 2).double()
        right = self._by_block(others["differences"].transpose(1, 2).double())
        metric = self._metric * self._block_scale()
        size = self.drawing.draws_per_block
        products = []
        for r in range(self.num_blocks):
            block = slice(r * size, (r + 1) * size)
            mixed = self._by_block(left[:, :, block] @ metric[block])
            partners = range(self.num_blocks) if self.pair_blocks else (r,)
            products.append(torch.stack([meeting.outputs(mixed[:, q], right[:, q]) for q in partners]))
        stacked = torch.stack(products)
        return stacked if self.pair_blocks else stacked[:, 0]

    def changed(self, rows: Rows) -> Bool[Tensor, " n"]:
        return rows["differences"].flatten(1).ne(0).any(1)
