"""The estimator `weight` with its gradients formed: block means g_r = mean(Δ_s v_s), for few parameters.

v_s is the draw's direction (`nntk_dist.sampling.draws`), P·z_s/|z_s|² for radial laws. If R·P < S, R mean gradients of
length P hold the same as S differences and their S × S metric, which soon exceeds the memory. The numbers are the same
to rounding. Nonlocal kernel only. With attention the means are weighted: g_r = Σ_s α_s Δ_s v_s.

Axes: n rows, s draws, r blocks, c outputs, k parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.estimators.drawn_features import DrawnFeatures
from nntk_dist.models.evaluation import check_finite, output_index
from nntk_dist.products.block_sums import BlockSums, Changes, Meeting, empty_sums
from nntk_dist.products.feature_description import ArraySpec, FeatureCosts
from nntk_dist.products.features import Rows, block_range
from nntk_dist.products.formed import (
    combined,
    formed_block_products,
    formed_weighted_products,
    products_per_block,
)
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import add_products_
from nntk_dist.sampling.draws import draw_chunks
from nntk_dist.weighting.attention import Attention, RunningSoftmax


@dataclass(frozen=True)
class DifferenceMeans(DrawnFeatures):
    """Block means of the draws' nonlocal gradients, (n, r, c, k), in the model's dtype.

    Attributes:
        attention: Weights of the draws; None weights them equally.
    """

    pair_blocks: ClassVar[bool] = True  # products pair all blocks
    zero_stderr_is_unresolved: ClassVar[bool] = True  # 0 means that no draw changed the output

    attention: Attention | None = None

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The block means, and of each output the number of draws that changed it and its largest change times |v|."""
        shape = (self.num_blocks, len(self.columns))
        return (
            ArraySpec("dense", ("block", "output", "parameter"), (*shape, self.num_moments)),
            ArraySpec("changes", ("block", "output", "change"), (*shape, 2)),
        )

    @property
    def num_moments(self) -> int:
        """The numbers of a block's mean: P."""
        return self.num_parameters

    def vectors(self, z: Float[Tensor, "s P"]) -> Float64[Tensor, "s k"]:
        """Return what differences are multiplied by: the directions of perturbations z."""
        return self.drawing.directions(z)

    def costs(self, meeting: Meeting, wanted: Wanted) -> FeatureCosts:
        """Return the costs: a product of length P for each block, and one more with standard errors."""
        blocks, outputs = self.num_blocks, len(self.columns)
        return FeatureCosts(
            entry_operations=2.0
            * products_per_block(blocks, wanted)
            * blocks
            * (outputs * self.num_parameters)
            * meeting.width(outputs),
            passes_per_draw=self.difference_passes(),
            prepared_share=products_per_block(blocks, wanted),
        )

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        """Compute the block means; see `FeatureMap.compute`."""
        base = self.evaluator.base(x, batch)
        check_finite(base, "the model's output")
        blocks = [
            self._one_block(x, base, block, columns, batch)
            for block in block_range(draws, self.drawing.draws_per_block)
        ]
        dense, changes = (torch.stack(parts, dim=1) for parts in zip(*blocks, strict=True))
        check_finite(dense, f"the model's output under draws {draws.start} to {draws.stop - 1}")
        return {"dense": dense.to(base.dtype), "changes": changes.to(base.dtype)}

    def _one_block(
        self, x: Tensor, base: Tensor, block: int, columns: Sequence[int], batch: int | None
    ) -> tuple[Float64[Tensor, "n c k"], Float64[Tensor, "n c two"]]:
        """Compute g_r and the changes of one block, a chunk of draws at a time, summed in float64."""
        size, numbers = self.drawing.draws_per_block, max(self.num_parameters, len(x) * base.shape[1])
        chunks = draw_chunks(range(block * size, (block + 1) * size), numbers, self.drawing.group_size)
        total = torch.zeros(len(x), len(columns), self.num_moments, dtype=torch.float64, device=base.device)
        counts, largest = torch.zeros_like(total[:, :, 0]), torch.zeros_like(total[:, :, 0])
        softmax = None if self.attention is None else RunningSoftmax(self.attention.weighting)
        for draws in chunks:
            z = self.drawing.perturbations(draws, dtype=base.dtype, device=base.device)
            for members, unmoved, moved in self.evaluator.pairs(x, base, self.drawing, draws, z, batch):
                own = z[members.start - draws.start : members.stop - draws.start]
                difference, directions = (
                    (moved - unmoved)[:, :, output_index(columns)].double(),
                    self.vectors(own),
                )
                counts += (difference != 0).sum(0)
                lengths = directions[:, : self.num_parameters].norm(dim=1)
                largest = (difference.abs() * lengths[:, None, None]).amax(0).maximum(largest)
                if self.attention is not None and softmax is not None:
                    shrink, weights = softmax.take(self.attention.scores(members, own, unmoved, moved))
                    total *= shrink[:, None, None]
                    difference *= weights[:, :, None]
                total += torch.einsum("snc,sk->nck", difference, directions)
        mass = size if softmax is None or softmax.mass is None else softmax.mass[:, None, None]
        return total / mass, torch.stack((counts, largest), dim=2)

    def prepare(self, rows: Rows, wanted: Wanted) -> dict[str, Tensor]:
        """Combine the blocks, and note which outputs changed in each block."""
        if "dense" not in rows:
            return dict(rows)
        return {"columns": combined(rows["dense"], wanted), "changed": self.changed(rows)}

    def changed(self, rows: Rows) -> Bool[Tensor, "n r c"]:
        """Return which outputs changed in each block."""
        return rows["changed"] if "changed" in rows else (rows["dense"] != 0).any(3)

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        """Sum the block products of one tile, and note which entries are resolved."""
        rows, others = (self.prepare(part, wanted) for part in (rows, others))
        left, right = rows["columns"], others["columns"]
        shape = meeting.shape(len(left), len(right), left.shape[2])
        sums = empty_sums(shape, self.num_blocks, wanted, pair_blocks=True, device=left.device)
        add_products_(sums, formed_weighted_products(left, right, self.num_blocks, wanted), meeting)
        sums.resolved = self.resolved(rows, others, meeting)
        return sums

    def resolved(self, rows: Rows, others: Rows, meeting: Meeting) -> Bool[Tensor, "*tile"]:
        """Return a mask of the entries whose examples changed under draws of two different blocks."""
        return meeting.in_different_blocks(self.changed(rows), self.changed(others))

    def changes(self, rows: Rows) -> Changes:
        """Return how often draws changed the outputs in each block."""
        counts, largest = rows["changes"].unbind(3)
        return Changes(counts, self.component_share() * float(largest.max()), self.num_groups)

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "r r ..."]:
        """Return every block product of few entries, in float64."""
        return formed_block_products(rows["dense"], others["dense"], meeting)
