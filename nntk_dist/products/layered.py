"""Block products of gradients in layers: outer products δ ⊗ h̃ that are never formed; ⟨h̃, h̃'⟩⟨δ, δ'⟩ a pair of draws.

Layers whose inputs no draw changes are not treated here: their pairs are pairs of mean gradients (`formed`). No models,
no randomness.

Axes: n rows, s/t draws, r/R blocks, c outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.products.block_sums import BETWEEN, WITHIN, Meeting, Sum, block
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import Inputs, WeightedProduct

Partner = tuple[Float[Tensor, "t n2 _"], Float[Tensor, "t n2 c _"]]


@dataclass(frozen=True)
class Layered:
    """Outer-product features of one row set, draw by draw.

    Attributes:
        inputs: For each layer its inputs h̃.
        gradients: For each layer its output gradients δ.
        weights: For each layer None, or w if it holds derivatives (`nntk_dist.layers.penultimate`): a pair of draws
            then has ⟨δ, w_st ⊙ δ'⟩. Only paired blocks have weights.
    """

    inputs: tuple[Float[Tensor, "n s _"], ...]
    gradients: tuple[Float[Tensor, "n s c _"], ...]
    weights: tuple[Float[Tensor, "s t _"] | None, ...]

    @property
    def num_draws(self) -> int:
        """S, the number of draws."""
        return self.inputs[0].shape[1]

    def double(self) -> "Layered":
        """Return the features in float64."""
        inputs, gradients = (tuple(part.double() for part in parts) for parts in (self.inputs, self.gradients))
        return Layered(inputs, gradients, tuple(None if w is None else w.double() for w in self.weights))

    def partners(self) -> list[Partner]:
        """Return every layer with draws first."""
        return [
            (h.transpose(0, 1).contiguous(), delta.transpose(0, 1).contiguous())
            for h, delta in zip(self.inputs, self.gradients, strict=True)
        ]


def layered_weighted_products(
    rows: Layered, columns: Layered, num_blocks: int, wanted: Wanted, *, pair_blocks: bool
) -> list[WeightedProduct]:
    """Return the products of every pair of draws, or of each draw with itself, layer by layer."""
    size, draws = rows.num_draws // num_blocks, range(rows.num_draws)
    pairs = list(product(draws, draws)) if pair_blocks else [(s, s) for s in draws]
    of_blocks = {
        (r, q): _factors(r, q, size, wanted, pair_blocks=pair_blocks) for r, q in product(range(num_blocks), repeat=2)
    }
    products = []
    for h, delta, weights, h2, delta2 in zip(
        rows.inputs, rows.gradients, rows.weights, columns.inputs, columns.gradients, strict=True
    ):
        inputs, others = h.unbind(1), h2.unbind(1)  # one view for all pairs of a draw
        left, right = delta.split(1, 1), delta2.split(1, 1)
        products += [
            WeightedProduct(
                left[s],
                right[t],
                of_blocks[s // size, t // size],
                None if weights is None else weights[s, t, None, None],
                Inputs(inputs[s], others[t]),
            )
            for s, t in pairs
        ]
    return products


def _factors(r: int, q: int, size: int, wanted: Wanted, *, pair_blocks: bool) -> dict[Sum, float]:
    """Return how often a product of draws of two blocks of `size` draws is in each sum."""
    if not pair_blocks:
        return {WITHIN: 1.0 / size} | ({block(r): 1.0 / size} if wanted.stderr else {})
    share = 1.0 / size**2
    if r == q:
        return {WITHIN: share}
    return {BETWEEN: share} | (dict.fromkeys((block(r), block(q)), 0.5 * share) if wanted.stderr else {})


def draw_products(rows: Layered, columns: Layered, s: int, t: int, meeting: Meeting) -> Tensor:
    """Return ⟨g_s(x), g_t(x')⟩ of two draws, summed over the layers."""
    total: Tensor | None = None
    for h, delta, h2, delta2 in zip(rows.inputs, rows.gradients, columns.inputs, columns.gradients, strict=True):
        product = meeting.outputs(delta[:, s], delta2[:, t])
        product = meeting.multiply_shared_(product, h[:, s], h2[:, t])
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _products_with(rows: Layered, s: int, partners: Sequence[Partner], meeting: Meeting) -> Float[Tensor, "t *tile"]:
    """Return ⟨g_s(x), g_t(x')⟩ of one draw with all: draws of the columns are taken as further columns."""
    count = rows.num_draws
    total: Tensor | None = None
    for h, delta, weights, (h2, delta2) in zip(rows.inputs, rows.gradients, rows.weights, partners, strict=True):
        h, delta = h[:, s], delta[:, s]
        if weights is not None:
            delta2 = delta2 * weights[s, :, None, None]
        if meeting.paired:
            h, delta = h.repeat(count, 1), delta.repeat(count, 1, 1)
        product = meeting.outputs(delta, delta2.flatten(0, 1))
        product = meeting.multiply_shared_(product, h, h2.flatten(0, 1))
        total = product if total is None else total.add_(product)
    assert total is not None
    return total.unflatten(0, (count, -1)) if meeting.paired else total.unflatten(1, (count, -1)).transpose(0, 1)


def layered_block_products(
    rows: Layered, columns: Layered, meeting: Meeting, num_blocks: int, *, pair_blocks: bool
) -> Float64[Tensor, "r ..."]:
    """Return H_rr' of layered features, (R, R, *tile), or (R, *tile) of each draw with itself.

    In float64, one draw of the rows at a time: for few entries.
    """
    size, everything = rows.num_draws // num_blocks, range(rows.num_draws)
    rows, columns = rows.double(), columns.double()
    if not pair_blocks:
        own = torch.stack([draw_products(rows, columns, s, s, meeting) for s in everything])
        return own.unflatten(0, (num_blocks, size)).mean(1)
    partners = columns.partners()
    total: Tensor | None = None
    for s in everything:
        products = _products_with(rows, s, partners, meeting).unflatten(0, (num_blocks, size)).mean(1)
        if total is None:
            total = products.new_zeros(num_blocks, *products.shape)
        total[s // size].add_(products, alpha=1.0 / size)
    assert total is not None
    return total
