"""The estimator `activation`: gradients by Stein's identity, with each example's own noise in every layer.

One draw is one forward pass with noise (`nntk_dist.estimators.layer_noise.noisy_passes`). With
D = (f(noisy) − f(x; θ))/σ its gradient is D Σ_k η_k ⊗ q_k in a noisy layer, D n in weight space, and h̃ of the noisy
pass, exactly, in a layer whose output is the model's output. Every draw is unbiased for g(x) = P·E[Δ z/|z|²]. The error
hardly depends on P: a layer's noise has one number for each unit. Gaussian ρ and the nonlocal kernel only; any
activation, jumps included.

Products: layers in factors over all pairs of draws (`nntk_dist.products.noise_pairs`), from block-mean gradients, or
from their sketch (`nntk_dist.estimators.contraction`); weight space from D and ⟨n_s, n_t⟩; the readout from block
means of h̃.

Axes: n rows, s draws, r blocks, c outputs, k basis vectors, i inputs and u units of a layer, p formed parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.estimators.contraction import NoiseContraction
from nntk_dist.estimators.drawn_features import DrawnFeatures
from nntk_dist.estimators.layer_noise.noisy_passes import NoisyDraws, NoisyPass, part_of
from nntk_dist.layers.noise import NoiseSite
from nntk_dist.layers.noise_plan import NoisePlan
from nntk_dist.layers.sketches.sketch import Sketch
from nntk_dist.models.evaluation import check_finite, output_index
from nntk_dist.models.noise import fixed_noise
from nntk_dist.products.block_sums import BlockSums, Changes, Meeting, empty_sums
from nntk_dist.products.feature_description import ArraySpec, FeatureCosts
from nntk_dist.products.features import Rows, block_range, join_batches
from nntk_dist.products.formed import (
    column_weighted_products,
    combined,
    formed_block_products,
    formed_weighted_products,
    prepared_sketch,
    products_per_block,
)
from nntk_dist.products.metric import PLAIN, by_blocks, metric_block_products, metric_weighted_products, mixed_by_metric
from nntk_dist.products.noise_pairs import CHUNK_NUMBERS, NoiseFeatures, add_pairs_, pair_block_products
from nntk_dist.products.wanted import Side, Wanted
from nntk_dist.products.weighted_products import add_products_, of_each_output


@dataclass(frozen=True)
class ActivationFeatures(DrawnFeatures):
    """Features under all draws.

    Entries of examples whose output no draw changed have no standard error (`BlockSums.resolved`); the readout's part
    of them is known in any case.

    Attributes:
        plan: Which layers have noise, which parameters move in weight space, and which layer is the readout.
        contraction: Which noisy layers are formed, and which are sketched; the others stay in factors.
        sketch: The sketch; None if nothing is sketched.
        moved: The plan of all parameters that move, if `plan` is that of one group of them.
    """

    pair_blocks: ClassVar[bool] = True  # products pair all blocks
    zero_stderr_is_unresolved: ClassVar[bool] = False  # `BlockSums.resolved` says which entries are resolved

    plan: NoisePlan
    contraction: NoiseContraction
    sketch: Sketch | None = None
    moved: NoisePlan | None = None

    @property
    def num_sketch_groups(self) -> int:
        """Q, the number of independent groups of sketch columns; 0 if products are exact."""
        return 0 if self.sketch is None else self.sketch.num_groups

    @cached_property
    def draws(self) -> NoisyDraws:
        """The noise and the passes."""
        return NoisyDraws(self.evaluator, self.moved or self.plan, self.drawing)

    @cached_property
    def _weight_metric(self) -> Float64[Tensor, "s s"]:
        return NoisyDraws(self.evaluator, self.plan, self.drawing).weight_metric

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """D, draw by draw; basis and noise of layers in factors; block means of the others."""
        outputs = len(self.columns)
        specs = [ArraySpec("differences", ("draw", "output"), (self.num_draws, outputs))]
        for index, each in enumerate(self._factors):
            axes, shape = ("draw", f"basis_{index}"), (self.num_draws, each.rank)
            specs.append(ArraySpec(f"direction_{index}", (*axes, f"input_unit_{index}"), (*shape, each.width)))
            specs.append(ArraySpec(f"noise_{index}", (*axes, f"unit_{index}"), (*shape, each.units)))
        if self._num_formed:
            specs.append(
                ArraySpec("dense", ("block", "output", "parameter"), (self.num_blocks, outputs, self._num_formed))
            )
        if self.sketch is not None:
            columns = (self.num_blocks, outputs, self.sketch.num_columns)
            specs.append(ArraySpec("sketch", ("block", "output", "column"), columns))
        if self.plan.readout is not None:
            specs.append(ArraySpec("readout", ("block", "readout_unit"), (self.num_blocks, self.plan.readout.width)))
        return tuple(specs)

    @property
    def _factors(self) -> tuple[NoiseSite, ...]:
        others = self.contraction.formed | self.contraction.sketched
        return tuple(each for each in self.plan.noisy if each.module not in others)

    @property
    def _num_formed(self) -> int:
        layers = sum(each.num_parameters for each in self.plan.noisy if each.module in self.contraction.formed)
        in_weight_space = self.plan.num_parameters(self.evaluator.space)[2]
        return layers + (in_weight_space if self.contraction.forms_weight_space else 0)

    @property
    def _has_metric(self) -> bool:
        return bool(self.plan.weight_space) and not self.contraction.forms_weight_space

    def costs(self, meeting: Meeting, wanted: Wanted) -> FeatureCosts:
        """Return the costs: a pass for each draw, and S² pairs of draws of each layer in factors."""
        outputs, draws, blocks = len(self.columns), self.num_draws, self.num_blocks
        copies, per_block = meeting.width(outputs), products_per_block(blocks, wanted)
        groups = 1.0 if wanted.stderr else 0.0
        total = 2.0 * (3.0 if wanted.stderr else 2.0) * draws * outputs * copies
        for each in self._factors:
            total += 2.0 * (draws * each.rank * each.width) * draws * each.rank
            total += 2.0 * (draws * each.rank * each.units) * draws * each.rank
        if self._num_formed:
            total += 2.0 * per_block * blocks * (outputs * self._num_formed) * copies
        if self.sketch is not None:
            total += 2.0 * (per_block + groups) * blocks * (outputs * self.sketch.num_columns) * copies
        if self.plan.readout is not None:
            total += 2.0 * per_block * blocks * self.plan.readout.width * copies
        return FeatureCosts(
            entry_operations=total,
            passes_per_draw=None if self.sketch is not None else self.difference_passes(),
            prepared_share=per_block + (1.0 if wanted.stderr and self.sketch is not None else 0.0),
            copies_sample=bool(self._factors),
            pair_numbers=4 * CHUNK_NUMBERS if self._factors else 0,
        )

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        """Compute the arrays; see `FeatureMap.compute`."""
        (result,) = compute_together([self], x, ids, draws, columns, batch=batch)
        return result

    def arrays_of(
        self, passed: NoisyPass, differences: Float[Tensor, "n s c"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the arrays of the draws of one pass: draw by draw, and sums over its draws."""
        if self.moved is not None:
            passed = part_of(passed, self.moved, self.plan, self.evaluator.space)
        by_draw = {"differences": differences}
        for index, each in enumerate(self._factors):
            by_draw[f"direction_{index}"] = passed.directions[each.module]
            by_draw[f"noise_{index}"] = passed.noise[each.module]
        sums = {"dense": self._formed_gradients(passed, differences)} if self._num_formed else {}
        if self.sketch is not None:
            sums["sketch"] = self._sketched_gradients(self.sketch, passed, differences)
        if passed.readout is not None:
            sums["readout"] = passed.readout.sum(1)
        return by_draw, sums

    def passes(self, x: Tensor, ids: Tensor, base: Tensor, draws: range) -> tuple[NoisyPass, Tensor]:
        """Return the pass under some draws and f(x; θ), for a random model both under the noise of the draws' group."""
        if not self.evaluator.is_random:
            return self.draws.evaluate(x, ids, draws), base
        with fixed_noise(self.evaluator.model, self.drawing.seed, draws.start // self.drawing.group_size):
            return self.draws.evaluate(x, ids, draws), self.evaluator.base(x)

    def _formed_gradients(self, passed: NoisyPass, differences: Float[Tensor, "n s c"]) -> Float[Tensor, "n c p"]:
        """Return the gradients of formed layers and of weight space, summed over the draws of one pass."""
        parts = []
        for each in self.plan.noisy:
            if each.module in self.contraction.formed:
                noise, basis = passed.noise[each.module], passed.directions[each.module]
                weighted = differences[:, :, None, :, None] * noise[:, :, :, None]  # n s k c u
                product = torch.bmm(weighted.flatten(3).flatten(1, 2).mT, basis.flatten(1, 2))
                parts.append(product.reshape(len(product), differences.shape[2], -1))
        if self.contraction.forms_weight_space and passed.weights is not None:
            parts.append(torch.einsum("nsc,sp->ncp", differences, passed.weights))
        return torch.cat(parts, dim=2)

    def _sketched_gradients(
        self, sketch: Sketch, passed: NoisyPass, differences: Float[Tensor, "n s c"]
    ) -> Float[Tensor, "n c k"]:
        """Return the sketch of the sketched layers' gradients, summed over the draws of one pass."""
        total = differences.new_zeros(len(differences), differences.shape[2], sketch.num_columns)
        for each in self.plan.noisy:
            if each.module in self.contraction.sketched:
                noise, basis = passed.noise[each.module].flatten(1, 2), passed.directions[each.module].flatten(1, 2)
                weights, names = differences.repeat_interleave(each.rank, dim=1), dict(each.site.parameters)
                if "weight" in names:
                    inputs = basis[:, :, :-1] if "bias" in names else basis
                    total += sketch.of_shared(names["weight"], weights, noise, inputs)
                if "bias" in names:
                    biases = (weights * basis[:, :, -1:]).mT @ noise
                    total += sketch.of_gradient(names["bias"], biases)
        return total

    def prepare(self, rows: Rows, wanted: Wanted) -> dict[str, Tensor]:
        """Combine the blocks of formed, sketched and readout means, and multiply the metric of weight space."""
        prepared = dict(rows)
        if "dense" in prepared:
            prepared["dense_columns"] = combined(prepared.pop("dense"), wanted)
        if "sketch" in prepared:
            prepared |= prepared_sketch(prepared.pop("sketch"), self.num_sketch_groups, wanted)
        if "readout" in prepared:
            prepared["readout_columns"] = combined(prepared.pop("readout")[:, :, None], wanted)
        if self._has_metric:
            if PLAIN not in prepared:
                prepared[PLAIN] = by_blocks(prepared["differences"].transpose(1, 2), self.num_blocks)
            prepared = mixed_by_metric(prepared, self._weight_metric, wanted)
        return prepared

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        """Sum the block products of one tile, and note which entries are resolved."""
        rows = self.prepare(rows, wanted.on(Side.ROWS))
        others = self.prepare(others, wanted.on(Side.COLUMNS))
        first, second = rows["differences"], others["differences"]
        shape = meeting.shape(len(first), len(second), first.shape[2])
        groups = self.num_sketch_groups
        sums = empty_sums(shape, self.num_blocks, wanted, pair_blocks=True, device=first.device, num_groups=groups)
        if self._factors:
            add_pairs_(sums, self._noise_features(rows), self._noise_features(others), meeting)
        if self._has_metric:
            add_products_(sums, metric_weighted_products(rows, others, wanted), meeting)
        names, blocks = ("dense_columns",), self.num_blocks
        if terms := column_weighted_products(rows, others, names, blocks, wanted, pair_blocks=True):
            add_products_(sums, terms, meeting)
        if (name := "readout_columns") in rows:
            products = formed_weighted_products(rows[name], others[name], blocks, wanted)
            add_products_(sums, of_each_output(products, first.shape[2], full=meeting.full), meeting)
        sums.resolved = self.resolved(rows, others, meeting)
        return sums

    def resolved(self, rows: Rows, others: Rows, meeting: Meeting) -> Bool[Tensor, "*tile"] | None:
        """Return a mask of the entries whose examples changed under draws of two different blocks.

        None without noise: then the readout alone is perturbed, and its part is exact.
        """
        if not self.plan.noisy and not self.plan.weight_space:
            return None
        first, second = (self._counts(part) > 0 for part in (rows, others))
        return meeting.in_different_blocks(first, second)

    def changes(self, rows: Rows) -> Changes | None:
        """Return how often draws changed the outputs; what changes without noise is exact."""
        if not self.plan.noisy and not self.plan.weight_space:
            return None
        largest = float(rows["differences"].abs().max()) / min(self.drawing.scales, default=1.0)  # over σ already
        return Changes(self._counts(rows), largest, self.num_groups)

    def _counts(self, rows: Rows) -> Float[Tensor, "n r c"]:
        """The draws of each block that changed an output."""
        return (rows["differences"] != 0).unflatten(1, (self.num_blocks, -1)).sum(2, dtype=torch.float32)

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "r r ..."]:
        """Return every block product of few entries, in float64."""
        left, right = (
            {name: array if name in ("dense", "sketch") else array.double() for name, array in part.items()}
            for part in (rows, others)
        )
        first, second, blocks = left["differences"], right["differences"], self.num_blocks
        shape = meeting.shape(len(first), len(second), first.shape[2])
        total = torch.zeros(blocks, blocks, *shape, dtype=torch.float64, device=first.device)
        if self._factors:
            total += pair_block_products(self._noise_features(left), self._noise_features(right), meeting, blocks)
        if self._has_metric:
            differences = first.transpose(1, 2), second.transpose(1, 2)
            total += metric_block_products(*differences, self._weight_metric, blocks, meeting)
        if self._num_formed:
            total += formed_block_products(left["dense"], right["dense"], meeting)
        if self.sketch is not None:
            total += formed_block_products(left["sketch"], right["sketch"], meeting)
        if self.plan.readout is not None:
            plain = Meeting(paired=meeting.paired)
            product = formed_block_products(left["readout"][:, :, None], right["readout"][:, :, None], plain)
            total += meeting.same_output(product, first.shape[2])
        return total

    def _noise_features(self, rows: Rows) -> NoiseFeatures:
        indices = range(len(self._factors))
        directions, noise = (tuple(rows[f"{name}_{i}"] for i in indices) for name in ("direction", "noise"))
        return NoiseFeatures(rows["differences"], directions, noise)


def compute_together(
    maps: Sequence[ActivationFeatures],
    x: Tensor,
    ids: Tensor,
    draws: range,
    columns: Sequence[int],
    *,
    batch: int | None = None,
) -> list[dict[str, Tensor]]:
    """Compute the arrays of several feature maps that move the same parameters in the same draws, in the same passes.

    Args:
        maps: they differ in which parameters' gradients they keep, and how.
        x: as `FeatureMap.compute`.
        ids: as `FeatureMap.compute`.
        draws: as `FeatureMap.compute`.
        columns: as `FeatureMap.compute`.
        batch: as `FeatureMap.compute`.
    """
    found = join_batches(lambda rows, names: _one_batch(maps, rows, names, draws, columns), x, ids, batch)
    own = [f"{index}|" for index in range(len(maps))]
    return [{key.removeprefix(mark): found[key] for key in found if key.startswith(mark)} for mark in own]


def _one_batch(
    maps: Sequence[ActivationFeatures], x: Tensor, ids: Tensor, draws: range, columns: Sequence[int]
) -> dict[str, Tensor]:
    """Compute the features of one batch; noise is each example's own, so batches share nothing."""
    first = maps[0]
    base = first.evaluator.base(x)
    check_finite(base, "the model's output")
    size = first.drawing.draws_per_block
    blocks = [
        _one_block(maps, x, ids, base, range(block * size, (block + 1) * size), columns)
        for block in block_range(draws, size)
    ]
    result = {name: torch.cat([block[name] for block in blocks], dim=1) for name in blocks[0]}
    for array in result.values():
        check_finite(array, f"the model's output under draws {draws.start} to {draws.stop - 1}")
    return result


def _one_block(
    maps: Sequence[ActivationFeatures], x: Tensor, ids: Tensor, base: Tensor, block: range, columns: Sequence[int]
) -> dict[str, Tensor]:
    """Compute every array of one block of draws: draw by draw, or the block's mean; "i|" precedes names of map i."""
    first = maps[0]
    by_draw: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    for draws in first.draws.stacks(block, x):
        passed, unmoved = first.passes(x, ids, base, draws)
        changes = (passed.outputs - unmoved)[:, :, output_index(columns)] / passed.sigma[:, None, None]
        for index, each in enumerate(maps):
            own, means = each.arrays_of(passed, changes.transpose(0, 1))
            for name, part in own.items():
                by_draw.setdefault(f"{index}|{name}", []).append(part)
            for name, part in means.items():
                key = f"{index}|{name}"
                sums[key] = sums[key] + part if key in sums else part
    result = {name: torch.cat(parts, dim=1) for name, parts in by_draw.items()}
    return result | {name: (total / len(block))[:, None] for name, total in sums.items()}
