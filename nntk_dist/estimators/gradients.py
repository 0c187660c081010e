"""Gradients at random parameters: the estimator `autodiff`, and the kernels `averaged` and `local`.

`autodiff`  g(x) = E[∇f(x; θ + U^{1/P} z)], U ~ Uniform(0, 1), for f locally Lipschitz in θ and every radial ρ.
`averaged`  E_z[NTK(θ + U^{1/P} z)], each draw with itself.
`local`     one gradient, at θ.

A draw moves the model's parameters in place, once for all rows. Each batch takes one pass forward and one back for each
output. Arrays and products are in `nntk_dist.estimators.gradient_products`.

Axes: n rows, s draws, r blocks, c outputs, k dense parameters.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.errors import ModelError
from nntk_dist.estimators.gradient_products import GradientProducts
from nntk_dist.layers.per_example import add_dense_gradients_, write_extended_input
from nntk_dist.layers.readout import add_readout_, gradients_of_pass
from nntk_dist.layers.recording import Pass, Recording
from nntk_dist.layers.sites import Site
from nntk_dist.layers.sketches.projected_outputs import OutputProjector, make_projector
from nntk_dist.layers.sketches.sketch import Projector
from nntk_dist.layers.sketches.sketched_gradients import sketched_gradients
from nntk_dist.models.evaluation import FAILS_ON_INPUTS, check_finite, moved_in_place, trying
from nntk_dist.models.noise import fixed_noise
from nntk_dist.products.features import block_range
from nntk_dist.runtime.batches import in_batches

_AVERAGED = ("dense", "sketch", "readout")  # over the draws of a slot


@dataclass(frozen=True)
class GradientFeatures(GradientProducts):
    """Gradients under all draws, computed from the model; see `GradientProducts` for the fields."""

    def make_metric(self) -> Float64[Tensor, "r r"]:
        """Make M of a kernel that is sketched as a whole: plugin = Φ (M ⊗ I) Φᵀ, Φ the sketches of the block means."""
        count = self._num_sketched
        return torch.full((count, count), count**-2, dtype=torch.float64)

    def with_metric(self, metric: Float64[Tensor, "r r"]) -> Self:
        """Return the same features: products need no metric."""
        return self

    def outputs(self, x: Tensor, *, batch: int | None = None) -> Float[Tensor, "n c"]:
        """Compute f(x; θ), all outputs; of a model with noise, its mean function."""
        return self.evaluator.expected(x, 0 if self.drawing is None else self.drawing.seed, batch)

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        """Compute the arrays; see `FeatureMap.compute`."""
        (result,) = compute_together([self], x, draws, columns, batch=batch)
        return result

    def _empty(self, x: Tensor, draws: range, columns: Sequence[int]) -> dict[str, Tensor]:
        """Allocate the features of these rows; what is averaged starts at zero."""
        like = next(iter(self.evaluator.space.values(self.evaluator.model).values()))
        result = {}
        for spec in self._arrays(columns):
            shape = (len(x), spec.shape[0] * len(draws) // self.num_draws, *spec.shape[1:])
            make = like.new_zeros if spec.name in _AVERAGED else like.new_empty
            result[spec.name] = make(shape)
        return result

    @contextmanager
    def _parameters_of(self, draws: range) -> Iterator[Iterator[int]]:
        """Yield the draws while the model has the parameters θ + U^{1/P} z of each, or θ; restore θ at the end."""
        if self.drawing is None:
            yield iter(draws)
            return
        model, space = self.evaluator.model, self.evaluator.space
        device = next(iter(space.values(model).values())).device
        displacements = self.drawing.shrunken(draws, device=device)
        with moved_in_place(model, space) as move:

            def one_by_one() -> Iterator[int]:
                for draw in draws:
                    move(next(displacements))  # in no variable: it is as large as the model
                    yield draw

            yield one_by_one()

    def _noise_of(self, draw: int) -> AbstractContextManager[None]:
        """Fix the noise of a random model to the noise of one draw."""
        if self.drawing is None or not self.evaluator.is_random:
            return nullcontext()
        return fixed_noise(self.evaluator.model, self.drawing.seed, draw // self.drawing.group_size)

    def _add_pass_(
        self, rows: dict[str, Tensor], place: int, passed: Pass, projector: Projector | None, sketched: Pass
    ) -> None:
        """Add one pass over a batch under draw number `place`; rows beyond the end of the arrays are padding.

        `passed` has the gradients of all outputs, and `sketched` those that are sketched.
        """
        model, slot = self.evaluator.model, place // self.draws_per_slot
        recording, columns = passed.recording, passed.columns
        for index, site in enumerate(self.plan.outer):
            (call,) = recording.calls[site.module]
            if index == self.readout:
                num_summed = len(columns) if self.sums_outputs else 1
                add_readout_(rows["readout"][:, slot, 0], site, recording, num_summed)
                continue
            gradients = rows[f"gradient_{index}"][:, place]
            if not gradients.numel():
                continue
            write_extended_input(site, call.h, rows[f"input_{index}"][:, place])
            if self._is_penultimate(index):
                assert passed.derivatives is not None
                assert passed.weight is not None
                derivatives = passed.derivatives[: len(gradients)]
                # pairs of draws have the products of their W as weights; a draw with itself has the norm of its own
                gradients[:, 0] = derivatives if self.pair_blocks else derivatives * passed.weight.norm(dim=0)
            else:
                (delta,) = passed.deltas_of(site.module)
                gradients.copy_(delta.flatten(2)[: len(gradients)])
        if "dense" in rows:
            add_dense_gradients_(self._named(rows["dense"][:, slot]), model, self.plan, passed)
        if projector is not None and self.sketched is not None:
            sketch = rows["sketch"][:, slot]
            sketch += sketched_gradients(model, self.sketched, projector, sketched)[: len(sketch)]

    def _check_routes(self, recording: Recording, num_rows: int) -> None:
        """Refuse a pass in which a module gets other rows than in the trial that found its rule."""
        once = {site.module for site in self.plan.outer}
        for module in {site.module for site in self.sites}:
            counts = [len(call.h) for call in recording.calls[module]]
            if any(count != num_rows for count in counts) or (module in once and len(counts) != 1):
                raise ModelError(
                    f"module '{module}' gets {' and '.join(map(str, counts)) or 'no'} rows of {num_rows}, and got all "
                    "rows of the examples that the kernel was planned on; put examples that take every way through the "
                    "model among the first 32"
                )

    @property
    def sites(self) -> tuple[Site, ...]:
        """The modules that a pass records."""
        return (*self.plan.outer, *self.plan.dense, *(() if self.sketched is None else self.sketched.dense))

    def _named(self, dense: Float[Tensor, "n c k"]) -> dict[str, Float[Tensor, "n c ..."]]:
        """Return the formed gradients of one slot by parameter, as views."""
        names = self.plan.dense_names()
        shapes = self._shapes(names)
        parts = dense.split([math.prod(shapes[name]) for name in names], dim=2)
        named = zip(names, parts, strict=True)
        return {name: part.unflatten(2, shapes[name]) if shapes[name] else part[..., 0] for name, part in named}


def compute_together(
    maps: Sequence[GradientFeatures], x: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
) -> list[dict[str, Tensor]]:
    """Compute the arrays of several feature maps that move the same parameters in the same draws, in the same passes.

    Args:
        maps: they differ in which parameters' gradients they keep, and how.
        x: as `FeatureMap.compute`.
        draws: as `FeatureMap.compute`.
        columns: as `FeatureMap.compute`.
        batch: as `FeatureMap.compute`.

    Raises:
        ModelError: the model fails, or a gradient is not finite.
    """
    first = maps[0]
    block_range(draws, first.draws_per_block)
    results = [each._empty(x, draws, columns) for each in maps]
    shared = {each.sketch: make_projector(each.sketch, columns) for each in maps if each.sketch is not None}
    projectors = [None if each.sketch is None else shared[each.sketch] for each in maps]
    batches = list(in_batches(x, batch))
    with trying(ModelError, FAILS_ON_INPUTS), first._parameters_of(draws) as moved:
        for draw in moved:
            for projector in shared.values():
                projector.forget_weights()
            with first._noise_of(draw):
                for inputs, rows in batches:
                    own = [{name: array[rows] for name, array in result.items()} for result in results]
                    _add_passes_(maps, own, projectors, draw - draws.start, inputs, columns)
    for each, result in zip(maps, results, strict=True):
        for name, array in result.items():
            if name in _AVERAGED:
                array /= each.draws_per_slot
            check_finite(array, f"the model's gradient under draws {draws.start} to {draws.stop - 1}")
    return results


def _add_passes_(
    maps: Sequence[GradientFeatures],
    rows: Sequence[dict[str, Tensor]],
    projectors: Sequence[Projector | None],
    place: int,
    x: Tensor,
    columns: Sequence[int],
) -> None:
    """Make one pass over a batch under draw number `place`, and add it to the arrays of all feature maps."""
    evaluator = maps[0].evaluator
    recording = Recording(evaluator.model, [site for each in maps for site in each.sites], x)
    for each in maps:
        each._check_routes(recording, len(x))
    parameters = evaluator.space.values(evaluator.model)
    plans = [each.plan for each in maps]
    differentiated = partial(
        gradients_of_pass,
        model=evaluator.model,
        readout=next((plan.readout for plan in plans if plan.readout is not None), None),
        pair=next((plan.output_layers for plan in plans if plan.output_layers is not None), None),
        shares_derivatives=maps[0].sums_outputs,
    )
    passed = along = Pass(x, recording, {}, parameters, columns)
    if any(each.differentiates_outputs for each in maps):
        passed = differentiated(passed)
    projected = next((each for each in projectors if isinstance(each, OutputProjector)), None)
    if projected is not None:
        along = differentiated(replace(along, directions=projected.directions(recording.outputs.detach())))
    for each, own, projector in zip(maps, rows, projectors, strict=True):
        each._add_pass_(own, place, passed, projector, passed if projector is not projected else along)
