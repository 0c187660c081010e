"""Features made of gradients at random parameters: `autodiff`, the kernel `averaged`, and the ordinary NTK (`local`).

`autodiff`: g(x) = E[∇f(x; θ + U^{1/P} z)], U ~ Uniform(0, 1), for f locally Lipschitz in θ and any radial ρ (DESIGN
§1).
`averaged`: E_z[NTK(θ + U^{1/P} z)], each draw with itself. `local`: one gradient, at θ.
A Linear layer's gradient δ ⊗ h̃ stays in two factors, or is averaged over a block's draws where that needs fewer
operations, or is sketched (`nntk_dist.layers.sketch`); which, `nntk_dist.estimators.contraction` decides. A draw moves
the model's parameters in place, once for all rows; each batch takes one pass forward and one back, whatever the number
of outputs.

Axes: n rows, s draws, r blocks, q slots (blocks, or draws where each meets only itself), c outputs, k dense
parameters or columns of the sketch.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.estimators.contraction import linear_widths, shares_derivatives
from nntk_dist.layers.penultimate import pair_weights
from nntk_dist.layers.per_example import add_dense_gradients_, write_extended_input
from nntk_dist.layers.readout import activation_derivatives_of_pass, add_readout_, derivatives_of_pass
from nntk_dist.layers.recording import Recording
from nntk_dist.layers.sites import Site, SitePlan
from nntk_dist.layers.sketch import KEPT_BYTES, Projector, Sketch
from nntk_dist.layers.sketched_gradients import Pass, sketched_gradients
from nntk_dist.models.evaluation import Evaluator, check_finite, moved_in_place
from nntk_dist.models.noise import fixed_noise
from nntk_dist.products.block_sums import BlockSums, Meeting, empty_sums
from nntk_dist.products.features import ArraySpec, Rows, block_range
from nntk_dist.products.formed import (
    alone_products,
    combined,
    formed_products,
    formed_terms,
    prepared_sketch,
    terms_of_columns,
)
from nntk_dist.products.layered import Layered, layered_products, layered_terms
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import Inputs, Term, add_terms_
from nntk_dist.runtime.batches import in_batches
from nntk_dist.sampling.draws import Drawing

_AVERAGED = ("dense", "sketch", "readout")  # over the draws of a slot
# What prepared arrays with an axis of outputs begin with.
_WITH_OUTPUTS = ("gradient_", "dense_", "sketch_", "readout_")


@dataclass(frozen=True)
class GradientFeatures:
    """Gradients under all draws, by layer; `drawing` None means the one gradient at θ itself.

    The parameters of `sketched`, a plan without outer sites, are in `sketch` alone: where blocks are paired only.
    `sums_outputs` is for kernels that sum products over the outputs at hand: what outputs share is then kept once.
    `shared` numbers the outer sites whose h̃ no draw changes (`nntk_dist.layers.site_trial`): where blocks are
    paired, these meet as mean output gradients, R products of δ instead of S². `penultimate` and `readout` number
    the layers of `nntk_dist.layers.penultimate` where blocks are paired and outputs summed: the former keeps φ'(a),
    which all outputs share and which come with the first of them; the latter block means of h̃.
    """

    evaluator: Evaluator
    plan: SitePlan
    drawing: Drawing | None
    columns: tuple[int, ...]
    pair_blocks: bool
    shows_unresolved: bool = False
    sketch: Sketch | None = None
    sketched: SitePlan | None = None
    sums_outputs: bool = False
    shared: frozenset[int] = frozenset()
    penultimate: int | None = None
    readout: int | None = None

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
    def probe_bytes(self) -> int:
        """What `compute` keeps of the sketch's probes, in the model's type."""
        if self.sketch is None or self.sketched is None:
            return 0
        space, names = self.evaluator.space, self.sketched.names()
        outputs = len(self.columns) if self.sketch.joint else 1
        sides = [(outputs * math.prod(s[:1]), math.prod(s[1:])) for s in self._shapes(names).values()]
        item = next(iter(space.values(self.evaluator.model).values())).element_size()
        return min(KEPT_BYTES, item * self.sketch.num_columns * sum(map(sum, sides)))

    def _shapes(self, names: Collection[str]) -> dict[str, tuple[int, ...]]:
        space = self.evaluator.space
        return {name: shape for name, shape in zip(space.names, space.shapes, strict=True) if name in names}

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return self._arrays(self.columns)

    def _arrays(self, columns: Sequence[int]) -> tuple[ArraySpec, ...]:
        num_outputs, specs = len(columns), []
        for index, site in enumerate(self.plan.outer):
            inputs, units = linear_widths(self.evaluator.model, site.module, site.attributes)
            if index == self.readout:
                shape = (self.num_blocks, 1, inputs)
                specs.append(ArraySpec("readout", ("block", "joint_output", "readout_unit"), shape))
                continue
            if index == self.penultimate and self.columns[0] not in columns:
                inputs = units = 0  # products of no length add nothing
            specs.append(ArraySpec(f"input_{index}", ("draw", f"input_unit_{index}"), (self.num_draws, inputs)))
            axis, length = ("joint_output", 1) if self._is_penultimate(index) else ("output", num_outputs)
            shape = (self.num_draws, length, units)
            specs.append(ArraySpec(f"gradient_{index}", ("draw", axis, f"unit_{index}"), shape))
        if self.num_dense:
            axis = "block" if self.pair_blocks else "draw"
            shape = (self.num_draws // self.draws_per_slot, num_outputs, self.num_dense)
            specs.append(ArraySpec("dense", (axis, "output", "parameter"), shape))
        if self.sketch is not None:
            blocks, numbers = self.num_blocks, self.sketch.num_columns
            if self.sketch.joint:
                specs.append(ArraySpec("sketch", ("block", "column"), (blocks, numbers)))
            else:
                specs.append(ArraySpec("sketch", ("block", "output", "column"), (blocks, num_outputs, numbers)))
        return tuple(specs)

    def make_metric(self) -> Float64[Tensor, "r r"]:
        """M of a kernel that is sketched as a whole: plugin = Φ (M ⊗ I) Φᵀ, Φ the sketches of the block means."""
        return torch.full((self.num_blocks, self.num_blocks), self.num_blocks**-2, dtype=torch.float64)

    def outputs(self, x: Tensor, *, batch: int | None = None) -> Float[Tensor, "n c"]:
        return self.evaluator.expected(x, 0 if self.drawing is None else self.drawing.seed, batch)

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        block_range(draws, self.draws_per_block)
        result = self._empty(x, draws, columns)
        projector = None if self.sketch is None else Projector(self.sketch, columns)
        batches = list(in_batches(x, batch))
        with self._parameters_of(draws) as moved:
            for draw in moved:
                if projector is not None:
                    projector.forget_weights()
                with self._noise_of(draw):
                    for inputs, rows in batches:
                        own = {name: array[rows] for name, array in result.items()}
                        self._add_pass_(own, draw - draws.start, inputs, columns, projector)
        for name, array in result.items():
            if name in _AVERAGED:
                array /= self.draws_per_slot
            check_finite(array, f"the model's gradient under draws {draws.start} to {draws.stop - 1}")
        return result

    def _empty(self, x: Tensor, draws: range, columns: Sequence[int]) -> dict[str, Tensor]:
        """Where the features of these rows go; what is averaged begins at zero."""
        like = next(iter(self.evaluator.space.values(self.evaluator.model).values()))
        result = {}
        for spec in self._arrays(columns):
            shape = (len(x), spec.shape[0] * len(draws) // self.num_draws, *spec.shape[1:])
            make = like.new_zeros if spec.name in _AVERAGED else like.new_empty
            result[spec.name] = make(shape)
        return result

    @contextmanager
    def _parameters_of(self, draws: range) -> Iterator[Iterator[int]]:
        """The draws, while the model's parameters are θ + U^{1/P} z of each, or θ; θ again at the end."""
        if self.drawing is None:
            yield iter(draws)
            return
        model, space = self.evaluator.model, self.evaluator.space
        device = next(iter(space.values(model).values())).device
        displacements = self.drawing.shrunken(draws, device=device)
        with moved_in_place(model, space) as move:

            def one_by_one() -> Iterator[int]:
                for draw, z in zip(draws, displacements, strict=True):
                    move(z)
                    yield draw

            yield one_by_one()

    def _noise_of(self, draw: int) -> AbstractContextManager[None]:
        """The random function that a model with noise is under this draw."""
        if self.drawing is None or not self.evaluator.is_random:
            return nullcontext()
        return fixed_noise(self.evaluator.model, self.drawing.seed, draw // self.drawing.group_size)

    def _add_pass_(
        self, rows: dict[str, Tensor], place: int, x: Tensor, columns: Sequence[int], projector: Projector | None
    ) -> None:
        """One pass over a batch, under the parameters of draw number `place`, of which the first rows count."""
        model, slot = self.evaluator.model, place // self.draws_per_slot
        recording = Recording(model, self._sites, x)
        passed = self._passed(x, recording, columns)
        for index, site in enumerate(self.plan.outer):
            (call,), (delta,) = recording.calls[site.module], passed.deltas[site.module]
            if index == self.readout:
                add_readout_(rows["readout"][:, slot, 0], site, recording, len(columns))
                continue
            gradients = rows[f"gradient_{index}"][:, place]
            if not gradients.numel():
                continue
            write_extended_input(site, call.h, rows[f"input_{index}"][:, place])
            if index == self.penultimate:
                gradients[:, 0] = self._activation_derivatives(recording, passed, delta)[: len(gradients)]
            elif self._is_penultimate(index):
                assert passed.derivatives is not None
                assert passed.shares is not None
                torch.mul(passed.derivatives[: len(gradients)], passed.shares.norm(dim=0), out=gradients[:, 0])
            else:
                gradients.copy_(delta.flatten(2)[: len(gradients)])
        if "dense" in rows:
            sums = self._named(rows["dense"][:, slot])
            add_dense_gradients_(sums, model, self.plan, recording, passed.deltas, x, passed.parameters, columns)
        if projector is not None and self.sketched is not None:
            sketch = rows["sketch"][:, slot]
            sketch += sketched_gradients(model, self.sketched, projector, passed)[: len(sketch)]

    @property
    def _sites(self) -> tuple[Site, ...]:
        return (*self.plan.outer, *self.plan.dense, *(() if self.sketched is None else self.sketched.dense))

    def _is_penultimate(self, index: int) -> bool:
        """Whether a layered site's gradients are kept as one number a unit, for all outputs."""
        if self.pair_blocks:
            return index == self.penultimate
        return shares_derivatives(self.plan, self.plan.outer[index], full=not self.sums_outputs)

    @cached_property
    def _pair_weights(self) -> Float[Tensor, "s t o"]:
        """What derivatives of two draws are multiplied by."""
        assert self.plan.output_layers is not None
        assert self.drawing is not None
        model, space = self.evaluator.model, self.evaluator.space
        weights = pair_weights(model, self.plan.output_layers.readout, space, self.drawing, self.columns)
        return weights.to(next(iter(space.values(model).values())).dtype)

    @property
    def pair_weight_bytes(self) -> int:
        """What the weights of pairs of draws take, in float64 and in the model's type."""
        if self.penultimate is None:
            return 0
        model, site = self.evaluator.model, self.plan.outer[self.penultimate]
        item = next(iter(self.evaluator.space.values(model).values())).element_size()
        return (8 + item) * self.num_draws**2 * linear_widths(model, site.module, site.attributes)[1]

    def _activation_derivatives(self, recording: Recording, passed: Pass, delta: Tensor) -> Float[Tensor, "n o"]:
        """Derivatives for pairs of draws, from all outputs: the ones at hand need not depend on every unit."""
        model, pair = self.evaluator.model, self.plan.output_layers
        assert pair is not None
        if tuple(passed.columns) != self.columns:
            (delta,) = recording.gradients(self.columns)[pair.module]
        return activation_derivatives_of_pass(model, pair, recording, delta, self.columns)

    def _passed(self, x: Tensor, recording: Recording, columns: Sequence[int]) -> Pass:
        """What one pass gives, with the derivatives of the layer before the readout."""
        deltas, parameters = recording.gradients(columns), self.evaluator.space.values(self.evaluator.model)
        plain, pair = Pass(x, recording, deltas, parameters, columns), self.plan.output_layers
        if pair is None or not self.sums_outputs:
            return plain
        (delta,) = deltas[pair.module]
        derivatives, shares = derivatives_of_pass(self.evaluator.model, pair, recording, delta, columns)
        return replace(plain, penultimate=pair.module, derivatives=derivatives, shares=shares)

    def _named(self, dense: Float[Tensor, "n c k"]) -> dict[str, Float[Tensor, "n c ..."]]:
        """The formed gradients of one slot by parameter, as views."""
        names = self.plan.dense_names()
        shapes = self._shapes(names)
        parts = dense.split([math.prod(shapes[name]) for name in names], dim=2)
        named = zip(names, parts, strict=True)
        return {name: part.unflatten(2, shapes[name]) if shapes[name] else part[..., 0] for name, part in named}

    def prepare(self, rows: Rows, wanted: Wanted) -> dict[str, Tensor]:
        prepared = dict(rows)
        if "dense" in prepared:
            prepared["dense_columns"] = self._columns(prepared.pop("dense"), wanted)
        if "readout" in prepared:
            prepared["readout_columns"] = combined(prepared.pop("readout"), wanted)
        if "sketch" in prepared:
            prepared.pop("sketch")
            prepared |= prepared_sketch(self._sketches(rows), self.num_sketch_groups, wanted)
        for index in self.shared if self.pair_blocks else ():
            if f"gradient_{index}" in prepared:
                gradients = prepared.pop(f"gradient_{index}")
                if self.draws_per_block > 1:
                    gradients = gradients.unflatten(1, (self.num_blocks, -1)).mean(2)
                prepared[f"gradient_columns_{index}"] = combined(gradients, wanted)
                prepared[f"shared_input_{index}"] = prepared.pop(f"input_{index}")[:, 0]
        return prepared

    def _sketches(self, rows: Rows) -> Float[Tensor, "n r e k"]:
        """Sketches with an axis of outputs, one where they are joint."""
        assert self.sketch is not None
        return rows["sketch"][:, :, None] if self.sketch.joint else rows["sketch"]

    def _columns(self, gradients: Float[Tensor, "n q c k"], wanted: Wanted) -> Float[Tensor, "n w c _"]:
        """Formed gradients as products take them: of a slot for each draw, the draws of a block beside each other."""
        if self.pair_blocks:
            return combined(gradients, wanted)
        if self.draws_per_block == 1:
            return gradients
        by_draw = gradients.unflatten(1, (self.num_blocks, -1)).transpose(2, 3).flatten(3)
        return by_draw / self.draws_per_block**0.5

    def _layered(self, rows: Rows) -> Layered | None:
        """The layers whose pairs of draws are taken one by one, if any."""
        indices = [i for i in range(len(self.plan.outer)) if f"input_{i}" in rows and rows[f"input_{i}"].shape[-1]]
        if not indices:
            return None
        inputs, gradients = (tuple(rows[f"{kind}_{i}"] for i in indices) for kind in ("input", "gradient"))
        return Layered(inputs, gradients, tuple(self._pair_weights if i == self.penultimate else None for i in indices))

    def block_sums(self, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted) -> BlockSums:
        rows, others = (self.prepare(part, wanted) for part in (rows, others))
        num_outputs = _num_outputs(rows)
        first = next(iter(rows.values()))
        shape = meeting.shape(len(first), len(next(iter(others.values()))), num_outputs)

        sums = empty_sums(
            shape,
            self.num_blocks,
            wanted,
            pair_blocks=self.pair_blocks,
            device=first.device,
            num_groups=self.num_sketch_groups,
        )
        add_terms_(sums, self.terms(rows, others, wanted), meeting)
        return sums

    def terms(self, rows: Rows, others: Rows, wanted: Wanted) -> list[Term]:
        terms, blocks, pair_blocks = list[Term](), self.num_blocks, self.pair_blocks
        left, right = self._layered(rows), self._layered(others)
        if left is not None and right is not None:
            terms += layered_terms(left, right, blocks, wanted, pair_blocks=pair_blocks)
        for index in self.shared if pair_blocks else ():
            name, shared = f"gradient_columns_{index}", f"shared_input_{index}"
            inputs = Inputs(rows[shared], others[shared])
            of_layer = formed_terms(rows[name], others[name], blocks, wanted)
            terms += [replace(term, inputs=inputs) for term in of_layer]
        names = ("readout_columns", "dense_columns")
        return terms + terms_of_columns(rows, others, names, blocks, wanted, pair_blocks=pair_blocks)

    def block_products(self, rows: Rows, others: Rows, meeting: Meeting) -> Float64[Tensor, "..."]:
        terms = []
        left, right = self._layered(rows), self._layered(others)
        if left is not None and right is not None:
            terms.append(layered_products(left, right, meeting, self.num_blocks, pair_blocks=self.pair_blocks))
        if "readout" in rows:
            terms.append(formed_products(rows["readout"], others["readout"], meeting))
        if "dense" in rows:
            if self.pair_blocks:
                terms.append(formed_products(rows["dense"], others["dense"], meeting))
            else:
                own, other = (self._columns(part["dense"], Wanted(stderr=True)) for part in (rows, others))
                terms.append(alone_products(own, other, meeting))
        if "sketch" in rows:
            terms.append(formed_products(self._sketches(rows), self._sketches(others), meeting))
        return torch.stack(terms).sum(0)


def _num_outputs(rows: Rows) -> int:
    """How many outputs prepared rows keep apart."""
    return max(array.shape[-2] for name, array in rows.items() if name.startswith(_WITH_OUTPUTS))


def feature_bytes(arrays: Mapping[str, Tensor]) -> int:
    """Bytes of a row set."""
    return sum(array.numel() * array.element_size() for array in arrays.values())
