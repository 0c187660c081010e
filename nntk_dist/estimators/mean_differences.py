"""The estimator `weight` with its gradients formed: block means g_r = mean(Δ_s v_s), for few parameters.

v_s is the draw's direction (`nntk_dist.sampling.draws`), P·z_s/|z_s|² for radial laws.

Where R·P is less than S, R mean gradients of length P say the same as S differences and their S × S metric, which
soon outgrows memory. The numbers are the same to rounding; `spec` chooses. Nonlocal kernel only. With attention
the means are weighted ones, g_r = Σ_s α_s Δ_s v_s.

Axes: n rows, s draws, r blocks, c outputs, k parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.models.evaluation import Evaluator, check_finite, output_index
from nntk_dist.products.block_sums import BlockSums, Meeting, empty_sums
from nntk_dist.products.features import ArraySpec, Rows, block_range
from nntk_dist.products.formed import combined, formed_products, formed_terms
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import add_terms_
from nntk_dist.sampling.draws import Drawing, draw_chunks
from nntk_dist.weighting.attention import Attention, RunningSoftmax


@dataclass(frozen=True)
class DifferenceMeans:
    """Block means of the draws' nonlocal gradients, (n, r, c, k), in the model's dtype."""

    evaluator: Evaluator
    drawing: Drawing
    columns: tuple[int, ...]
    pair_blocks: bool = True
    shows_unresolved: bool = True
    num_sketch_groups: int = 0
    attention: Attention | None = None

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
        shape = (self.num_blocks, len(self.columns), self.num_parameters)
        return (ArraySpec("dense", ("block", "output", "parameter"), shape),)

    def outputs(self, x: Tensor, *, batch: int | None = None) -> Float[Tensor, "n c"]:
        return self.evaluator.expected(x, self.drawing.seed, batch)

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        base = self.evaluator.base(x, batch)
        check_finite(base, "the model's output")
        means = [
            self._block_mean(x, base, block, columns, batch)
            for block in block_range(draws, self.drawing.draws_per_block)
        ]
        dense = torch.stack(means, dim=1)
        check_finite(dense, f"the model's output under draws {draws.start} to {draws.stop - 1}")
        return {"dense": dense.to(base.dtype)}

    def _block_mean(
        self, x: Tensor, base: Tensor, block: int, columns: Sequence[int], batch: int | None
    ) -> Float64[Tensor, "n c k"]:
        """g_r of one block, a chunk of draws at a time, summed in float64."""
        size, numbers = self.drawing.draws_per_block, max(self.num_parameters, len(x) * base.shape[1])
        chunks = draw_chunks(range(block * size, (block + 1) * size), numbers, self.drawing.group_size)
        total = torch.zeros(len(x), len(columns), self.num_parameters, dtype=torch.float64, device=base.device)
        softmax = None if self.attention is None else RunningSoftmax(self.attention.weighting)
        for draws in chunks:
            z = self.drawing.perturbations(draws, dtype=base.dtype, device=base.device)
            for members, unmoved, moved in self.evaluator.pairs(x, base, self.drawing, draws, z, batch):
                own = z[members.start - draws.start : members.stop - draws.start]
                difference = (moved - unmoved)[:, :, output_index(columns)].double()
                if self.attention is not None and softmax is not None:
                    shrink, weights = softmax.take(self.attention.scores(members, own, unmoved, moved))
                    total *= shrink[:, None, None]
                    difference *= weights[:, :, None]
                total += torch.einsum("snc,sk->nck", difference, self.drawing.directions(own))
        return total / (size if softmax is None or softmax.mass is None else softmax.mass[:, None, None])

    def prepare(self, rows: Rows, wanted: Wanted) -> dict[str, Tensor]:
        if "dense" not in rows:
            return dict(rows)
        changed = (rows["dense"] != 0).any(3)
        return {"columns": combined(rows["dense"], wanted), "changed": changed.to(rows["dense"].dtype)}

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        rows, others = (self.prepare(part, wanted) for part in (rows, others))
        left, right = rows["columns"], others["columns"]
        shape = meeting.shape(len(left), len(right), left.shape[2])
        sums = empty_sums(shape, self.num_blocks, wanted, pair_blocks=True, device=left.device)
        add_terms_(sums, formed_terms(left, right, self.num_blocks, wanted), meeting)
        sums.resolved = _resolved(rows["changed"], others["changed"], meeting)
        return sums

    def terms(self, rows: Rows, others: Rows, wanted: Wanted) -> None:
        """None: which entries are resolved is no product."""

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "r r ..."]:
        return formed_products(rows["dense"], others["dense"], meeting)


def _resolved(rows: Float[Tensor, "n1 r c"], columns: Float[Tensor, "n2 r c"], meeting: Meeting) -> Tensor:
    """Where one example's output changed in one block and the other's in another: elsewhere products of different
    blocks are 0, and their sums, made of products that cancel, are rounding at best.
    """
    total, own = meeting.outputs(rows.sum(1)[..., None], columns.sum(1)[..., None]), None
    for r in range(rows.shape[1]):
        both = meeting.outputs(rows[:, r, :, None], columns[:, r, :, None])
        own = both if own is None else own.add_(both)
    assert own is not None
    return total > own
