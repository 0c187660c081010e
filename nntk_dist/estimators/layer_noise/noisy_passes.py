"""One draw of the estimator `activation` on a batch: noise, forward passes with it, and what they leave behind.

Under a draw σ = (γ/√2)·U^{1/P}, one U for all layers. Pre-activations of the plan's noisy layers are shifted by σ times
their part of a standard normal matrix (`nntk_dist.layers.noise`). Each example has its own noise: a function of (seed,
draw, example id, layer, unit). Parameters in weight space move by σ n, n the normals of the drawing, the same for all
examples. Antithetic draws change the sign of both. If the drawing has a scale d for each tensor (z = D u), H̃ D replaces
H̃ in the noise, q stands for q D⁻¹, weights move by σ D n, and n stands for D⁻¹ n. Nothing is averaged or multiplied
here.

Axes: n examples, s draws, c outputs, k basis vectors, i inputs and u units of a layer, p parameters in weight space.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.layers.noise import NoiseSite, Shift, as_output, layer_vectors, shifted_outputs, span_basis
from nntk_dist.layers.noise_plan import NoisePlan
from nntk_dist.models.evaluation import Evaluator
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream

MOST_GROUPS = 1 << 16  # the counter of an example's noise has 16 bits for the draw
# Draws of a small batch share a forward pass, up to this many numbers of inputs and noise.
_STACK_ELEMENTS = 1 << 21
_SLICE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class NoisyPass:
    """What one forward pass under some draws leaves behind.

    Attributes:
        outputs: f(noisy).
        directions: q of every noisy layer.
        noise: η of every noisy layer.
        readout: h̃ of the readout; None without one.
        sigma: σ of the draws.
        weights: n of the parameters in weight space; None without any.
    """

    outputs: Float[Tensor, "s n c"]
    directions: Mapping[str, Float[Tensor, "n s k i"]]
    noise: Mapping[str, Float[Tensor, "n s k u"]]
    readout: Float[Tensor, "n s i"] | None
    sigma: Float[Tensor, " s"]
    weights: Float[Tensor, "s p"] | None


def part_of(passed: NoisyPass, plan: NoisePlan, own: NoisePlan, space: ParameterSpace) -> NoisyPass:
    """Return what a pass leaves behind for a part of the plan that it was made with.

    Args:
        passed: the pass.
        plan: its plan.
        own: `NoisePlan.only` of that.
        space: the parameters that move.
    """
    whole = {each.module: each for each in plan.noisy}
    directions, readout, weights = {}, None, None
    for each in own.noisy:
        columns = whole[each.module].columns_of([name for _, name in each.site.parameters])
        directions[each.module] = passed.directions[each.module][..., columns]
    if own.readout is not None and plan.readout is not None and passed.readout is not None:
        readout = passed.readout[..., plan.readout.columns_of([name for _, name in own.readout.site.parameters])]
    if own.weight_space and passed.weights is not None:
        sizes = dict(zip(space.names, space.sizes, strict=True))
        parts = passed.weights.split([sizes[name] for name in plan.weight_space], dim=1)
        kept = [part for name, part in zip(plan.weight_space, parts, strict=True) if name in own.weight_space]
        weights = torch.cat(kept, dim=1)
    return NoisyPass(passed.outputs, directions, passed.noise, readout, passed.sigma, weights)


def joined(passes: Sequence[NoisyPass]) -> NoisyPass:
    """Join passes into one."""

    def by_layer(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {path: torch.cat([part[path] for part in parts], dim=1) for path in parts[0]}

    def along(axis: int, parts: Sequence[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present, dim=axis) if present else None

    return NoisyPass(
        torch.cat([each.outputs for each in passes]),
        by_layer([each.directions for each in passes]),
        by_layer([each.noise for each in passes]),
        along(1, [each.readout for each in passes]),
        torch.cat([each.sigma for each in passes]),
        along(0, [each.weights for each in passes]),
    )


@dataclass(frozen=True)
class NoisyDraws:
    """The draws of a plan for a prepared model.

    Attributes:
        evaluator: Calls the model with given parameters.
        plan: Which layers have noise, and which parameters move in weight space.
        drawing: The draws.
    """

    evaluator: Evaluator
    plan: NoisePlan
    drawing: Drawing

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.evaluator.model.parameters()).dtype

    def stacks(self, block: range, x: Tensor) -> Iterator[range]:
        """Yield the draws to evaluate together.

        They are as many as fit, the same number in every chunk of draws; for a random model they are one group, whose
        draws share its noise.
        """
        if self.evaluator.is_random:
            yield from (members for _, members in self.drawing.by_group(block))
            return
        noise = sum(each.num_noise + each.rank * each.width for each in self.plan.noisy)
        fitting = max(1, _STACK_ELEMENTS // (x.numel() + len(x) * noise + self.num_weight_space))
        step = max(count for count in range(1, len(block) + 1) if len(block) % count == 0 and count <= fitting)
        for start in range(block.start, block.stop, step):
            yield range(start, start + step)

    def evaluate(self, x: Tensor, ids: Tensor, draws: range) -> NoisyPass:
        """Evaluate all examples under some draws: in one forward pass, or one for each draw if weights move."""
        sigma, noise = self._sigma(draws, x.device), self._noise(ids, draws)
        if not self.plan.weight_space:
            return self._forward(x, noise, sigma, None)
        moves = self._weight_moves(draws, x.device)
        weights = moves / self._weight_scale(x.device) ** 2
        passes = []
        for s in range(len(draws)):
            one = {path: part[:, s : s + 1] for path, part in noise.items()}
            passed = self._forward(x, one, sigma[s : s + 1], self._moved(sigma[s] * moves[s]))
            passes.append(replace(passed, weights=weights[s : s + 1]))
        return joined(passes)

    def _forward(
        self,
        x: Tensor,
        noise: Mapping[str, Float[Tensor, "n s k u"]],
        sigma: Float[Tensor, " s"],
        parameters: Mapping[str, Tensor] | None,
    ) -> NoisyPass:
        """Run one forward pass, draw by draw along the rows of its batch."""
        model, count = self.evaluator.model, len(sigma)
        directions: dict[str, Tensor] = {}
        readout: list[Tensor] = []
        sigma_rows = sigma.repeat_interleave(len(x))[:, None, None]

        def by_example(values: Tensor) -> Tensor:
            return values.unflatten(0, (count, len(x))).transpose(0, 1)

        def noisy(each: NoiseSite) -> Shift:
            module, scale = model.get_submodule(each.module), self.layer_scale(each, x.device)
            normals = noise[each.module].transpose(0, 1).flatten(0, 1)

            def shift(h: Tensor, out: Tensor) -> Tensor:
                basis, coordinates = span_basis(layer_vectors(module, each.site, h) * scale)
                directions[each.module] = by_example(basis / scale)
                return as_output(module, sigma_rows * (coordinates @ normals), out)

            return shift

        shifts = {each.module: noisy(each) for each in self.plan.noisy}
        if self.plan.readout is not None:
            site, last = self.plan.readout.site, model.get_submodule(self.plan.readout.module)

            def keep(h: Tensor, out: Tensor) -> None:
                readout.append(by_example(layer_vectors(last, site, h)[:, 0]))

            shifts[site.module] = keep
        values = shifted_outputs(model, x.repeat(count, *[1] * (x.ndim - 1)), parameters or {}, shifts)
        outputs = values.unflatten(0, (count, len(x)))
        return NoisyPass(outputs, directions, noise, readout[0] if readout else None, sigma, None)

    def noise_of(self, ids: Tensor, draws: range) -> tuple[Float[Tensor, " s"], dict[str, Float[Tensor, "n s k u"]]]:
        """Return σ and the noise of some draws."""
        return self._sigma(draws, ids.device), self._noise(ids, draws)

    def moves_of(
        self, draws: range, sigma: Float[Tensor, " s"]
    ) -> tuple[Float[Tensor, "s p"] | None, list[dict[str, Tensor]] | None]:
        """Return n, and the moved parameters of weight space under each draw; None if nothing moves there."""
        if not self.plan.weight_space:
            return None, None
        moves = self._weight_moves(draws, sigma.device)
        return moves / self._weight_scale(sigma.device) ** 2, [
            self._moved(s * move) for s, move in zip(sigma, moves, strict=True)
        ]

    def pilot(self, ids: Tensor, count: int) -> tuple[Float[Tensor, " s"], dict[str, Float[Tensor, "n s k u"]]]:
        """Return σ and the noise of pilot draws, whose random numbers no other draw has."""
        draws = range(count)
        return self._sigma(draws, ids.device), self._noise(ids, draws, Stream.PILOT)

    def _sigma(self, draws: range, device: torch.device) -> Float[Tensor, " s"]:
        """Return (γ/√2)·U^{1/P}."""
        scale = self.drawing.distribution.gamma / math.sqrt(2.0)
        return (scale * self.drawing.shrinkage(draws, device=device)).to(self._dtype)

    def _noise(self, ids: Tensor, draws: range, stream: Stream = Stream.EXAMPLE) -> dict[str, Float[Tensor, "n s k u"]]:
        """Return η of every noisy layer, a function of seed, draw, example id, layer and unit."""
        number = torch.arange(draws.start, draws.stop, dtype=torch.int64, device=ids.device).repeat(len(ids))
        group, member = number // self.drawing.group_size, number % self.drawing.group_size
        counts = [each.num_noise for each in self.plan.noisy]
        keys, seed = ids.repeat_interleave(len(draws)), self.drawing.seed
        values = normal(seed, stream, keys, 0, sum(counts), draw=group, dtype=self._dtype)
        values *= 1 - 2 * member[:, None]
        parts = zip(self.plan.noisy, values.unflatten(0, (len(ids), len(draws))).split(counts, dim=2), strict=True)
        return {each.module: part.unflatten(2, (each.rank, each.units)) for each, part in parts}

    @property
    def _intervals(self) -> list[tuple[int, int]]:
        """Positions of the parameters in weight space within the vector of all parameters; neighbours are merged."""
        space = self.evaluator.space
        merged: list[tuple[int, int]] = []
        for name, size, stop in zip(space.names, space.sizes, accumulate(space.sizes), strict=True):
            if name in self.plan.weight_space:
                start = merged.pop()[0] if merged and merged[-1][1] == stop - size else stop - size
                merged.append((start, stop))
        return merged

    @property
    def num_weight_space(self) -> int:
        """The number of parameters that move in weight space."""
        return sum(stop - start for start, stop in self._intervals)

    def _scale_of(self, name: str) -> float:
        return self.drawing.scales[self.evaluator.space.names.index(name)] if self.drawing.scales else 1.0

    def layer_scale(self, each: NoiseSite, device: torch.device) -> Float[Tensor, " i"]:
        """Return D of a layer's weight, for every input, and of its bias."""
        widths = {"weight": each.width - ("bias" in each.site.attributes), "bias": 1}
        values = [self._scale_of(name) for attribute, name in each.site.parameters for _ in range(widths[attribute])]
        return torch.tensor(values, dtype=self._dtype, device=device)

    def _weight_scale(self, device: torch.device) -> Float[Tensor, " p"]:
        """Return D of the parameters in weight space."""
        sizes = dict(zip(self.evaluator.space.names, self.evaluator.space.sizes, strict=True))
        parts = [torch.full((sizes[name],), self._scale_of(name), dtype=self._dtype) for name in self.plan.weight_space]
        return torch.cat([torch.empty(0, dtype=self._dtype), *parts]).to(device)

    def _weight_moves(self, draws: range, device: torch.device) -> Float[Tensor, "s p"]:
        """Return D n of the parameters in weight space."""
        parts = [
            self.drawing.perturbations(draws, start, stop, dtype=self._dtype, device=device)
            for start, stop in self._intervals
        ]
        return torch.cat(parts, dim=1) * (math.sqrt(2.0) / self.drawing.distribution.gamma)

    def _moved(self, move: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """Return θ + σ D n of the parameters in weight space."""
        base = self.evaluator.space.values(self.evaluator.model)
        parts = move.split([base[name].numel() for name in self.plan.weight_space])
        named = zip(self.plan.weight_space, parts, strict=True)
        return {name: base[name] + part.reshape(base[name].shape) for name, part in named}

    @cached_property
    def weight_metric(self) -> Float64[Tensor, "s s"]:
        """⟨n_s, n_t⟩ over the square of a block's draws; 2·S² operations for each parameter in weight space."""
        device, draws = next(self.evaluator.model.parameters()).device, range(self.drawing.num_draws)
        scales = self._weight_scale(device).double()
        position = 0
        result = torch.zeros(len(draws), len(draws), dtype=torch.float64, device=device)
        width = max(1, _SLICE_ELEMENTS // len(draws))
        for start, stop in self._intervals:
            for first in range(start, stop, width):
                last = min(first + width, stop)
                part = self.drawing.perturbations(draws, first, last, dtype=torch.float64, device=device)
                part /= scales[position : position + last - first].square()
                position += last - first
                result.addmm_(part, part.T)
        return result * (2.0 / self.drawing.distribution.gamma**2 / self.drawing.draws_per_block**2)
