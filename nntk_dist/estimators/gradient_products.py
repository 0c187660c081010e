"""Gradients of a model as feature arrays: which arrays there are, what they cost, and how they are multiplied.

The gradient δ ⊗ h̃ of a Linear layer stays in two factors (`layered`), or is averaged over a block's draws (`dense`), or
is sketched; `nntk_dist.estimators.contraction` decides. No model runs here: `nntk_dist.estimators.gradients` computes
the arrays.

Axes: n rows, s draws, r blocks, q slots (blocks, or draws if each meets only itself), c outputs, w combinations of
blocks, k dense parameters or columns of the sketch.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.estimators.contraction import linear_widths, shares_derivatives
from nntk_dist.layers.penultimate import pair_weights
from nntk_dist.layers.sites import SitePlan
from nntk_dist.layers.sketches.sketch import KEPT_BYTES, Sketch
from nntk_dist.models.evaluation import Evaluator
from nntk_dist.products.block_sums import BlockSums, Meeting, empty_sums
from nntk_dist.products.feature_description import ArraySpec, FeatureCosts, FeatureStorage
from nntk_dist.products.features import Rows, num_rows
from nntk_dist.products.formed import (
    alone_block_products,
    alone_weighted_products,
    column_weighted_products,
    combined,
    formed_block_products,
    formed_weighted_products,
    prepared_sketch,
    products_per_block,
)
from nntk_dist.products.layered import Layered, layered_block_products, layered_weighted_products
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import Inputs, WeightedProduct, add_products_, of_each_output
from nntk_dist.sampling.draws import Drawing

_PAIR_BYTES = 1000  # of the `WeightedProduct` of one pair of draws and one layer: measured


@dataclass(frozen=True)
class GradientProducts:
    """Arrays of gradients under all draws, by layer, and their products.

    Attributes:
        evaluator: Calls the model with given parameters.
        plan: The layers whose gradients are exact.
        drawing: The draws; None means the one gradient at θ itself.
        columns: The indices of the model outputs in the kernel.
        pair_blocks: Whether products pair all blocks, or each draw only with itself.
        zero_stderr_is_unresolved: Whether a standard error of 0 means that no draw changed the output.
        sketch: The sketch; None without one. Paired blocks have one, or the one gradient at θ. The groups of columns of
            the latter are independent sketches of it, and so the blocks whose scatter gives the error.
        sketched: The layers that are in the sketch alone, a plan without outer sites.
        sums_outputs: Whether products are summed over outputs. What outputs share is then kept once.
        shared: Indices of the outer sites whose h̃ no draw changes (`nntk_dist.layers.site_trial`). If blocks are
            paired, they take R products of mean δ instead of S².
        penultimate: Index of the outer site before the readout, which keeps φ'(a) for all outputs together
            (`nntk_dist.layers.penultimate`); only if blocks are paired and outputs summed.
        readout: Index of the readout, which keeps h̃ alone (its block means if blocks are paired): δ is the identity.
    """

    evaluator: Evaluator
    plan: SitePlan
    drawing: Drawing | None
    columns: tuple[int, ...]
    pair_blocks: bool
    zero_stderr_is_unresolved: bool = False
    sketch: Sketch | None = None
    sketched: SitePlan | None = None
    sums_outputs: bool = False
    shared: frozenset[int] = frozenset()
    penultimate: int | None = None
    readout: int | None = None

    @property
    def num_draws(self) -> int:
        """S, the number of perturbed models; 1 for the gradient at θ."""
        return 1 if self.drawing is None else self.drawing.num_draws

    @property
    def num_blocks(self) -> int:
        """R, the number of independent blocks of draws, or of groups of columns if the gradient at θ is sketched."""
        if self.drawing is not None:
            return self.drawing.num_blocks
        return 1 if self.sketch is None else self.sketch.num_groups

    @property
    def num_parameters(self) -> int:
        """P, the number of selected parameters."""
        return self.evaluator.space.num_parameters

    @property
    def draws_per_block(self) -> int:
        """Draws of one block; the groups of columns of a sketch share the one gradient at θ."""
        return max(1, self.num_draws // self.num_blocks)

    @property
    def _num_sketched(self) -> int:
        """Gradients of one row that are sketched: R block means, or the one at θ."""
        return self.num_blocks if self.pair_blocks else 1

    @property
    def draws_per_slot(self) -> int:
        """Draws over which dense gradients are averaged: a block's if blocks are paired, else 1."""
        return self.draws_per_block if self.pair_blocks else 1

    @property
    def num_dense(self) -> int:
        """Parameters whose gradients are formed."""
        sizes = dict(zip(self.evaluator.space.names, self.evaluator.space.sizes, strict=True))
        return sum(sizes[name] for name in self.plan.dense_names())

    @property
    def num_sketch_groups(self) -> int:
        """Q, the number of independent groups of sketch columns; 0 if products are exact, or if they are the blocks."""
        return self.sketch.num_groups if self.sketch is not None and self.pair_blocks else 0

    @property
    def differentiates_outputs(self) -> bool:
        """Whether the gradient of each output is taken by itself, not only along directions of all outputs."""
        if self.sketch is not None and not self.sketch.num_directions:
            return True
        layered = any(index != self.readout for index in range(len(self.plan.outer)))
        return layered or bool(self.plan.dense_names())

    # Arrays and costs -------------------------------------------------------------------------------------------------

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that `compute` returns for all outputs."""
        return self._arrays(self.columns)

    def _arrays(self, columns: Sequence[int]) -> tuple[ArraySpec, ...]:
        """Return the arrays for some outputs. φ'(a) of the penultimate layer comes with the first output."""
        num_outputs, specs = len(columns), []
        for index in range(len(self.plan.outer)):
            inputs, units = self._widths(index)
            if index == self.readout:
                axis, slots = ("block" if self.pair_blocks else "draw"), self.num_draws // self.draws_per_slot
                specs.append(ArraySpec("readout", (axis, "joint_output", "readout_unit"), (slots, 1, inputs)))
                continue
            if index == self.penultimate and self.columns[0] not in columns:
                inputs = units = 0  # products of length 0 add nothing
            specs.append(ArraySpec(f"input_{index}", ("draw", f"input_unit_{index}"), (self.num_draws, inputs)))
            axis, length = ("joint_output", 1) if self._is_penultimate(index) else ("output", num_outputs)
            shape = (self.num_draws, length, units)
            specs.append(ArraySpec(f"gradient_{index}", ("draw", axis, f"unit_{index}"), shape))
        if self.num_dense:
            axis = "block" if self.pair_blocks else "draw"
            shape = (self.num_draws // self.draws_per_slot, num_outputs, self.num_dense)
            specs.append(ArraySpec("dense", (axis, "output", "parameter"), shape))
        if self.sketch is not None:
            blocks, numbers = self._num_sketched, self.sketch.num_columns
            if self.sketch.joint:
                specs.append(ArraySpec("sketch", ("block", "column"), (blocks, numbers)))
            else:
                specs.append(ArraySpec("sketch", ("block", "output", "column"), (blocks, num_outputs, numbers)))
        return tuple(specs)

    @property
    def storage(self) -> FeatureStorage:
        """Members of a group; or one array with a constant metric if everything is sketched."""
        arrays = self.arrays
        if [spec.name for spec in arrays] != ["sketch"]:
            return FeatureStorage(arrays)
        metric = ArraySpec("metric", ("block", "block_col"), (self._num_sketched, self._num_sketched))
        return FeatureStorage(arrays, is_single=True, metric=metric)

    def costs(self, meeting: Meeting, wanted: Wanted) -> FeatureCosts:
        """Return the costs: a pass forward and one back for each output, and the products of each layer."""
        outputs, layered = len(self.columns), [i for i in range(len(self.plan.outer)) if i != self.readout]
        per_block = products_per_block(self.num_blocks, wanted)
        prepared = 1.0 if not self.pair_blocks or len(self.arrays) == 2 * len(layered) else per_block
        if self.pair_blocks and wanted.stderr and self.sketch is not None:
            prepared += 1.0
        return FeatureCosts(
            entry_operations=self._entry_operations(meeting, wanted),
            passes_per_draw=None if self.sketch is not None else 1.0 + outputs,
            pass_copies=1 + (outputs if self.sketch is None else self.sketch.num_directions or outputs),
            held_bytes=self._probe_bytes + self._pair_weight_bytes,
            prepared_share=prepared,
            copies_sample=bool(layered),
            product_bytes=_PAIR_BYTES * self.num_draws**2 * len(layered) if self.pair_blocks else 0,
            allows_sketch=(self.pair_blocks or self.drawing is None) and self.sketch is None,
        )

    def _entry_operations(self, meeting: Meeting, wanted: Wanted) -> float:
        """Return the operations of one entry of the kernel, array by array."""
        outputs = len(self.columns)
        copies, draws, blocks = meeting.width(outputs), self.num_draws, self.num_blocks
        formed = products_per_block(blocks, wanted) if self.pair_blocks else 1.0
        total = 0.0
        for index in range(len(self.plan.outer)):
            inputs, units = self._widths(index)
            if index == self.readout:
                total += 2.0 * formed * (draws // self.draws_per_slot) * inputs  # for all outputs together
                continue
            pairs = both = float(draws**2 if self.pair_blocks else draws)
            if index in self.shared:  # one product of h̃, and the products of mean δ
                pairs, both = 1.0, formed * blocks
            total += 2.0 * inputs * pairs
            total += 2.0 * (units * (1 if self._is_penultimate(index) else outputs)) * copies * both
        if self.num_dense:
            total += 2.0 * formed * (draws // self.draws_per_slot) * (outputs * self.num_dense) * copies
        if self.sketch is not None:
            width = self.sketch.num_columns * (1 if self.sketch.joint else outputs)
            of_groups = 1.0 if wanted.stderr and self.pair_blocks else 0.0
            total += 2.0 * (formed + of_groups) * self._num_sketched * width * copies
        return total

    def _widths(self, index: int) -> tuple[int, int]:
        """Return the lengths of h̃ and δ of an outer site."""
        return linear_widths(self.evaluator.space, self.plan.outer[index])

    @property
    def _item_bytes(self) -> int:
        return next(iter(self.evaluator.space.values(self.evaluator.model).values())).element_size()

    @property
    def _probe_bytes(self) -> int:
        """Bytes of the sketch's probes that `compute` keeps."""
        if self.sketch is None or self.sketched is None:
            return 0
        outputs = len(self.columns) if self.sketch.joint and not self.sketch.num_directions else 1
        shapes = self._shapes(self.sketched.names()).values()
        sides = [(outputs * math.prod(shape[:1]), math.prod(shape[1:])) for shape in shapes]
        return min(KEPT_BYTES, self._item_bytes * self.sketch.num_columns * sum(map(sum, sides)))

    @property
    def _pair_weight_bytes(self) -> int:
        """Bytes of the weights of pairs of draws, in float64 and in the model's dtype."""
        if self.penultimate is None:
            return 0
        return (8 + self._item_bytes) * self.num_draws**2 * self._widths(self.penultimate)[1]

    def _shapes(self, names: Collection[str]) -> dict[str, tuple[int, ...]]:
        space = self.evaluator.space
        return {name: shape for name, shape in zip(space.names, space.shapes, strict=True) if name in names}

    def _is_penultimate(self, index: int) -> bool:
        """Return whether a layered site keeps one number a unit for all outputs."""
        if self.pair_blocks:
            return index == self.penultimate
        return shares_derivatives(self.plan, self.plan.outer[index], full=not self.sums_outputs)

    # Products ---------------------------------------------------------------------------------------------------------

    def prepare(self, rows: Rows, wanted: Wanted) -> dict[str, Tensor]:
        """Combine the blocks of formed, sketched and shared-input gradients; layered ones stay as they are."""
        prepared = dict(rows)
        if "dense" in prepared:
            prepared["dense_columns"] = self._columns(prepared.pop("dense"), wanted)
        if "readout" in prepared:
            prepared["readout_columns"] = self._columns(prepared.pop("readout"), wanted)
        if "sketch" in prepared:
            prepared.pop("sketch")
            if self.pair_blocks:
                prepared |= prepared_sketch(self._sketches(rows), self.num_sketch_groups, wanted)
            else:
                prepared["sketch_blocks"] = self._sketch_blocks(rows)
        for index in self.shared if self.pair_blocks else ():
            if f"gradient_{index}" in prepared:
                gradients = prepared.pop(f"gradient_{index}")
                if self.draws_per_block > 1:
                    gradients = gradients.unflatten(1, (self.num_blocks, -1)).mean(2)
                prepared[f"gradient_columns_{index}"] = combined(gradients, wanted)
                prepared[f"shared_input_{index}"] = prepared.pop(f"input_{index}")[:, 0]
        return prepared

    def _sketches(self, rows: Rows) -> Float[Tensor, "n r c k"]:
        """Return sketches with an axis of outputs, of length 1 if they are joint."""
        assert self.sketch is not None
        return rows["sketch"][:, :, None] if self.sketch.joint else rows["sketch"]

    def _sketch_blocks(self, rows: Rows) -> Float[Tensor, "n r c _"]:
        """Return the groups of columns of the one sketch at θ as blocks: a view, 1/√R of R independent sketches."""
        return self._sketches(rows)[:, 0].unflatten(2, (self.num_blocks, -1)).transpose(1, 2)

    def _columns(self, gradients: Float[Tensor, "n q c k"], wanted: Wanted) -> Float[Tensor, "n w c _"]:
        """Return formed gradients as products take them; without pairs, the draws of a block side by side."""
        if self.pair_blocks:
            return combined(gradients, wanted)
        if self.draws_per_block == 1:
            return gradients
        by_draw = gradients.unflatten(1, (self.num_blocks, -1)).transpose(2, 3).flatten(3)
        return by_draw / self.draws_per_block**0.5

    def _layered(self, rows: Rows) -> Layered | None:
        """Return the layers whose pairs of draws are multiplied one by one; None without any."""
        indices = [i for i in range(len(self.plan.outer)) if f"input_{i}" in rows and rows[f"input_{i}"].shape[-1]]
        if not indices:
            return None
        inputs, gradients = (tuple(rows[f"{kind}_{i}"] for i in indices) for kind in ("input", "gradient"))
        return Layered(inputs, gradients, tuple(self._pair_weights if i == self.penultimate else None for i in indices))

    @cached_property
    def _pair_weights(self) -> Float[Tensor, "s t o"]:
        """What derivatives of two draws are multiplied by."""
        assert self.plan.output_layers is not None
        assert self.drawing is not None
        model, space = self.evaluator.model, self.evaluator.space
        weights = pair_weights(model, self.plan.output_layers.readout, space, self.drawing, self.columns)
        return weights.to(next(iter(space.values(model).values())).dtype)

    def resolved(self, rows: Rows, others: Rows, meeting: Meeting) -> Bool[Tensor, "*tile"] | None:
        """Return None: a gradient is known from every draw."""

    def changes(self, rows: Rows) -> None:
        """Return None: every entry is resolved."""

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        """Sum the block products of one tile."""
        rows, others = (self.prepare(part, wanted) for part in (rows, others))
        sums = self.no_sums(rows, others, meeting, wanted)
        add_products_(sums, self.weighted_products(rows, others, wanted), meeting)
        return sums

    def no_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        """Return the sums of a tile before anything is added."""
        return empty_sums(
            meeting.shape(num_rows(rows), num_rows(others), len(self.columns)),
            self.num_blocks,
            wanted,
            pair_blocks=self.pair_blocks,
            device=next(iter(rows.values())).device,
            num_groups=self.num_sketch_groups,
        )

    def weighted_products(self, rows: Rows, others: Rows, wanted: Wanted) -> list[WeightedProduct]:
        """Return the matrix products of prepared row sets."""
        products, blocks, pair_blocks = list[WeightedProduct](), self.num_blocks, self.pair_blocks
        left, right = self._layered(rows), self._layered(others)
        if left is not None and right is not None:
            products += layered_weighted_products(left, right, blocks, wanted, pair_blocks=pair_blocks)
        for index in self.shared if pair_blocks else ():
            name, shared = f"gradient_columns_{index}", f"shared_input_{index}"
            inputs = Inputs(rows[shared], others[shared])
            of_layer = formed_weighted_products(rows[name], others[name], blocks, wanted)
            products += [replace(product, inputs=inputs) for product in of_layer]
        if "sketch_blocks" in rows:
            for each in alone_weighted_products(rows["sketch_blocks"], others["sketch_blocks"], wanted):
                products.append(replace(each, factors={name: factor * blocks for name, factor in each.factors.items()}))
        if (name := "readout_columns") in rows:
            pair = rows[name], others[name]
            if pair_blocks:
                of_readout = formed_weighted_products(*pair, blocks, wanted)
            else:
                of_readout = alone_weighted_products(*pair, wanted)
            # summed outputs are in h̃ already
            products += of_readout if self.sums_outputs else of_each_output(of_readout, len(self.columns), full=True)
        names = ("dense_columns",)
        return products + column_weighted_products(rows, others, names, blocks, wanted, pair_blocks=pair_blocks)

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "..."]:
        """Return every block product of few entries, in float64."""
        parts = []
        left, right = self._layered(rows), self._layered(others)
        if left is not None and right is not None:
            parts.append(layered_block_products(left, right, meeting, self.num_blocks, pair_blocks=self.pair_blocks))
        if "readout" in rows:
            alone = replace(meeting, full=False, column_outputs=None)
            product = self._products_of_blocks(rows["readout"], others["readout"], alone)
            parts.append(meeting.same_output(product, len(self.columns)) if meeting.full else product)
        if "dense" in rows:
            parts.append(self._products_of_blocks(rows["dense"], others["dense"], meeting))
        if "sketch" in rows and self.pair_blocks:
            parts.append(formed_block_products(self._sketches(rows), self._sketches(others), meeting))
        elif "sketch" in rows:
            own, other = self._sketch_blocks(rows), self._sketch_blocks(others)
            parts.append(self.num_blocks * alone_block_products(own, other, meeting))
        return torch.stack(parts).sum(0)

    def _products_of_blocks(
        self, rows: Float[Tensor, "n q c k"], others: Float[Tensor, "n q c k"], meeting: Meeting
    ) -> Float64[Tensor, "..."]:
        """Return the block products of formed gradients."""
        if self.pair_blocks:
            return formed_block_products(rows, others, meeting)
        own, other = (self._columns(part, Wanted(stderr=True)) for part in (rows, others))
        return alone_block_products(own, other, meeting)
