"""The estimator `weight` with control variates for noise in weights: block means of its gradients, for few parameters.

Draw s of block r moves the model by σ_r n_s, n standard normal and σ_r = (γ/√2)·U_r^{1/P}, one U for the draws of a
block. Its gradient E[f(θ + σn) n/σ] is the nonlocal gradient (Stein's identity). If weights enter a call k of the pass,
a = h ⋆ w + b, as functions w = Q(θ), b of parameters alone, the innovation ε_k = a_k − h_k ⋆ Q̃ of a draw has the mean 0
given the noise of all other parameters, Q̃ the mean of Q. So for every f̄ and J that do not depend on the draws

    (f − f̄ − Σ_k J_k·ε_k) E[n | Q]/σ + Q̃' ⊙ Σ_t J_k ⊗ h_k

is unbiased: the gradient of J_k·ε_k is the second term in the parameters of call k, and 0 in all others. The normals of
weights on a flat piece of Q are replaced by their mean over it (Rao and Blackwell), if f depends on Q alone. f̄ and J
are means over pilot draws of another random stream, for each example, J = ∂f/∂a. The combination is the project's own.

Products are those of `nntk_dist.estimators.mean_differences`.

Axes: n rows, s draws, r blocks, c outputs, t positions, P parameters.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.errors import ModelError
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.estimators.weight_noise.noisy_weights import NoisyWeights, Pieces
from nntk_dist.estimators.weight_noise.weight_calls import BIAS, WEIGHT, Handler, WeightCall, pass_with
from nntk_dist.layers.recording import products_along
from nntk_dist.models.evaluation import check_finite, draws_at_once, moved_in_place, output_index, trying
from nntk_dist.products.block_sums import Meeting
from nntk_dist.products.feature_description import FeatureCosts
from nntk_dist.products.features import Rows, block_range
from nntk_dist.products.wanted import Wanted
from nntk_dist.runtime.batches import in_batches
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.designs import Design
from nntk_dist.sampling.draws import draw_chunks
from nntk_dist.sampling.streams import PILOT_WEIGHTS, Stream

Move = Callable[[Float[Tensor, " P"]], None]
Passed = tuple[Float[Tensor, "n c"], Float[Tensor, "n c"], dict[int, Tensor]]  # or of several draws, leading


@dataclass(frozen=True)
class Smoothed:
    """The mean functions at one σ.

    Attributes:
        means: Q̃ of the arguments of each call.
        slopes: Q̃' of each parameter, in its own shape.
    """

    means: Mapping[int, Mapping[str, Tensor]]
    slopes: Mapping[str, Tensor]


@dataclass
class Batch:
    """Some examples, and sums over draws of what their passes leave behind.

    Attributes:
        x: inputs, padded.
        rows: which examples they are.
        base: f(x; θ) of the outputs of the kernel.
        mean: f̄, the mean of what control variates leave of f under pilot draws.
        jacobians: J of each call.
        inputs: h of each call, summed over draws.
        calls: a call of each number, for its shapes.
    """

    x: Tensor
    rows: slice
    base: Float[Tensor, "n c"]
    mean: Float[Tensor, "n c"]
    jacobians: dict[int, Float[Tensor, "n c ..."]] = field(default_factory=dict)
    inputs: dict[int, Float[Tensor, "n ..."]] = field(default_factory=dict)
    calls: dict[int, WeightCall] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightGradients(DifferenceMeans):
    """Block means of gradients, (n, r, c, k).

    Attributes:
        weights: which parameters enter a call as functions of themselves.
        num_pilots: the pilot draws.
    """

    weights: NoisyWeights = field(default_factory=lambda: NoisyWeights((), 0))
    num_pilots: int = 16

    def costs(self, meeting: Meeting, wanted: Wanted) -> FeatureCosts:
        """Return the costs: a call for innovations beside each call, and C backward passes for each pilot draw."""
        plain, outputs = super().costs(meeting, wanted), len(self.columns)
        return FeatureCosts(
            entry_operations=plain.entry_operations,
            passes_per_draw=2.0 + 2.0 * self.num_pilots * (1.0 + outputs) / self.num_draws,
            pass_copies=3 + outputs,
            prepared_share=plain.prepared_share,
        )

    def compute(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, Tensor]:
        """Compute the block means; see `FeatureMap.compute`."""
        base = self.evaluator.base(x, batch)
        check_finite(base, "the model's output")
        base = base[:, output_index(columns)]
        padded = zip(in_batches(x, batch), in_batches(base, batch), strict=True)
        batches = [Batch(inputs, rows, own, torch.zeros_like(own)) for (inputs, rows), (own, _) in padded]
        blocks = block_range(draws, self.drawing.draws_per_block)
        dense = base.new_empty(len(x), len(blocks), len(columns), self.num_parameters)
        changes = base.new_empty(len(x), len(blocks), len(columns), 2)
        theta = {name: values.detach() for name, values in self.evaluator.space.values(self.evaluator.model).items()}
        with (
            trying(ModelError, "the model fails at perturbed parameters ({reason})"),
            moved_in_place(self.evaluator.model, self.evaluator.space) as move,
        ):
            self._pilot(batches, columns, theta, move)
            for slot, block in enumerate(blocks):
                for each, (mean, change) in zip(
                    batches, self._block(block, batches, columns, theta, move), strict=True
                ):
                    count = each.rows.stop - each.rows.start
                    dense[each.rows, slot], changes[each.rows, slot] = mean[:count], change[:count]
        check_finite(dense, f"the model's gradient under draws {draws.start} to {draws.stop - 1}")
        return {"dense": dense, "changes": changes}

    # Noise ------------------------------------------------------------------------------------------------------------

    @property
    def _scales(self) -> Mapping[str, float]:
        names = self.evaluator.space.names
        return dict(zip(names, self.drawing.scales or (1.0,) * len(names), strict=True))

    @property
    def _intervals(self) -> Mapping[str, slice]:
        space = self.evaluator.space
        stops = zip(space.names, space.sizes, accumulate(space.sizes), strict=True)
        return {name: slice(stop - size, stop) for name, size, stop in stops}

    def shrinkage(self, block: int) -> float:
        """Return U_r^{1/P}."""
        first = block * self.drawing.draws_per_block
        return float(self.drawing.shrinkage(range(first, first + self.drawing.group_size))[0])

    @property
    def pilot_shrinkage(self) -> float:
        """The mean of U^{1/P}."""
        return self.num_parameters / (self.num_parameters + 1.0)

    def smoothed(self, theta: Mapping[str, Tensor], shrinkage: float) -> Smoothed:
        """Return the mean functions at σ = (γ/√2)·`shrinkage`."""
        sigma = self.drawing.distribution.gamma / math.sqrt(2.0) * shrinkage
        means, slopes = dict[int, dict[str, Tensor]](), dict[str, Tensor]()
        for each in self.weights.weights:
            values = theta[each.name]
            spread = torch.tensor(sigma * self._scales[each.name], dtype=torch.float64, device=values.device)
            mean, slopes[each.name] = each.function.values(values, spread)
            means.setdefault(each.call, {})[each.argument] = each.placed(mean)
        return Smoothed(means, slopes)

    def scores(
        self, theta: Mapping[str, Tensor], z: Float[Tensor, "s P"], shrinkage: float
    ) -> tuple[Float64[Tensor, "s P"], Float64[Tensor, " s"]]:
        """Return E[n | Q]/σ of perturbations z, shrunken before, and the lengths of n/σ."""
        sigma = self.drawing.distribution.gamma / math.sqrt(2.0) * shrinkage
        scores = z.to(torch.float64, copy=True)
        conditioned = {each.name: Pieces.of(each.function) for each in self.weights.weights if each.conditioned}
        for name, interval in self._intervals.items():
            spread = sigma * self._scales[name]
            scores[:, interval] /= spread**2
        lengths = scores.norm(dim=1)
        for name, pieces in conditioned.items():
            interval, spread = self._intervals[name], sigma * self._scales[name]
            values = theta[name].double().flatten()
            scores[:, interval] = pieces.conditional_normals(values, spread * scores[:, interval], spread) / spread
        return scores, lengths

    # Passes -----------------------------------------------------------------------------------------------------------

    def _pass(
        self, each: Batch, handler: Handler, parameters: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "n C"]:
        values, count = pass_with(self.evaluator.model, each.x, handler, parameters)
        if count != self.weights.num_calls:
            raise ModelError(
                f"a pass has {count} products of inputs and weights, and had {self.weights.num_calls} when it was "
                "planned; use variance_reduction: none"
            )
        return values

    def _pilot(self, batches: Sequence[Batch], columns: Sequence[int], theta: Mapping[str, Tensor], move: Move) -> None:
        """Set f̄ and J of all batches."""
        drawing = replace(self.drawing, stream=Stream.PILOT, design=Design.IID)
        smoothed, like = self.smoothed(theta, self.pilot_shrinkage), next(iter(theta.values()))
        innovations = [dict[int, Tensor]() for _ in batches]
        for draw in range(PILOT_WEIGHTS, PILOT_WEIGHTS + self.num_pilots):
            (z,) = drawing.perturbations(range(draw, draw + 1), dtype=like.dtype, device=like.device)
            move(z * self.pilot_shrinkage)
            for each, sums in zip(batches, innovations, strict=True):
                self._add_pilot_(each, sums, smoothed, columns)
        for each, sums in zip(batches, innovations, strict=True):
            each.jacobians = {index: part / self.num_pilots for index, part in each.jacobians.items()}
            each.mean = each.mean / self.num_pilots
            for index, total in sums.items():
                each.mean = each.mean - _along(each.jacobians[index], total / self.num_pilots)

    def _add_pilot_(
        self, each: Batch, innovations: dict[int, Tensor], smoothed: Smoothed, columns: Sequence[int]
    ) -> None:
        """Add f, J and ε of one pilot draw."""
        results = dict[int, Tensor]()

        def keep(index: int, call: WeightCall) -> Tensor | None:
            if index not in smoothed.means:
                return None
            result = call.result(call.weight, call.bias)
            innovation = (result - _mean(call, smoothed.means[index])).detach()
            innovations[index] = innovations[index] + innovation if index in innovations else innovation
            each.calls[index] = call
            results[index] = result if result.requires_grad else result.detach().requires_grad_()
            return results[index].clone()  # what follows may write to it

        with torch.enable_grad():
            values = self._pass(each, keep)
            directions = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)[output_index(columns)]
            along = directions[:, None].expand(-1, len(values), -1)
            parts = products_along(values, list(results.values()), along) if values.requires_grad else []
        each.mean += values.detach()[:, output_index(columns)]
        for (index, result), part in zip(results.items(), parts or [None] * len(results), strict=True):
            own = result.new_zeros(len(columns), *result.shape) if part is None else part
            own = own.transpose(0, 1).to(each.base.dtype)
            each.jacobians[index] = each.jacobians[index] + own if index in each.jacobians else own

    def _block(
        self, block: int, batches: Sequence[Batch], columns: Sequence[int], theta: Mapping[str, Tensor], move: Move
    ) -> Iterator[tuple[Float[Tensor, "n c P"], Float64[Tensor, "n c two"]]]:
        """Yield g_r and the changes of one block, for each batch."""
        shrinkage, size = self.shrinkage(block), self.drawing.draws_per_block
        smoothed, like = self.smoothed(theta, shrinkage), next(iter(theta.values()))
        shape = len(batches[0].x), len(columns)
        totals = [like.new_zeros(*shape, self.num_parameters) for _ in batches]
        changes = [like.new_zeros(*shape, 2, dtype=torch.float64) for _ in batches]
        for each in batches:
            each.inputs = {}
        members = range(block * size, (block + 1) * size)
        for draws in draw_chunks(members, self.num_parameters, self.drawing.group_size):
            z = self.drawing.perturbations(draws, dtype=like.dtype, device=like.device) * shrinkage
            scores, lengths = self.scores(theta, z, shrinkage)
            for each, total, change in zip(batches, totals, changes, strict=True):
                residuals, differences = self._residuals(each, smoothed, columns, z, theta, move)
                total.flatten(0, 1).addmm_(residuals.flatten(1).T, scores.to(residuals.dtype))
                change[:, :, 0] += (differences != 0).sum(0)
                largest = (differences * lengths[:, None, None]).amax(0)
                torch.maximum(change[:, :, 1], largest, out=change[:, :, 1])
        for each, total, change in zip(batches, totals, changes, strict=True):
            self._add_smooth_(total, each, smoothed)
            yield total.div_(size), change

    def _residuals(
        self,
        each: Batch,
        smoothed: Smoothed,
        columns: Sequence[int],
        z: Float[Tensor, "s P"],
        theta: Mapping[str, Tensor],
        move: Move,
    ) -> tuple[Float[Tensor, "s n c"], Float[Tensor, "s n c"]]:
        """Return f − f̄ − Σ J·ε at θ + z, and |f − f(x; θ)|; add the inputs of calls to their sums.

        In turn also if stacking fails, as `nntk_dist.models.evaluation.Evaluator` does.
        """

        def one(displacement: Tensor) -> Passed:
            return self._passed(each, smoothed, columns, self.evaluator.space.moved(theta, displacement))

        parts = list[Passed]()
        with torch.no_grad():
            if self.evaluator.stacked:
                try:
                    step = draws_at_once(self.num_parameters, each.x)
                    parts = [torch.func.vmap(one, randomness="error")(some) for some in z.split(step)]
                except Exception as error:  # a model's code may raise anything
                    if is_out_of_memory(error):
                        raise
                    parts = []
            if not parts:
                for displacement in z:
                    move(displacement)
                    values, residual, inputs = self._passed(each, smoothed, columns, None)
                    parts.append((values[None], residual[None], {index: h[None] for index, h in inputs.items()}))
        for _, _, inputs in parts:
            for index, h in inputs.items():
                each.inputs[index] = each.inputs[index] + h.sum(0) if index in each.inputs else h.sum(0)
        values, residuals = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return residuals - each.mean, (values - each.base).abs()

    def _passed(
        self, each: Batch, smoothed: Smoothed, columns: Sequence[int], parameters: Mapping[str, Tensor] | None
    ) -> Passed:
        """Return f, f − Σ J·ε and the inputs of calls, at given parameters or the present ones."""
        corrections, inputs = list[Tensor](), dict[int, Tensor]()

        def handle(index: int, call: WeightCall) -> Tensor | None:
            if index not in smoothed.means:
                return None
            result = call.result(call.weight, call.bias)
            corrections.append(_along(each.jacobians[index], result - _mean(call, smoothed.means[index])))
            inputs[index] = call.h.clone()
            return result

        values = residual = self._pass(each, handle, parameters)[:, output_index(columns)]
        for correction in corrections:
            residual = residual - correction
        return values, residual, inputs

    def _add_smooth_(self, total: Float[Tensor, "n c P"], each: Batch, smoothed: Smoothed) -> None:
        """Add the gradients of J·ε, summed over draws."""
        for index, arguments in self.weights.by_call.items():
            call, delta = each.calls[index], each.jacobians[index]
            for name, weight in arguments.items():
                if name == WEIGHT:
                    gradient = call.weight_gradient(each.inputs[index].to(delta.dtype), delta)
                else:
                    gradient = self.drawing.draws_per_block * call.bias_gradient(delta)
                slope = smoothed.slopes[weight.name]
                part = total[:, :, self._intervals[weight.name]].unflatten(2, slope.shape or (1,))
                part.addcmul_(weight.placed(gradient).reshape(part.shape), slope)

    # Products ---------------------------------------------------------------------------------------------------------

    def changed(self, rows: Rows) -> Bool[Tensor, "n r c"]:
        """Return which outputs changed in each block."""
        return rows["changed"] if "changed" in rows else rows["changes"][..., 0] > 0


def _mean(call: WeightCall, means: Mapping[str, Tensor]) -> Tensor:
    """What a call computes of the mean weights."""
    bias = means.get(BIAS, call.bias)
    return call.result(means.get(WEIGHT, call.weight), bias)


def _along(jacobian: Float[Tensor, "n c ..."], innovation: Float[Tensor, "n ..."]) -> Float[Tensor, "n c"]:
    """J·ε."""
    left, right = jacobian.reshape(*jacobian.shape[:2], -1), innovation.reshape(len(innovation), -1, 1)
    return (left @ right.to(jacobian.dtype))[:, :, 0]
