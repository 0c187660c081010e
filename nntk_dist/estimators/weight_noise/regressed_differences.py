"""The estimator `weight` with a linear control variate that is fitted on other blocks: for anything, of few parameters.

Δ ≈ a + b·z is fitted by ridge regression, and b·z, whose nonlocal gradient is b, is a control variate. For the product
of two blocks r and r', it is fitted on all blocks but these two, so that it is independent of both:

    H_rr' = ⟨g_r, g_r'⟩,   g_r = mean_r((Δ − a − b·z) v) + b,

has the mean ⟨g, g'⟩ for every r ≠ r'. With the weights w of v = w z the fit needs nothing but block means: with
z̃ = (z, c) and ỹ_r = mean_r(w Δ z̃), G_r = mean_r(w z̃ z̃ᵀ), of mean 1 on parameters, and Ḡ, ȳ means over other blocks

    (b, a/c) = (Ḡ + λ)⁻¹ ȳ,   g_r = ỹ_r − (G_r − 1)(b, a/c)   on the P parameters.

`plugin` is the product of ĝ = mean_r g_r, each fitted on all blocks but r. The error falls by the share of the variance
of Δ that is linear, less about P/S of the rest. Control variates by regression are classical (Glasserman, Monte Carlo
Methods in Financial Engineering, 2003, section 4.1); their use for a U-statistic is the project's own. If z = D u is
scaled, the fit is made in u.

Axes: n rows, s draws, r/q blocks, c outputs, k parameters and one, P parameters, w ordered pairs of blocks.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.products.block_sums import BETWEEN, WITHIN, BlockSums, Meeting, block, empty_sums
from nntk_dist.products.feature_description import FeatureCosts
from nntk_dist.products.features import Rows
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import WeightedProduct, add_products_
from nntk_dist.sampling.draws import draw_chunks


@dataclass(frozen=True)
class RegressedMeans(DifferenceMeans):
    """Block means of w Δ z̃, (n, r, c, k), and their products.

    Attributes:
        ridge: λ in units of P/N, N the draws of the fit.
    """

    ridge: float = 1.0

    @property
    def num_moments(self) -> int:
        """P + 1."""
        return self.num_parameters + 1

    def vectors(self, z: Float[Tensor, "s P"]) -> Float64[Tensor, "s k"]:
        """Return the directions v, and the weight of the constant."""
        directions = self.drawing.directions(z)
        return torch.cat([directions, self._constant * self._weights(directions, z)[:, None]], dim=1)

    @property
    def _constant(self) -> float:
        """The constant c = γ/√2, as large as a coordinate of u."""
        return self.drawing.distribution.gamma / 2.0**0.5

    @cached_property
    def _scale(self) -> Float64[Tensor, " P"]:
        """D."""
        device = next(self.evaluator.model.parameters()).device
        space, scales = self.evaluator.space, self.drawing.scales
        parts = torch.tensor(scales or (1.0,) * len(space.names), dtype=torch.float64, device=device)
        return parts.repeat_interleave(torch.tensor(space.sizes, device=device))

    def _weights(self, directions: Float64[Tensor, "s P"], z: Float[Tensor, "s P"]) -> Float64[Tensor, " s"]:
        """The weights w of D v = w u."""
        return (directions * self._scale).norm(dim=1) / (z.double() / self._scale).norm(dim=1)

    @cached_property
    def _moments(self) -> Float64[Tensor, "r k k"]:
        """G_r."""
        parameter = next(self.evaluator.model.parameters())
        size, count = self.drawing.draws_per_block, self.num_moments
        result = torch.zeros(self.num_blocks, count, count, dtype=torch.float64, device=parameter.device)
        for index, total in enumerate(result):
            members = range(index * size, (index + 1) * size)
            for draws in draw_chunks(members, self.num_parameters, self.drawing.group_size):
                z = self.drawing.perturbations(draws, dtype=parameter.dtype, device=parameter.device)
                u = z.double() / self._scale
                regressors = torch.cat([u, torch.full_like(u[:, :1], self._constant)], dim=1)
                weights = self._weights(self.drawing.directions(z), z)
                total += (regressors * weights[:, None]).T @ regressors
        return result / size

    def _fit(self, left_out: tuple[int, ...], one: int) -> Float64[Tensor, "P k"]:
        """(G_r − 1)(Ḡ + λ)⁻¹, with which ȳ of the other blocks is subtracted from ỹ_r."""
        others = [r for r in range(self.num_blocks) if r not in left_out]
        normal = self._moments[others].mean(0)
        penalty = self.ridge * self.num_parameters / (len(others) * self.drawing.draws_per_block)
        normal.diagonal()[:-1].add_(penalty)
        deviation = self._moments[one][:-1].clone()
        deviation.diagonal().sub_(1.0)
        return torch.linalg.solve(normal, deviation.T).T

    @cached_property
    def _pair_fits(self) -> Float64[Tensor, "r q P k"]:
        """The fits of g_r for all pairs; 0 for a block with itself."""
        blocks = range(self.num_blocks)
        zero = torch.zeros_like(self._moments[0][:-1])
        return torch.stack([torch.stack([self._fit((r, q), r) if r != q else zero for q in blocks]) for r in blocks])

    @cached_property
    def _single_fits(self) -> Float64[Tensor, "r P k"]:
        return torch.stack([self._fit((r,), r) for r in range(self.num_blocks)])

    def pair_gradients(self, dense: Float[Tensor, "n r c k"]) -> Float64[Tensor, "n r q c P"]:
        """Return g_r for each pair of blocks (r, r'), 0 for a block with itself.

        Args:
            dense: the block means.
        """
        means, total = self._in_units(dense), self._in_units(dense).sum(1)
        result = means.new_zeros(len(dense), self.num_blocks, *means.shape[1:3], self.num_parameters)
        for r in range(self.num_blocks):
            for q in range(self.num_blocks):
                if r != q:
                    others = (total - means[:, r] - means[:, q]) / (self.num_blocks - 2)
                    result[:, r, q] = means[:, r, :, :-1] - others @ self._pair_fits[r, q].T
        return result / self._scale

    def mean_gradient(self, dense: Float[Tensor, "n r c k"]) -> Float64[Tensor, "n c P"]:
        """Return ĝ.

        Args:
            dense: the block means.
        """
        means = self._in_units(dense)
        others = (means.sum(1, keepdim=True) - means) / (self.num_blocks - 1)
        fitted = torch.einsum("nrck,rpk->nrcp", others, self._single_fits)
        return (means[..., :-1] - fitted).mean(1) / self._scale

    def _in_units(self, dense: Float[Tensor, "n r c k"]) -> Float64[Tensor, "n r c k"]:
        """The block means in u: v is D⁻¹ w u."""
        return dense.double() * torch.cat([self._scale, self._scale.new_ones(1)])

    # Products ---------------------------------------------------------------------------------------------------------

    def costs(self, meeting: Meeting, wanted: Wanted) -> FeatureCosts:
        """Return the costs: R products of length P for each block, 2 R with standard errors."""
        blocks, outputs = self.num_blocks, len(self.columns)
        length = (blocks**2 * (2.0 if wanted.stderr else 1.0) + 1.0) * outputs * self.num_parameters
        return FeatureCosts(
            entry_operations=2.0 * length * meeting.width(outputs),
            passes_per_draw=self.difference_passes(),
            held_bytes=8 * (blocks**2 + 2 * blocks) * self.num_moments**2,
            prepared_share=blocks + 1.0 / blocks,
            copies_sample=True,
        )

    def prepare(self, rows: Rows, wanted: Wanted) -> dict[str, Tensor]:
        """Make the gradients of all pairs of blocks, and note which outputs changed in each block."""
        if "dense" not in rows:
            return dict(rows)
        dense, changed = rows["dense"], self.changed(rows)
        pairs, mean = self.pair_gradients(dense), self.mean_gradient(dense)[:, None]
        return {"pairs": pairs.to(dense.dtype), "mean": mean.to(dense.dtype), "changed": changed}

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        """Sum the block products of one tile, and note which entries are resolved."""
        rows, others = (self.prepare(part, wanted) for part in (rows, others))
        left, right, blocks = rows["pairs"], others["pairs"], self.num_blocks
        shape = meeting.shape(len(left), len(right), left.shape[3])
        sums = empty_sums(shape, blocks, wanted, pair_blocks=True, device=left.device)
        products = [WeightedProduct(rows["mean"], others["mean"], {WITHIN: float(blocks**2)})]
        if wanted.stderr:
            for r in range(blocks):
                factors = {WITHIN: -0.5, BETWEEN: 0.5, block(r): 0.5}
                products += [
                    WeightedProduct(left[:, r], right[:, :, r], factors),
                    WeightedProduct(left[:, :, r], right[:, r], factors),
                ]
        else:
            all_pairs = left.flatten(1, 2), right.transpose(1, 2).flatten(1, 2)
            products.append(WeightedProduct(*all_pairs, {WITHIN: -1.0, BETWEEN: 1.0}))
        add_products_(sums, products, meeting)
        sums.resolved = self.resolved(rows, others, meeting)
        return sums

    def changed(self, rows: Rows) -> Bool[Tensor, "n r c"]:
        """Return which outputs changed in each block."""
        return rows["changed"] if "changed" in rows else rows["changes"][..., 0] > 0

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "r r ..."]:
        """Return every block product of few entries, in float64; those of a block with itself give `plugin`."""
        left, right = (self.pair_gradients(part["dense"]) for part in (rows, others))
        first, second = (self.mean_gradient(part["dense"]) for part in (rows, others))
        blocks = range(self.num_blocks)
        products = torch.stack(
            [torch.stack([meeting.outputs(left[:, r, q], right[:, q, r]) for q in blocks]) for r in blocks]
        )
        rest = self.num_blocks * meeting.outputs(first, second) - products.sum((0, 1)) / self.num_blocks
        for r in blocks:
            products[r, r] = rest
        return products
