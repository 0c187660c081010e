"""What draws of the estimator `activation` with control variates give: δ and h̃ of every layer, draw by draw.

The mathematics is in `nntk_dist.estimators.layer_noise.activation_gradients`, which makes arrays of it. Nothing is kept
or averaged here but the means over pilot draws.

Axes: n rows, s draws, c outputs, t positions of all draws, k basis vectors, i inputs and u units of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nntk_dist.estimators.layer_noise.flip_differences import NextLayer, flip_gradients
from nntk_dist.estimators.layer_noise.noisy_passes import NoisyDraws
from nntk_dist.estimators.layer_noise.smoothed_passes import SmoothedDraws, SmoothedPass, by_example
from nntk_dist.layers.flips import Flip
from nntk_dist.layers.innovations import Innovation
from nntk_dist.layers.noise import NoiseSite
from nntk_dist.models.evaluation import output_index
from nntk_dist.smoothing import PiecewiseLinear

_DIFFERENTIABLE_NUMBERS = 1 << 21  # of inputs and noise of a pilot pass


@dataclass(frozen=True)
class Pilot:
    """What the pilot draws of some examples know, for the outputs of the kernel, and what no noise changes.

    Attributes:
        mean: f̄.
        jacobians: J of every noisy layer.
        unmoved: what the activations make of the layers without noise.
    """

    mean: Float[Tensor, "n c"]
    jacobians: Mapping[str, Float[Tensor, "n c t u"]]
    unmoved: Mapping[str, Tensor]


@dataclass(frozen=True)
class Drawn:
    """One pass under some draws.

    Attributes:
        passed: the pass.
        noise: η of every noisy layer.
        residual: (f − f̄ − Σ_k J_k·(h_k − φ̃_k))/σ of the outputs `columns`.
        columns: these outputs.
        weights: n of the parameters in weight space; None without any.
        flipped: δ of the layers whose units are set to their other values.
    """

    passed: SmoothedPass
    noise: Mapping[str, Float[Tensor, "n s k u"]]
    residual: Float[Tensor, "n s c"]
    columns: Sequence[int]
    weights: Float[Tensor, "s p"] | None
    flipped: Mapping[str, Float[Tensor, "n c s u"]]


@dataclass(frozen=True)
class ReducedDraws:
    """The draws of a model whose variance is reduced.

    Attributes:
        draws: the noise.
        innovations: what follows the noisy layers.
        flips: the layers whose units are set to their other values.
        num_pilots: the pilot draws of an example.
    """

    draws: NoisyDraws
    innovations: tuple[Innovation, ...]
    flips: tuple[Flip, ...]
    num_pilots: int

    @cached_property
    def smoothed(self) -> SmoothedDraws:
        """The passes."""
        return SmoothedDraws(self.draws, self.innovations)

    def num_values(self, module: str) -> int:
        """Return how many values the units of a flipped layer have."""
        smoothing = self.smoothed.smoothings[module]
        assert isinstance(smoothing, PiecewiseLinear)
        return len(smoothing.levels)

    def pilot(self, x: Tensor, ids: Tensor, columns: Sequence[int]) -> Pilot:
        """Return f̄ and J of some examples, and their activations without noise."""
        smoothed, index, count = self.smoothed, output_index(columns), self.num_pilots
        sigma, noise = self.draws.pilot(ids, count)
        size = x.numel() + len(x) * sum(each.num_noise + each.rank * each.width for each in self.draws.plan.noisy)
        step = max(1, min(count, _DIFFERENTIABLE_NUMBERS // size))
        mean, total = x.new_zeros((), dtype=sigma.dtype), dict[str, Tensor]()
        for start in range(0, count, step):
            chosen = slice(start, min(start + step, count))
            share = (chosen.stop - chosen.start) / count
            some = {name: values[:, chosen] for name, values in noise.items()}
            passed = smoothed.evaluate(x, some, sigma[chosen], differentiable=True)
            mean = mean + share * by_example(passed.outputs.detach(), len(x)).mean(1)[:, index]
            for name, part in smoothed.jacobians(passed, len(x)).items():
                part = share * part[:, index]
                total[name] = total[name] + part if name in total else part
        still = smoothed.evaluate(x, {name: torch.zeros_like(v[:, :1]) for name, v in noise.items()}, sigma[:1])
        unmoved = {name: layer.passed_on for name, layer in still.layers.items() if layer.passed_on is not None}
        return Pilot(mean, total, unmoved)

    def drawn(self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], pilot: Pilot) -> Drawn:
        """Make one pass under some draws."""
        sigma, noise = self.draws.noise_of(ids, draws)
        weights, moved = self.draws.moves_of(draws, sigma)
        if moved is None:
            passed = self.smoothed.evaluate(x, noise, sigma)
        else:
            passed = self.smoothed.evaluate_each(x, noise, sigma, moved)
        change = by_example(passed.outputs, len(x))[:, :, output_index(columns)] - pilot.mean[:, None]
        for name, layer in passed.layers.items():
            if layer.innovation is not None:
                own = by_example(self.smoothed.by_position(name, layer.innovation), len(x)).flatten(2)
                change = change - own @ pilot.jacobians[name].flatten(2).mT
        flipped = {each.module: self._flipped(each, passed, sigma, pilot) for each in self.flips}
        return Drawn(passed, noise, change / sigma[:, None], columns, weights, flipped)

    def _flipped(
        self, flip: Flip, passed: SmoothedPass, sigma: Float[Tensor, " s"], pilot: Pilot
    ) -> Float[Tensor, "n c s u"]:
        """Return δ of a layer whose units are set to their other values."""
        own, following = passed.layers[flip.module], passed.layers[flip.next]
        smoothing, smoothing_next = (self.smoothed.smoothings[name] for name in (flip.module, flip.next))
        assert isinstance(smoothing, PiecewiseLinear)
        assert isinstance(smoothing_next, PiecewiseLinear)
        assert own.passed_on is not None
        jacobian = pilot.jacobians[flip.next][:, :, 0]  # n c o, the same under every draw
        n, rows = len(jacobian), sigma.repeat_interleave(len(jacobian))
        site, module = self.noise_site(flip.next), self.smoothed.model.get_submodule(flip.next)
        assert isinstance(module.weight, Tensor)
        scales = self.draws.layer_scale(site, rows.device)
        scale = float(scales[0]) ** 2 if "weight" in site.site.attributes else 0.0
        gradients = flip_gradients(
            smoothing,
            own.mean.flatten(1),
            rows[:, None] * own.lengths[:, 0],
            own.passed_on.flatten(1),
            NextLayer(module.weight.detach(), smoothing_next, scale),
            following.mean.flatten(1),
            following.lengths[:, 0, 0],
            rows,
            jacobian.repeat(len(sigma), 1, 1),
        )
        return by_example(gradients, n).transpose(1, 2)

    def changed(self, passed: SmoothedPass, pilot: Pilot, num_examples: int) -> Bool[Tensor, "n s"]:
        """Which draws changed what an activation makes of noise."""
        changed = torch.zeros(1, dtype=torch.bool, device=passed.outputs.device)
        for name, unmoved in pilot.unmoved.items():
            values = passed.layers[name].passed_on
            assert values is not None
            changed = changed | by_example(values, num_examples).ne(unmoved[:, None]).flatten(2).any(2)
        return changed

    def factors(
        self, module: str, drawn: Drawn, pilot: Pilot
    ) -> Iterator[tuple[Float[Tensor, "n c t u"], Float[Tensor, "n t i"]]]:
        """Yield pairs of δ and h̃ whose outer products, summed over draws and positions, are a layer's gradient."""
        if self.draws.plan.readout is not None and module == self.draws.plan.readout.module:
            yield self._factors_of_readout(drawn)
            return
        layer, residual, n = drawn.passed.layers[module], drawn.residual, len(drawn.residual)
        if module in drawn.flipped:
            yield drawn.flipped[module], by_example(layer.vectors[:, 0], n)
            return
        vectors, smooth = by_example(layer.vectors, n), pilot.jacobians[module][:, :, None]  # n s t i, n c 1 t u
        if layer.slope is None:
            smooth = smooth.expand(-1, -1, residual.shape[1], -1, -1)
        else:
            smooth = smooth * by_example(self.smoothed.by_position(module, layer.slope), n)[:, None]
        if layer.basis is None:
            yield smooth.flatten(2, 3), vectors.flatten(1, 2)
            return
        weighted = residual.transpose(1, 2)[..., None, None] * drawn.noise[module][:, None]  # n c s k u
        if vectors.shape[2] == 1:
            lengths = by_example(layer.lengths, n)[:, None]
            score = torch.where(lengths > 0, weighted / lengths, 0.0)
            yield (score + smooth).flatten(2, 3), vectors.flatten(1, 2)
            return
        yield weighted.flatten(2, 3), by_example(layer.basis, n).flatten(1, 2)
        yield smooth.flatten(2, 3), vectors.flatten(1, 2)

    def _factors_of_readout(self, drawn: Drawn) -> tuple[Float[Tensor, "n c t u"], Float[Tensor, "n t i"]]:
        """δ of the readout, which is the identity, and h̃."""
        passed, (n, count, _) = drawn.passed, drawn.residual.shape
        assert passed.readout is not None
        identity = torch.eye(passed.outputs.shape[1], dtype=passed.readout.dtype, device=passed.readout.device)
        chosen = identity[output_index(drawn.columns)]
        return chosen[None, :, None].expand(n, -1, count, -1), by_example(passed.readout, n)

    def in_weight_space(self, name: str, drawn: Drawn) -> Float[Tensor, "n c p"]:
        """The gradient of a parameter that draws move themselves, summed over the draws."""
        assert drawn.weights is not None
        sizes = dict(zip(self.draws.evaluator.space.names, self.draws.evaluator.space.sizes, strict=True))
        moved = self.draws.plan.weight_space
        start = sum(sizes[each] for each in moved[: moved.index(name)])
        return drawn.residual.mT @ drawn.weights[:, start : start + sizes[name]]

    def noise_site(self, module: str) -> NoiseSite:
        """Return the layer at a path."""
        sites = (*self.draws.plan.noisy, *(() if self.draws.plan.readout is None else (self.draws.plan.readout,)))
        return next(each for each in sites if each.module == module)
