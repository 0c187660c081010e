"""The estimator `activation` with conditioning and control variates: gradients of f smoothed by noise, draw by draw.

The gradient of E f(a_l + s_l ξ_l) with respect to the pre-activations of a noisy layer l has the unbiased estimate

    (f − f̄ − Σ_k J_k·(h_k − φ̃(a_k, s_k))) ξ_l/s_l + J_l ⊙ φ̃'(a_l, s_l)

for every f̄ and J that do not depend on the noise of the draw: an innovation h_k − φ̃ has the conditional mean 0, and by
Stein's identity E[J·φ(a + s ξ) ξ/s] = J ⊙ φ̃'. f̄ and J are means over pilot draws of another random stream, for each
example. The noise of a layer behind whose activation f is affine is integrated: its gradient is J ⊙ φ̃', and the
readout's is φ̃. Conditioning and control variates are classical (Glasserman, Monte Carlo Methods in Financial
Engineering, 2003, chapter 4); this combination is the project's own.

Products and arrays are those of gradients (`nntk_dist.estimators.gradient_products`).

Axes: n rows, s draws, r blocks, c outputs, t positions of all draws, k basis vectors, i inputs and u units of a layer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.estimators.gradient_products import GradientProducts
from nntk_dist.estimators.layer_noise.noisy_passes import NoisyDraws
from nntk_dist.estimators.layer_noise.smoothed_passes import SmoothedDraws, SmoothedPass, by_example
from nntk_dist.layers.innovations import Innovation
from nntk_dist.layers.noise import NoiseSite
from nntk_dist.layers.noise_plan import NoisePlan
from nntk_dist.layers.sites import Site
from nntk_dist.layers.sketches.sketch import Projector
from nntk_dist.models.evaluation import check_finite, output_index
from nntk_dist.products.block_sums import BlockSums, Meeting
from nntk_dist.products.feature_description import ArraySpec
from nntk_dist.products.features import Rows, block_range
from nntk_dist.products.formed import formed_block_products
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import WeightedProduct, add_products_
from nntk_dist.runtime.batches import in_batches

_AVERAGED = ("dense", "sketch", "readout")  # over the draws of a slot
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
    """

    passed: SmoothedPass
    noise: Mapping[str, Float[Tensor, "n s k u"]]
    residual: Float[Tensor, "n s c"]
    columns: Sequence[int]
    weights: Float[Tensor, "s p"] | None


@dataclass(frozen=True)
class ActivationGradients(GradientProducts):
    """Gradients under all draws; see `GradientProducts` for the other fields.

    Blocks have the mean gradients of layers whose inputs no draw changes. An entry is resolved if draws of two blocks
    changed what activations made of the noise in a layer that is not integrated.

    Attributes:
        noise: Which layers have noise.
        innovations: What follows them.
        num_pilots: The pilot draws of an example.
    """

    noise: NoisePlan = field(default_factory=lambda: NoisePlan((), None, ()))
    innovations: tuple[Innovation, ...] = ()
    num_pilots: int = 16

    @cached_property
    def smoothed(self) -> SmoothedDraws:
        """The passes."""
        assert self.drawing is not None
        return SmoothedDraws(NoisyDraws(self.evaluator, self.noise, self.drawing), self.innovations)

    def make_metric(self) -> Float64[Tensor, "r r"]:
        """Make M of a kernel that is sketched as a whole."""
        return torch.full((self._num_sketched, self._num_sketched), self._num_sketched**-2, dtype=torch.float64)

    def with_metric(self, metric: Float64[Tensor, "r r"]) -> Self:
        """Return the same features: products need no metric."""
        return self

    def outputs(self, x: Tensor, *, batch: int | None = None) -> Float[Tensor, "n c"]:
        """Compute f(x; θ), all outputs."""
        assert self.drawing is not None
        return self.evaluator.expected(x, self.drawing.seed, batch)

    # Arrays -----------------------------------------------------------------------------------------------------------

    def _arrays(self, columns: Sequence[int]) -> tuple[ArraySpec, ...]:
        """Return the arrays of gradients; those of shared inputs by block; and which draws changed an example."""
        specs, shared = list(super()._arrays(columns)), {f"{kind}_{i}" for i in self.shared for kind in _KINDS}
        for place, spec in enumerate(specs):
            if spec.name in shared:
                axes, shape = ("block", *spec.axes[1:]), (self.num_blocks, *spec.shape[1:])
                specs[place] = ArraySpec(spec.name, axes, shape)
        if self._counts_changes and [spec.name for spec in specs] != ["sketch"]:
            specs.append(ArraySpec("changes", ("block", "joint_output"), (self.num_blocks, 1)))
        return tuple(specs)

    @property
    def _counts_changes(self) -> bool:
        return any(not each.integrated for each in self.innovations)

    @cached_property
    def _pair_weights(self) -> Float[Tensor, "s s u"]:
        """Σ_c V_c², the same for all pairs of draws: no draw moves the readout."""
        assert self.plan.output_layers is not None
        weight = self.evaluator.model.get_submodule(self.plan.output_layers.readout).weight
        assert isinstance(weight, Tensor)
        own = weight.detach()[output_index(self.columns)].double().square().sum(0)
        return own.to(weight.dtype).expand(self.num_draws, self.num_draws, -1)

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        """Compute the arrays; see `FeatureMap.compute`."""
        like = next(iter(self.evaluator.space.values(self.evaluator.model).values()))
        result = {}
        for spec in self._arrays(columns):
            shape = (len(x), spec.shape[0] * len(draws) // self.num_draws, *spec.shape[1:])
            result[spec.name] = like.new_zeros(shape)
        projector = None if self.sketch is None else Projector(self.sketch, columns)
        for (inputs, rows), (names, _) in zip(in_batches(x, batch), in_batches(ids, batch), strict=True):
            own = {name: array[rows] for name, array in result.items()}
            pilot = self._pilot(inputs, names, columns)
            for slot, block in enumerate(block_range(draws, self.draws_per_block)):
                members = range(block * self.draws_per_block, (block + 1) * self.draws_per_block)
                for some in self.smoothed.draws.stacks(members, inputs):
                    drawn = self._drawn(inputs, names, some, columns, pilot)
                    self._add_(own, drawn, pilot, slot, some.start - draws.start, len(columns), projector)
        shared = {f"gradient_{index}" for index in self.shared}
        for name, array in result.items():
            if name in _AVERAGED or name in shared:
                array /= self.draws_per_block
            check_finite(array, f"the model's gradient under draws {draws.start} to {draws.stop - 1}")
        return result

    def _pilot(self, x: Tensor, ids: Tensor, columns: Sequence[int]) -> Pilot:
        """Return f̄ and J of some examples, and their activations without noise."""
        smoothed, index, count = self.smoothed, output_index(columns), self.num_pilots
        sigma, noise = smoothed.draws.pilot(ids, count)
        size = x.numel() + len(x) * sum(each.num_noise + each.rank * each.width for each in self.noise.noisy)
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

    def _drawn(self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], pilot: Pilot) -> Drawn:
        """Make one pass under some draws."""
        sigma, noise = self.smoothed.draws.noise_of(ids, draws)
        weights, moved = self.smoothed.draws.moves_of(draws, sigma)
        if moved is None:
            passed = self.smoothed.evaluate(x, noise, sigma)
        else:
            passed = self.smoothed.evaluate_each(x, noise, sigma, moved)
        change = by_example(passed.outputs, len(x))[:, :, output_index(columns)] - pilot.mean[:, None]
        for name, layer in passed.layers.items():
            if layer.innovation is not None:
                own = by_example(self.smoothed.by_position(name, layer.innovation), len(x)).flatten(2)
                change = change - own @ pilot.jacobians[name].flatten(2).mT
        return Drawn(passed, noise, change / sigma[:, None], columns, weights)

    def _add_(
        self,
        rows: Mapping[str, Tensor],
        drawn: Drawn,
        pilot: Pilot,
        slot: int,
        place: int,
        num_outputs: int,
        projector: Projector | None,
    ) -> None:
        """Add some draws, of block number `slot` and from draw number `place` on, to the arrays of one batch.

        The arrays may have fewer rows: the others are padding.
        """
        n, passed = len(drawn.residual), drawn.passed
        count = len(next(iter(rows.values())))
        for index, site in enumerate(self.plan.outer):
            if index == self.readout:
                assert passed.readout is not None
                factor = math.sqrt(num_outputs) if self.sums_outputs else 1.0
                rows["readout"][:, slot, 0] += factor * by_example(passed.readout, n).sum(1)[:count]
            elif rows[f"gradient_{index}"].numel():
                own, layer = slice(place, place + drawn.residual.shape[1]), passed.layers[site.module]
                inputs = by_example(layer.vectors[:, 0], n)[:count]
                gradients = self._gradients(index, site, drawn, pilot)[:count]
                if index in self.shared:
                    rows[f"input_{index}"][:, slot] = inputs[:, 0]
                    rows[f"gradient_{index}"][:, slot] += gradients.sum(1)
                else:
                    rows[f"input_{index}"][:, own], rows[f"gradient_{index}"][:, own] = inputs, gradients
        if "dense" in rows:
            self._add_dense_(rows["dense"][:, slot], drawn, pilot)
        if projector is not None:
            rows["sketch"][:, slot] += self._sketched(projector, drawn, pilot)[:count]
        if "changes" in rows:
            rows["changes"][:, slot, 0] += self._changed(passed, pilot, n).sum(1)[:count]

    def _changed(self, passed: SmoothedPass, pilot: Pilot, num_examples: int) -> Bool[Tensor, "n s"]:
        """Which draws changed what an activation makes of noise."""
        changed = torch.zeros(1, dtype=torch.bool, device=passed.outputs.device)
        for name, unmoved in pilot.unmoved.items():
            values = passed.layers[name].passed_on
            assert values is not None
            changed = changed | by_example(values, num_examples).ne(unmoved[:, None]).flatten(2).any(2)
        return changed

    def _gradients(self, index: int, site: Site, drawn: Drawn, pilot: Pilot) -> Float[Tensor, "n s c u"]:
        """δ of a layer that gets one vector; φ'(a) for all outputs together if it is the one before the readout."""
        n, layer = len(drawn.residual), drawn.passed.layers[site.module]
        if index == self.penultimate:
            assert layer.slope is not None
            return by_example(self.smoothed.by_position(site.module, layer.slope), n)
        ((delta, _),) = self._factors(site.module, drawn, pilot)
        return delta.transpose(1, 2)

    def _factors(
        self, module: str, drawn: Drawn, pilot: Pilot
    ) -> Iterator[tuple[Float[Tensor, "n c t u"], Float[Tensor, "n t i"]]]:
        """Yield pairs of δ and h̃ whose outer products, summed over draws and positions, are a layer's gradient."""
        if self.noise.readout is not None and module == self.noise.readout.module:
            yield self._factors_of_readout(drawn)
            return
        layer, residual, n = drawn.passed.layers[module], drawn.residual, len(drawn.residual)
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

    def _add_dense_(self, sums: Float[Tensor, "m c p"], drawn: Drawn, pilot: Pilot) -> None:
        """Add the formed gradients of the first m examples."""
        start = 0
        for site in self.plan.dense:
            each, total = self._noise_site(site.module), torch.zeros(())
            for delta, h in self._factors(site.module, drawn, pilot):
                total = total + torch.einsum("nctu,nti->ncui", delta, h)
            for _, name in site.parameters:
                columns = each.columns_of([name])
                stop = start + each.units * (columns.stop - columns.start)
                sums[:, :, start:stop] += total[..., columns].flatten(2)[: len(sums)]
                start = stop
        for name in self.plan.whole:
            gradient = self._in_weight_space(name, drawn)
            sums[:, :, start : start + gradient.shape[2]] += gradient[: len(sums)]
            start += gradient.shape[2]

    def _in_weight_space(self, name: str, drawn: Drawn) -> Float[Tensor, "n c p"]:
        """The gradient of a parameter that draws move themselves, summed over the draws."""
        assert drawn.weights is not None
        sizes = dict(zip(self.evaluator.space.names, self.evaluator.space.sizes, strict=True))
        moved = self.noise.weight_space
        start = sum(sizes[each] for each in moved[: moved.index(name)])
        return drawn.residual.mT @ drawn.weights[:, start : start + sizes[name]]

    def _sketched(self, projector: Projector, drawn: Drawn, pilot: Pilot) -> Float[Tensor, "n *c k"]:
        """Sketch the gradients of sketched layers."""
        assert self.sketched is not None
        total = projector.start(drawn.residual.transpose(1, 2))
        for site in self.sketched.dense:
            each = self._noise_site(site.module)
            for delta, h in self._factors(site.module, drawn, pilot):
                for attribute, name in site.parameters:
                    own = h[..., each.columns_of([name])]
                    if attribute == "weight":
                        projector.add_factors_(total, name, delta, own)
                    else:
                        projector.add_gradient_(total, name, torch.einsum("nctu,nto->ncu", delta, own))
        for name in self.sketched.whole:
            gradient = self._in_weight_space(name, drawn)
            projector.add_gradient_(total, name, gradient.unflatten(2, self._shapes([name])[name] or (1,)))
        return projector.finished(total)

    def _noise_site(self, module: str) -> NoiseSite:
        sites = (*self.noise.noisy, *(() if self.noise.readout is None else (self.noise.readout,)))
        return next(each for each in sites if each.module == module)

    # Products ---------------------------------------------------------------------------------------------------------

    def weighted_products(self, rows: Rows, others: Rows, wanted: Wanted) -> list[WeightedProduct] | None:  # type: ignore[override]
        """Return the matrix products of prepared row sets; None if an entry may be unresolved, which sums must note."""
        if "changes" in rows and any(bool((part["changes"] > 0).sum(1).lt(2).any()) for part in (rows, others)):
            return None
        return super().weighted_products(rows, others, wanted)

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        """Sum the block products of one tile, and note which entries are resolved."""
        rows, others = (self.prepare(part, wanted) for part in (rows, others))
        sums = self.no_sums(rows, others, meeting, wanted)
        add_products_(sums, super().weighted_products(rows, others, wanted), meeting)
        sums.resolved = self.resolved(rows, others, meeting)
        return sums

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "r r ..."]:
        """Return every block product of few entries, in float64."""
        names = {f"{kind}_{index}" for index in self.shared for kind in _KINDS}
        left_over, right_over = (
            {name: array for name, array in part.items() if name not in names} for part in (rows, others)
        )
        parts = []
        for index in self.shared:
            if f"gradient_{index}" in rows:
                name, inputs = f"gradient_{index}", f"input_{index}"
                product = formed_block_products(rows[name], others[name], meeting)
                left, right = rows[inputs][:, 0].double(), others[inputs][:, 0].double()
                pairs = [meeting.multiply_shared_(pair, left, right) for pair in product.flatten(0, 1)]
                parts.append(torch.stack(pairs).unflatten(0, product.shape[:2]))
        if left_over.keys() - {"changes"}:
            parts.append(super().block_products(left_over, right_over, meeting))
        return torch.stack(parts).sum(0)

    def resolved(self, rows: Rows, others: Rows, meeting: Meeting) -> Bool[Tensor, "*tile"] | None:
        """Return a mask of the entries whose examples changed under draws of two blocks; None without noise."""
        if "changes" not in rows:
            return None
        first, second = ((part["changes"] > 0).expand(-1, -1, len(self.columns)) for part in (rows, others))
        return meeting.in_different_blocks(first, second)


_KINDS = ("input", "gradient")
