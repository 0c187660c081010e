"""Features made of gradients at random parameters: `autodiff`, the kernel `averaged`, and the ordinary NTK (`local`).

`autodiff`: g(x) = E[∇f(x; θ + U^{1/P} z)], U ~ Uniform(0, 1), for f locally Lipschitz in θ and any radial ρ (DESIGN
§1).
`averaged`: E_z[NTK(θ + U^{1/P} z)], each draw with itself. `local`: one gradient, at θ.
A Linear layer's gradient δ ⊗ h̃ stays in two factors, or is averaged over a block's draws where that needs fewer
operations, or is sketched (`nntk_dist.sketching`); which, `nntk_dist.contraction` decides.

Axes: n rows, s draws, r blocks, q slots (blocks, or draws where each meets only itself), c outputs, k dense
parameters or columns of the sketch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.block_sums import BlockSums, Meeting, empty_sums
from nntk_dist.capture import Recording, SitePlan, dense_gradients, extended_input
from nntk_dist.contraction import linear_widths
from nntk_dist.drawing import Drawing
from nntk_dist.evaluation import Evaluator, check_finite
from nntk_dist.features import ArraySpec, Rows, block_range
from nntk_dist.formed_products import (
    add_alone_,
    add_formed_,
    add_sketched_,
    alone_products,
    combined,
    formed_products,
    prepared_sketch,
)
from nntk_dist.layered_products import Layered, add_layered_, layered_products
from nntk_dist.sketching import Sketch, sketched_gradients
from nntk_dist.stochastic import fixed_noise


@dataclass(frozen=True)
class GradientFeatures:
    """Gradients under all draws, by layer; `drawing` None means the one gradient at θ itself.

    The parameters of `sketched`, a plan without outer sites, are in `sketch` alone: where blocks are paired only.
    `shared` numbers the outer sites whose h̃ no draw changes (`nntk_dist.shared_inputs`): where blocks are paired, these
    meet as mean output gradients, R products of δ instead of S².
    """

    evaluator: Evaluator
    plan: SitePlan
    drawing: Drawing | None
    columns: tuple[int, ...]
    pair_blocks: bool
    shows_unresolved: bool = False
    sketch: Sketch | None = None
    sketched: SitePlan | None = None
    shared: frozenset[int] = frozenset()

    @property
    def num_draws(self) -> int:
        return 1 if self.drawing is None else self.drawing.num_draws

    @property
    def num_blocks(self) -> int:
        return 1 if self.drawing is None else self.drawing.num_blocks

    @property
    def num_parameters(self) -> int:
        return self.evaluator.space.num_parameters

    @property
    def draws_per_block(self) -> int:
        return self.num_draws // self.num_blocks

    @property
    def draws_per_slot(self) -> int:
        """Dense gradients are averaged over a block where blocks are paired; otherwise every draw is needed."""
        return self.draws_per_block if self.pair_blocks else 1

    @property
    def num_dense(self) -> int:
        sizes = dict(zip(self.evaluator.space.names, self.evaluator.space.sizes, strict=True))
        return sum(sizes[name] for name in self.plan.dense_names())

    @property
    def num_sketch_groups(self) -> int:
        return 0 if self.sketch is None else self.sketch.num_groups

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        specs = []
        for index, site in enumerate(self.plan.outer):
            inputs, units = linear_widths(self.evaluator.model, site.module, site.attributes)
            specs.append(ArraySpec(f"input_{index}", ("draw", f"input_unit_{index}"), (self.num_draws, inputs)))
            specs.append(
                ArraySpec(
                    f"gradient_{index}", ("draw", "output", f"unit_{index}"), (self.num_draws, len(self.columns), units)
                )
            )
        if self.num_dense:
            axis = "block" if self.pair_blocks else "draw"
            shape = (self.num_draws // self.draws_per_slot, len(self.columns), self.num_dense)
            specs.append(ArraySpec("dense", (axis, "output", "parameter"), shape))
        if self.sketch is not None:
            shape = (self.num_blocks, len(self.columns), self.sketch.num_columns)
            specs.append(ArraySpec("sketch", ("block", "output", "column"), shape))
        return tuple(specs)

    def make_metric(self) -> Float64[Tensor, "r r"]:
        """M of a kernel that is sketched as a whole: plugin = Φ (M ⊗ I) Φᵀ, Φ the sketches of the block means."""
        return torch.full((self.num_blocks, self.num_blocks), self.num_blocks**-2, dtype=torch.float64)

    def outputs(self, x: Tensor) -> Float[Tensor, "n c"]:
        return self.evaluator.expected(x, 0 if self.drawing is None else self.drawing.seed)

    def parameters_at(self, draws: range) -> Iterator[dict[str, Tensor]]:
        """The selected parameters at θ + U^{1/P} z of each draw, or at θ."""
        base = self.evaluator.space.values(self.evaluator.model)
        if self.drawing is None:
            yield base
            return
        first = next(iter(base.values()))
        for z in self.drawing.shrunken(draws, device=first.device):
            yield self.evaluator.space.moved(base, z.to(first.dtype))

    def compute(self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int]) -> dict[str, Tensor]:
        block_range(draws, self.draws_per_block)
        outer: list[dict[str, Tensor]] = []
        slots: dict[str, list[Tensor]] = {}
        for draw, parameters in zip(draws, self.parameters_at(draws), strict=True):
            with self._noise_of(draw):
                factors, formed = self._one_draw(x, parameters, columns)
            outer.append(factors)
            for name, values in formed.items():
                if (draw - draws.start) % self.draws_per_slot:
                    slots[name][-1] += values
                else:
                    slots.setdefault(name, []).append(values)
        result = {name: torch.stack([factors[name] for factors in outer], dim=1) for name in outer[0]}
        result |= {name: torch.stack(parts, dim=1).div_(self.draws_per_slot) for name, parts in slots.items()}
        for array in result.values():
            check_finite(array, f"the model's gradient under draws {draws.start} to {draws.stop - 1}")
        return result

    def _noise_of(self, draw: int) -> AbstractContextManager[None]:
        """The random function that a model with noise is under this draw."""
        if self.drawing is None or not self.evaluator.is_random:
            return nullcontext()
        return fixed_noise(self.evaluator.model, self.drawing.seed, draw // self.drawing.group_size)

    def _one_draw(
        self, x: Tensor, parameters: Mapping[str, Tensor], columns: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Under one draw, by array name: the factors of outer layers, and what is averaged over a slot's draws."""
        model = self.evaluator.model
        sketched = () if self.sketched is None else self.sketched.dense
        recording = Recording(model, (*self.plan.outer, *self.plan.dense, *sketched), x, parameters)
        deltas = recording.gradients(columns)
        factors = {}
        for index, site in enumerate(self.plan.outer):
            (call,), (delta,) = recording.calls[site.module], deltas[site.module]
            factors[f"input_{index}"] = extended_input(site, call.h)
            factors[f"gradient_{index}"] = delta.flatten(2)
        formed: dict[str, Tensor] = {}
        if names := self.plan.dense_names():
            dense = dense_gradients(model, self.plan, recording, deltas, x, parameters, columns)
            formed["dense"] = torch.cat([dense[name].reshape(len(x), len(columns), -1) for name in names], dim=2)
        if self.sketch is not None and self.sketched is not None:
            formed["sketch"] = sketched_gradients(
                model, self.sketched, self.sketch, recording, deltas, x, parameters, columns
            )
        return factors, formed

    def prepare(self, rows: Rows, *, by_block: bool) -> dict[str, Tensor]:
        prepared = dict(rows)
        if "dense" in prepared:
            prepared["dense_columns"] = self._columns(prepared.pop("dense"), by_block=by_block)
        if "sketch" in prepared:
            prepared |= prepared_sketch(prepared.pop("sketch"), self.num_sketch_groups, by_block=by_block)
        for index in self.shared if self.pair_blocks else ():
            if f"gradient_{index}" in prepared:
                gradients = prepared.pop(f"gradient_{index}").unflatten(1, (self.num_blocks, -1)).mean(2)
                prepared[f"gradient_columns_{index}"] = combined(gradients, by_block=by_block)
                prepared[f"shared_input_{index}"] = prepared.pop(f"input_{index}")[:, 0]
        return prepared

    def _columns(self, gradients: Float[Tensor, "n q c k"], *, by_block: bool) -> Float[Tensor, "n w c _"]:
        """Formed gradients as products take them: of a slot for each draw, the draws of a block beside each other."""
        if self.pair_blocks:
            return combined(gradients, by_block=by_block)
        if self.draws_per_block == 1:
            return gradients
        by_draw = gradients.unflatten(1, (self.num_blocks, -1)).transpose(2, 3).flatten(3)
        return by_draw / self.draws_per_block**0.5

    def _layered(self, rows: Rows) -> Layered | None:
        """The layers whose pairs of draws are taken one by one, if any."""
        indices = [i for i in range(len(self.plan.outer)) if f"input_{i}" in rows]
        if not indices:
            return None
        return Layered(tuple(rows[f"input_{i}"] for i in indices), tuple(rows[f"gradient_{i}"] for i in indices))

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, *, by_block: bool) -> BlockSums:
        rows, others = (self.prepare(part, by_block=by_block) for part in (rows, others))
        num_outputs = _num_outputs(rows)
        first = next(iter(rows.values()))
        shape = meeting.shape(len(first), len(next(iter(others.values()))), num_outputs)

        def nothing(num_groups: int = 0) -> BlockSums:
            pair, blocks, device = self.pair_blocks, self.num_blocks, first.device
            return empty_sums(shape, blocks, pair_blocks=pair, by_block=by_block, device=device, num_groups=num_groups)

        sums = nothing(self.num_sketch_groups)
        left, right = self._layered(rows), self._layered(others)
        if left is not None and right is not None:
            add_layered_(sums, left, right, meeting)
        for index in self.shared if self.pair_blocks else ():
            name, layer = f"gradient_columns_{index}", nothing()
            add_formed_(layer, rows[name], others[name], meeting)
            name = f"shared_input_{index}"
            sums.add_(layer.scaled_(meeting.shared(rows[name], others[name], num_outputs)))
        if (name := "dense_columns") in rows:
            add = add_formed_ if self.pair_blocks else add_alone_
            add(sums, rows[name], others[name], meeting)
        if "sketch_columns" in rows:
            add_sketched_(sums, rows, others, meeting)
        return sums

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "..."]:
        terms = []
        left, right = self._layered(rows), self._layered(others)
        if left is not None and right is not None:
            terms.append(layered_products(left, right, meeting, self.num_blocks, pair_blocks=self.pair_blocks))
        if "dense" in rows:
            if self.pair_blocks:
                terms.append(formed_products(rows["dense"], others["dense"], meeting))
            else:
                own, other = (self._columns(part["dense"], by_block=True) for part in (rows, others))
                terms.append(alone_products(own, other, meeting))
        if "sketch" in rows:
            terms.append(formed_products(rows["sketch"], others["sketch"], meeting))
        return torch.stack(terms).sum(0)


def _num_outputs(rows: Rows) -> int:
    """C of prepared rows."""
    for name, array in rows.items():
        if name.startswith(("gradient_", "dense_", "sketch_")):
            return array.shape[-2]
    raise ValueError("rows without gradients")


def feature_bytes(arrays: Mapping[str, Tensor]) -> int:
    """Bytes of a row set."""
    return sum(array.numel() * array.element_size() for array in arrays.values())
