"""Low-rank perturbations of Linear layers without their weights: one matrix product with W for all draws at once.

A layer moved by A·Bᵀ returns h Wᵀ + (h B) Aᵀ. The first product is made once for the rows of all draws; the second
takes r·(i + u) multiply-adds a row. So neither perturbations of length P nor perturbed weights are made, which on small
batches is most of the work. The result equals the perturbed model's to rounding; this is tried before it is used.

Axes: s draws, n examples, t positions, i/u inputs and units of a layer, r rank, c outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import Unavailable
from nntk_dist.layers.hooks import AfterHook, hooked
from nntk_dist.models.evaluation import Evaluator, draws_at_once, in_float64, outputs
from nntk_dist.models.parameters import aliases
from nntk_dist.runtime.batches import in_batches
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.laws import LowRank

DrawFactors = tuple[Float[Tensor, "s u r"], Float[Tensor, "s i r"] | None]
_EXAMPLES = 3
_AGREEMENT = 1e3  # in units of rounding, relative to the largest output


@dataclass(frozen=True)
class LowRankPasses:
    """Perturbed passes of a model whose selected parameters all belong to Linear layers."""

    evaluator: Evaluator
    drawing: Drawing

    @property
    def numbers_of_a_draw(self) -> int:
        """The number of entries in a draw's factors."""
        assert isinstance(self.drawing.distribution, LowRank)
        rank = self.drawing.distribution.rank
        return sum(rank * sum(shape) if len(shape) == 2 else sum(shape) for shape in self.drawing.shapes)

    @property
    def trial_bytes(self) -> int:
        """Bytes of the trial: the model in float64 twice, and a group of perturbations twice."""
        return 8 * (2 + 2 * self.drawing.group_size) * self.drawing.num_parameters

    def perturbed(self, x: Tensor, draws: range, batch: int | None = None) -> Float[Tensor, "s n c"]:
        """Return f(x; θ + z) for whole groups of draws."""
        model, space = self.evaluator.model, self.evaluator.space
        dtype = next(model.parameters()).dtype
        factors = self.drawing.low_rank_factors(draws, dtype=dtype, device=x.device)
        named = dict(zip(space.names, factors, strict=True))
        result: Tensor | None = None
        for rows, own in in_batches(x, batch):
            step = draws_at_once(self.numbers_of_a_draw, rows)
            for start in range(0, len(draws), step):
                part = slice(start, min(start + step, len(draws)))
                values = self._pass(rows, {name: _of_draws(each, part) for name, each in named.items()}, part)
                if result is None:
                    result = values.new_empty(len(draws), len(x), values.shape[2])
                result[part, own] = values[:, : own.stop - own.start]
        assert result is not None
        return result

    def _pass(self, x: Tensor, factors: Mapping[str, DrawFactors], draws: slice) -> Float[Tensor, "s n c"]:
        """One batch under some draws, draw by draw along the rows of one pass."""
        model, count = self.evaluator.model, draws.stop - draws.start
        moved = {path: _moved(*(factors.get(name) for name in _names(path)), count=count) for path in _linears(model)}
        with hooked(model, after=moved), torch.no_grad():
            values = outputs(model, x.repeat(count, *[1] * (x.ndim - 1)))
        return values.unflatten(0, (count, len(x)))


def find_low_rank_passes(evaluator: Evaluator, drawing: Drawing, x: Tensor) -> LowRankPasses | None:
    """Return low-rank passes for a stacked evaluator and low-rank draws, or None if the model does not allow them.

    It does if every selected parameter is the weight or bias of one Linear layer, and the outputs of a few examples
    are the perturbed model's. The trial runs in float64, so that a weight's second use outside its layer is not lost in
    rounding, and with two groups of draws, so that a layer whose first axis is not the examples is found out.
    """
    if not (evaluator.stacked and isinstance(drawing.distribution, LowRank)) or evaluator.is_random:
        return None
    names = {name for path in _linears(evaluator.model) for name in _names(path)}
    groups = aliases(evaluator.model)
    if any(name not in names or len(groups[name]) > 1 for name in evaluator.space.names):
        return None
    return LowRankPasses(evaluator, drawing) if _agrees(evaluator, drawing, x[:_EXAMPLES]) else None


def _agrees(evaluator: Evaluator, drawing: Drawing, x: Tensor) -> bool:
    draws = range(min(drawing.num_draws, 2 * drawing.group_size))
    try:
        model, x = in_float64(evaluator.model, x)
    except Unavailable:
        return False
    exact = replace(evaluator, model=model)
    parts = []
    for _, members in drawing.by_group(draws):
        z = drawing.perturbations(members, dtype=torch.float64, device=x.device)
        parts.append(replace(exact, stacked=False).perturbed(x, z))
    expected = torch.cat(parts)
    try:
        difference = (LowRankPasses(exact, drawing).perturbed(x, draws) - expected).abs().max()
    except Exception as error:  # a model's code may raise anything
        if is_out_of_memory(error):
            raise
        return False  # shapes that do not allow several draws in one pass
    return bool(difference <= _AGREEMENT * torch.finfo(torch.float64).eps * expected.abs().max())


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def _names(path: str) -> tuple[str, str]:
    """Of a layer's weight and bias."""
    prefix = f"{path}." if path else ""
    return f"{prefix}weight", f"{prefix}bias"


def _of_draws(factors: DrawFactors, part: slice) -> DrawFactors:
    left, right = factors
    return left[part], None if right is None else right[part]


def _moved(weight: DrawFactors | None, bias: DrawFactors | None, *, count: int) -> AfterHook:
    """A hook that adds a layer's own part of every draw to its output."""

    def add(h: Tensor, out: Tensor) -> Tensor:
        by_draw = out.reshape(count, -1, out.shape[-1])
        if weight is not None and weight[1] is not None:
            h = h.reshape(count, by_draw.shape[1], -1)
            by_draw = torch.baddbmm(by_draw, h @ weight[1], weight[0].mT)
        if bias is not None:
            by_draw = by_draw + bias[0].mT
        return by_draw.reshape(out.shape)

    return add
