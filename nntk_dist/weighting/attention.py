"""From scores of draws to their weights: α = softmax of score/τ over the draws of a block.

A block's mean gradient g_r = Σ_s α_s Δ_s v_s is the mean over its B draws of (B·α_s) Δ_s v_s, so weights are *factors*
B·α_s on the differences, 1 at τ = ∞, and metric, block sums and standard errors stay as they are: blocks remain
independent and identically distributed. A ratio estimator: g_r tends to E[w Δ v]/E[w], w = exp(score/τ), as B grows;
its bias falls like 1/B, and products of different blocks are free of any other.

Scores are those of `nntk_dist.weighting.scores`. Shared ones are a function of the draws and the reference batch alone,
made once; they do not depend on the rows whose features are computed, nor on how these are batched.

Axes: s draws, n examples, m = n or 1 (scores shared by all), c outputs, P parameters.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.errors import NNTKError
from nntk_dist.models.evaluation import Evaluator, check_finite
from nntk_dist.sampling.draws import Drawing, draw_chunks
from nntk_dist.weighting.options import Reference, Weighting
from nntk_dist.weighting.scores import Score, make_score

# Reference examples of one forward pass: a number of its own, so that scores do not change with the batch of the rows.
REFERENCE_BATCH = 32


@dataclass(frozen=True)
class Attention:
    """Scores and factors of the draws of a kernel; `inputs` is the reference batch, None where none is needed."""

    evaluator: Evaluator
    drawing: Drawing
    weighting: Weighting
    score: Score
    inputs: Tensor | None

    def scores(
        self, draws: range, z: Float[Tensor, "s P"], base: Float[Tensor, "n c"], perturbed: Float[Tensor, "s n c"]
    ) -> Float64[Tensor, "s m"]:
        """Scores of some draws for the examples of a batch: of their own outputs, or shared ones, (s, 1).

        Raises: NNTKError where an output that is looked at is not finite.
        """
        if self.weighting.per_example:
            check_finite(perturbed.transpose(0, 1), f"the model's output under draws {draws.start} to {draws.stop - 1}")
            return self.score.of(z.double(), base.double(), perturbed.double())
        return self._shared[draws.start : draws.stop, None]

    def factors(self, scores: Float64[Tensor, "s m"]) -> Float64[Tensor, "s m"]:
        """B·α of whole blocks. Raises: NNTKError where a score is not finite."""
        _check_scores(scores, self.weighting)
        size = self.drawing.draws_per_block
        blocks = scores.unflatten(0, (-1, size))
        weights = _exponential(blocks - blocks.amax(1, keepdim=True), self.weighting.tau)
        return (weights * (size / weights.sum(1, keepdim=True))).flatten(0, 1)

    @cached_property
    def _shared(self) -> Float64[Tensor, " S"]:
        """Scores of all draws, a part of a block at a time: S passes over the reference batch where outputs count."""
        size, parts = self.drawing.draws_per_block, []
        numbers = max(self.drawing.num_parameters, self._reference_outputs.numel())
        if self.inputs is not None:
            numbers = max(numbers, self.inputs.numel())
        for start in range(0, self.drawing.num_draws, size):
            for draws in draw_chunks(range(start, start + size), numbers, self.drawing.group_size):
                parts.append(self._of_reference(draws))
        return torch.cat(parts)

    def _of_reference(self, draws: range) -> Float64[Tensor, " s"]:
        base = self._reference_outputs
        z = self.drawing.perturbations(draws, dtype=base.dtype, device=base.device)
        if self.inputs is None:
            return self.score.of(z.double(), base.double(), base.double().expand(len(z), *base.shape))
        scores = []
        pairs = self.evaluator.pairs(self.inputs, base, self.drawing, draws, z, REFERENCE_BATCH)
        for members, unmoved, moved in pairs:
            check_finite(
                moved.transpose(0, 1),
                f"the model's output on the reference batch under draws {members.start} to {members.stop - 1}",
            )
            own = z[members.start - draws.start : members.stop - draws.start]
            scores.append(self.score.of(own.double(), unmoved.double(), moved.double()))
        return torch.cat(scores)

    @cached_property
    def _reference_outputs(self) -> Float[Tensor, "n c"]:
        return reference_outputs(self.evaluator, self.inputs)

    def try_on(self, x: Tensor) -> None:
        """Score one draw for one or two examples, so that a score that cannot be had is told before the work begins.

        Raises: NNTKError as the score and the model do.
        """
        if not self.weighting.per_example:
            _check_scores(self._of_reference(range(1))[:, None], self.weighting)
            return
        rows, draws = x[:2], range(1)
        base = self.evaluator.base(rows)
        z = self.drawing.perturbations(draws, dtype=base.dtype, device=base.device)
        _check_scores(self.scores(draws, z, base, self.evaluator.perturbed(rows, z)), self.weighting)


class RunningSoftmax:
    """Weights exp(score/τ) of one block, relative to its largest score so far, a part of its draws at a time.

    Divide what was summed by `mass`; before adding a part, multiply it by that part's `shrink`.
    """

    def __init__(self, weighting: Weighting) -> None:
        self._weighting = weighting
        self._largest: Tensor | None = None
        self.mass: Tensor | None = None

    def take(self, scores: Float64[Tensor, "s m"]) -> tuple[Float64[Tensor, " m"], Float64[Tensor, "s m"]]:
        """(shrink, weights) of the next draws. Raises: NNTKError where a score is not finite."""
        _check_scores(scores, self._weighting)
        tau, largest = self._weighting.tau, scores.amax(0)
        shrink = torch.ones_like(largest)
        if self._largest is not None:
            largest = torch.maximum(self._largest, largest)
            shrink = _exponential(self._largest - largest, tau)
        weights = _exponential(scores - largest, tau)
        added = weights.sum(0)
        self.mass = added if self.mass is None else self.mass * shrink + added
        self._largest = largest
        return shrink, weights


def _exponential(differences: Float64[Tensor, "..."], tau: float) -> Float64[Tensor, "..."]:
    """exp(differences/τ), the largest difference being 0: taken before it is divided, nothing overflows for small τ."""
    return (differences / tau).exp()


def _check_scores(scores: Float64[Tensor, "s m"], weighting: Weighting) -> None:
    bad = ~torch.isfinite(scores)
    if bool(bad.any()):
        raise NNTKError(
            f"the score {weighting.label} is NaN or infinite for {int(bad.any(1).sum())} of {len(scores)} draws; "
            "allowed: finite numbers (a draw that is not to count takes a very small one)"
        )


def reference_outputs(evaluator: Evaluator, inputs: Tensor | None) -> Float[Tensor, "n c"]:
    """f(x; θ) on the reference batch; without an example where there is none."""
    if inputs is None:
        first = next(evaluator.model.parameters())
        return torch.zeros(0, 1, dtype=first.dtype, device=first.device)
    outputs = evaluator.base(inputs, REFERENCE_BATCH)
    check_finite(outputs, "the model's output on the reference batch")
    return outputs


def make_attention(
    evaluator: Evaluator, drawing: Drawing, weighting: Weighting, seed: int, reference: Reference
) -> Attention:
    """The weights of a kernel's draws; `reference` is looked at where scores are of outputs.

    Raises: NNTKError as `make_score`.
    """
    inputs = reference.inputs if weighting.compares_outputs else None
    base = reference_outputs(evaluator, inputs).double()
    values = evaluator.space.values(evaluator.model)
    theta = torch.cat([values[name].reshape(-1) for name in evaluator.space.names])
    return Attention(evaluator, drawing, weighting, make_score(weighting, reference, theta, base, seed), inputs)
