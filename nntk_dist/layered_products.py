"""Block products of gradients in layers: outer products δ ⊗ h̃ that are never formed, ⟨h̃, h̃'⟩⟨δ, δ'⟩ a pair of draws.

Many pairs of draws share a matrix product. A layer whose inputs are the same under every draw is not for this room:
its pairs are those of mean gradients (`Layered.shared`). No models, no randomness.

Axes: n rows, s/t draws, r/R blocks, c outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.block_sums import BlockSums, Meeting

# Numbers of the products of one draw with several (2 MiB in float32, about a core's cache); three are held at a time.
PRODUCT_ELEMENTS = 1 << 19

Partner = tuple[Float[Tensor, "t n2 _"], Float[Tensor, "t n2 c _"]]


@dataclass(frozen=True)
class Layered:
    """Outer-product features of one row set: for every layer its inputs h̃ and its output gradients δ, draw by draw.

    Layers with `weights` hold slopes (`nntk_dist.slopes`): theirs is ⟨δ, w_st ⊙ δ'⟩ for a pair of draws, and only pairs
    of draws have them.
    """

    inputs: tuple[Float[Tensor, "n s _"], ...]
    gradients: tuple[Float[Tensor, "n s c _"], ...]
    weights: tuple[Float[Tensor, "s t _"] | None, ...]

    @property
    def num_draws(self) -> int:
        return self.inputs[0].shape[1]

    @property
    def num_outputs(self) -> int:
        return self.gradients[0].shape[2]

    def double(self) -> "Layered":
        inputs, gradients = (tuple(part.double() for part in parts) for parts in (self.inputs, self.gradients))
        return Layered(inputs, gradients, tuple(None if w is None else w.double() for w in self.weights))

    def partners(self, draws: range) -> list[Partner]:
        """Some draws of every layer, draws first."""
        chosen = slice(draws.start, draws.stop)
        return [
            (h[:, chosen].transpose(0, 1).contiguous(), delta[:, chosen].transpose(0, 1).contiguous())
            for h, delta in zip(self.inputs, self.gradients, strict=True)
        ]


def draw_products(rows: Layered, columns: Layered, s: int, t: int, meeting: Meeting) -> Tensor:
    """⟨g_s(x), g_t(x')⟩ of two draws, summed over the layers."""
    total: Tensor | None = None
    for h, delta, h2, delta2 in zip(rows.inputs, rows.gradients, columns.inputs, columns.gradients, strict=True):
        product = meeting.outputs(delta[:, s], delta2[:, t])
        product *= meeting.shared(h[:, s], h2[:, t], rows.num_outputs)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def add_layered_(sums: BlockSums, rows: Layered, columns: Layered, meeting: Meeting) -> None:
    """Add the block products of layered features, S² (pairing "blocks") or S products of the layers' widths."""
    size = rows.num_draws // sums.num_blocks
    if sums.between is None:
        for s in range(rows.num_draws):
            product = draw_products(rows, columns, s, s, meeting).div_(size)
            sums.within += product
            if sums.by_block is not None:
                sums.by_block[s // size] += product
        return
    step = max(1, PRODUCT_ELEMENTS // sums.within.numel())
    for start in range(0, rows.num_draws, step):
        draws = range(start, min(start + step, rows.num_draws))
        partners = columns.partners(draws)
        for s in range(rows.num_draws):
            products = _products_with(rows, s, draws, partners, meeting)
            _add_pairs_(sums, products, s // size, [t // size for t in draws], 1.0 / size**2)


def _add_pairs_(
    sums: BlockSums, products: Float[Tensor, "t *tile"], block: int, others: Sequence[int], factor: float
) -> None:
    """Add `factor` times the products of one draw with several, whose blocks ascend."""
    assert sums.between is not None
    for other in dict.fromkeys(others):
        first, count = others.index(other), others.count(other)
        # One product is added as it is, in float64 all the same: a sum would copy it twice.
        total = products[first] if count == 1 else products[first : first + count].sum(0, dtype=torch.float64)
        if block == other:
            sums.within.add_(total, alpha=factor)
            continue
        sums.between.add_(total, alpha=factor)
        if sums.by_block is not None:
            sums.by_block[block].add_(total, alpha=0.5 * factor)
            sums.by_block[other].add_(total, alpha=0.5 * factor)


def _products_with(
    rows: Layered, s: int, draws: range, partners: Sequence[Partner], meeting: Meeting
) -> Float[Tensor, "t *tile"]:
    """⟨g_s(x), g_t(x')⟩ of one draw with several: to the rows, partners are so many more columns."""
    count = len(draws)
    total: Tensor | None = None
    for h, delta, weights, (h2, delta2) in zip(rows.inputs, rows.gradients, rows.weights, partners, strict=True):
        h, delta = h[:, s], delta[:, s]
        if weights is not None:
            delta2 = delta2 * weights[s, draws.start : draws.stop, None, None]
        if meeting.paired:
            h, delta = h.repeat(count, 1), delta.repeat(count, 1, 1)
        product = meeting.outputs(delta, delta2.flatten(0, 1))
        product *= meeting.shared(h, h2.flatten(0, 1), rows.num_outputs)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total.unflatten(0, (count, -1)) if meeting.paired else total.unflatten(1, (count, -1)).transpose(0, 1)


def layered_products(
    rows: Layered, columns: Layered, meeting: Meeting, num_blocks: int, *, pair_blocks: bool
) -> Float64[Tensor, "r ..."]:
    """H_rr' of layered features for all pairs of blocks, (R, R, *tile), or (R, *tile) of each draw with itself.

    Float64, one draw of the rows at a time: for few entries.
    """
    size, everything = rows.num_draws // num_blocks, range(rows.num_draws)
    rows, columns = rows.double(), columns.double()
    if not pair_blocks:
        own = torch.stack([draw_products(rows, columns, s, s, meeting) for s in everything])
        return own.unflatten(0, (num_blocks, size)).mean(1)
    partners = columns.partners(everything)
    total: Tensor | None = None
    for s in everything:
        products = _products_with(rows, s, everything, partners, meeting).unflatten(0, (num_blocks, size)).mean(1)
        if total is None:
            total = products.new_zeros(num_blocks, *products.shape)
        total[s // size].add_(products, alpha=1.0 / size)
    assert total is not None
    return total
