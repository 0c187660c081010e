"""The estimator `activation` with conditioning and control variates: gradients of f smoothed by noise, draw by draw.

The gradient of E f(a_l + s_l ξ_l) with respect to the pre-activations of a noisy layer l has the unbiased estimate

    (f − f̄ − Σ_k J_k·(h_k − φ̃(a_k, s_k))) ξ_l/s_l + J_l ⊙ φ̃'(a_l, s_l)

for every f̄ and J that do not depend on the noise of the draw: an innovation h_k − φ̃ has the conditional mean 0, and by
Stein's identity E[J·φ(a + s ξ) ξ/s] = J ⊙ φ̃'. f̄ and J are means over pilot draws of another random stream, for each
example. The noise of a layer behind whose activation f is affine is integrated: its gradient is J ⊙ φ̃', and the
readout's is φ̃. Units with few values in the layer before that are set to each of them, which takes none of their noise
(`nntk_dist.estimators.layer_noise.flip_differences`). Conditioning and control variates are classical (Glasserman,
Monte Carlo Methods in Financial Engineering, 2003, chapter 4); this combination is the project's own.

Products and arrays are those of gradients (`nntk_dist.estimators.gradient_products`).

Axes: n rows, s draws, r blocks, c outputs, t positions of all draws, k basis vectors, i inputs and u units of a layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.estimators.gradient_products import GradientProducts
from nntk_dist.estimators.layer_noise.noisy_passes import NoisyDraws
from nntk_dist.estimators.layer_noise.reduced_draws import Drawn, Pilot, ReducedDraws
from nntk_dist.estimators.layer_noise.smoothed_passes import by_example
from nntk_dist.layers.flips import Flip, flip_operations
from nntk_dist.layers.innovations import Innovation
from nntk_dist.layers.noise_plan import NoisePlan
from nntk_dist.layers.sites import Site
from nntk_dist.layers.sketches.sketch import Projector
from nntk_dist.models.evaluation import check_finite, output_index
from nntk_dist.products.block_sums import BlockSums, Meeting
from nntk_dist.products.feature_description import ArraySpec, FeatureCosts
from nntk_dist.products.features import Rows, block_range
from nntk_dist.products.formed import formed_block_products
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import WeightedProduct, add_products_
from nntk_dist.runtime.batches import in_batches

_AVERAGED = ("dense", "sketch", "readout")  # over the draws of a slot
_DIFFERENTIABLE_NUMBERS = 1 << 21  # of inputs and noise of a pilot pass


Factors = tuple[Float[Tensor, "n c t u"], Float[Tensor, "n t i"]]


@dataclass(frozen=True)
class ActivationGradients(GradientProducts):
    """Gradients under all draws; see `GradientProducts` for the other fields.

    Blocks have the mean gradients of layers whose inputs no draw changes. An entry is resolved if draws of two blocks
    changed what activations made of the noise in a layer that is not integrated.

    Attributes:
        noise: Which layers have noise.
        innovations: What follows them.
        num_pilots: The pilot draws of an example.
        flips: The layers whose units are set to their other values.
    """

    noise: NoisePlan = field(default_factory=lambda: NoisePlan((), None, ()))
    innovations: tuple[Innovation, ...] = ()
    num_pilots: int = 16
    flips: tuple[Flip, ...] = ()

    @cached_property
    def reduced(self) -> ReducedDraws:
        """The draws."""
        assert self.drawing is not None
        draws = NoisyDraws(self.evaluator, self.noise, self.drawing)
        return ReducedDraws(draws, self.innovations, self.flips, self.num_pilots)

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

    def costs(self, meeting: Meeting, wanted: Wanted) -> FeatureCosts:
        """Return the costs: a pass a draw, pilot passes with two more for each output, and setting units."""
        found, outputs, sizes = super().costs(meeting, wanted), len(self.columns), {}
        for each in self.noise.noisy:
            sizes[each.module] = each.units
        pilots = self.num_pilots * (1.0 + 2.0 * outputs) / self.num_draws
        whole = sum(each.rank * each.num_parameters for each in self.noise.noisy)
        changes = sum(
            (self.reduced.num_values(each.module) - 1) * flip_operations(sizes[each.module] * sizes[each.next], outputs)
            for each in self.flips
        )
        passes = None if found.passes_per_draw is None else 1.0 + pilots + changes / whole
        return replace(found, passes_per_draw=passes)

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
            pilot = self.reduced.pilot(inputs, names, columns)
            for slot, block in enumerate(block_range(draws, self.draws_per_block)):
                members = range(block * self.draws_per_block, (block + 1) * self.draws_per_block)
                sums = dict[str, Factors]()
                for some in self.reduced.draws.stacks(members, inputs):
                    drawn = self.reduced.drawn(inputs, names, some, columns, pilot)
                    self._add_(own, drawn, pilot, slot, some.start - draws.start, len(columns))
                    if projector is not None:
                        own["sketch"][:, slot] += self._sketched(projector, drawn, pilot, sums)[: len(own["sketch"])]
                if projector is not None and sums:
                    own["sketch"][:, slot] += self._sketched_sums(projector, sums)[: len(own["sketch"])]
        shared = {f"gradient_{index}" for index in self.shared}
        for name, array in result.items():
            if name in _AVERAGED or name in shared:
                array /= self.draws_per_block
            check_finite(array, f"the model's gradient under draws {draws.start} to {draws.stop - 1}")
        return result

    def _add_(
        self,
        rows: Mapping[str, Tensor],
        drawn: Drawn,
        pilot: Pilot,
        slot: int,
        place: int,
        num_outputs: int,
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
        if "changes" in rows:
            rows["changes"][:, slot, 0] += self.reduced.changed(passed, pilot, n).sum(1)[:count]

    def _gradients(self, index: int, site: Site, drawn: Drawn, pilot: Pilot) -> Float[Tensor, "n s c u"]:
        """δ of a layer that gets one vector; φ'(a) for all outputs together if it is the one before the readout."""
        n, layer = len(drawn.residual), drawn.passed.layers[site.module]
        if index == self.penultimate:
            assert layer.slope is not None
            return by_example(self.reduced.smoothed.by_position(site.module, layer.slope), n)
        ((delta, _),) = self.reduced.factors(site.module, drawn, pilot)
        return delta.transpose(1, 2)

    def _add_dense_(self, sums: Float[Tensor, "m c p"], drawn: Drawn, pilot: Pilot) -> None:
        """Add the formed gradients of the first m examples."""
        start = 0
        for site in self.plan.dense:
            each, total = self.reduced.noise_site(site.module), torch.zeros(())
            for delta, h in self.reduced.factors(site.module, drawn, pilot):
                total = total + torch.einsum("nctu,nti->ncui", delta, h)
            for _, name in site.parameters:
                columns = each.columns_of([name])
                stop = start + each.units * (columns.stop - columns.start)
                sums[:, :, start:stop] += total[..., columns].flatten(2)[: len(sums)]
                start = stop
        for name in self.plan.whole:
            gradient = self.reduced.in_weight_space(name, drawn)
            sums[:, :, start : start + gradient.shape[2]] += gradient[: len(sums)]
            start += gradient.shape[2]

    def _sketched(
        self, projector: Projector, drawn: Drawn, pilot: Pilot, sums: dict[str, Factors]
    ) -> Float[Tensor, "n *c k"]:
        """Sketch the gradients of sketched layers; add those that one factor has for all draws to `sums` instead."""
        assert self.sketched is not None
        total = projector.start(drawn.residual.transpose(1, 2))
        for site in self.sketched.dense:
            shares = self._shares(site.module, projector)
            if shares is not None:
                self._add_derivatives_(projector, total, site, drawn, shares)
                continue
            for delta, h in self.reduced.factors(site.module, drawn, pilot):
                if site.module == self.sketched.readout:
                    delta, h = delta[:, :, :1], h.sum(1, keepdim=True)
                    sums[site.module] = delta, h + sums[site.module][1] if site.module in sums else h
                elif self._has_one_input(site.module):
                    delta, h = delta.sum(2, keepdim=True), h[:, :1]
                    sums[site.module] = delta + sums[site.module][0] if site.module in sums else delta, h
                else:
                    self._add_factors_(projector, total, site, delta, h)
        for name in self.sketched.whole:
            gradient = self.reduced.in_weight_space(name, drawn)
            projector.add_gradient_(total, name, gradient.unflatten(2, self._shapes([name])[name] or (1,)))
        return projector.finished(total)

    def _sketched_sums(self, projector: Projector, sums: Mapping[str, Factors]) -> Float[Tensor, "n *c k"]:
        """Sketch what has been summed over the draws of a block."""
        assert self.sketched is not None
        total = projector.start(next(iter(sums.values()))[0])
        for site in self.sketched.dense:
            if site.module in sums:
                self._add_factors_(projector, total, site, *sums[site.module])
        return projector.finished(total)

    def _add_factors_(self, projector: Projector, total: Tensor, site: Site, delta: Tensor, h: Tensor) -> None:
        """Add δ ⊗ h̃ of a layer to the sums of a sketch."""
        names, each = dict(site.parameters), self.reduced.noise_site(site.module)
        bias = names.pop("bias", None)
        follows = None  # the bias as one more input that is always 1, which it is not in a basis or a sum of vectors
        if names and each.rank == 1 and each is not self.noise.readout:
            bias, follows = None, bias
        for name in names.values():
            projector.add_factors_(total, name, delta, h[..., each.columns_of([name])], follows)
        if bias is not None:
            own = h[..., each.columns_of([bias])]
            projector.add_gradient_(total, bias, torch.einsum("nctu,nto->ncu", delta, own))

    def _shares(self, module: str, projector: Projector) -> Float[Tensor, "c u"] | None:
        """The readout's weight, if the layer before it has the gradient V ⊙ φ̃' ⊗ h̃ and outputs share a sketch."""
        assert self.sketched is not None
        layers = self.sketched.output_layers
        named = any(attribute == "weight" for attribute, _ in self.reduced.noise_site(module).site.parameters)
        if not projector.sketch.joint or layers is None or layers.module != module or not named:
            return None
        weight = self.evaluator.model.get_submodule(layers.readout).weight
        assert isinstance(weight, Tensor)
        return weight.detach()[output_index(projector.outputs)]

    def _has_one_input(self, module: str) -> bool:
        """Whether h̃ is the same under all draws of a layer that gets one vector, so that δ may be summed before."""
        assert self.sketched is not None
        return module in self.sketched.input_layers and self.reduced.noise_site(module).rank == 1

    def _add_derivatives_(
        self, projector: Projector, total: Tensor, site: Site, drawn: Drawn, shares: Float[Tensor, "c u"]
    ) -> None:
        """Add V ⊙ φ̃' ⊗ h̃ of every draw to the sums of a joint sketch."""
        n, layer, names = len(total), drawn.passed.layers[site.module], dict(site.parameters)
        assert layer.slope is not None
        slopes = by_example(self.reduced.smoothed.by_position(site.module, layer.slope)[:, 0], n)
        inputs = by_example(layer.vectors[:, 0], n)[
            ..., self.reduced.noise_site(site.module).columns_of([names["weight"]])
        ]
        for draw in range(slopes.shape[1]):
            projector.add_derivatives_(
                total, names["weight"], slopes[:, draw], shares, inputs[:, draw], names.get("bias")
            )

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
