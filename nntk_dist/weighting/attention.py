"""Weights of draws from their scores: α = softmax of score/τ over the draws of a block.

The mean gradient of a block of B draws, g_r = Σ_s α_s Δ_s v_s, is the mean of (B·α_s) Δ_s v_s. Weights therefore enter
as *factors* B·α_s of the differences, which are 1 at τ = ∞. Metric, block sums and standard errors do not change,
because blocks stay independent and identically distributed. This is a ratio estimator: as B grows, g_r tends to
E[w Δ v]/E[w] with w = exp(score/τ). Its bias falls like 1/B; products of different blocks have no other bias.

Shared scores depend only on the draws and the reference batch, and are computed once. The rows of the features and
their batches do not affect them.

Axes: s draws, n examples, m = n or 1 (scores shared by all), c outputs, P parameters.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.errors import ArgumentError
from nntk_dist.models.evaluation import Evaluator, check_finite
from nntk_dist.sampling.draws import Drawing, draw_chunks
from nntk_dist.weighting.options import Reference, Weighting
from nntk_dist.weighting.scores.base import Score, ScoreBasis

# Reference examples in one forward pass; fixed, so that scores do not depend on the batch of the rows.
REFERENCE_BATCH = 32


@dataclass(frozen=True)
class Attention:
    """Scores and weights of the draws of a kernel.

    Attributes:
        evaluator: the model.
        drawing: the perturbations.
        weighting: the options.
        score: the score.
        inputs: the reference batch; None if the score needs none.
    """

    evaluator: Evaluator
    drawing: Drawing
    weighting: Weighting
    score: Score
    inputs: Tensor | None

    def scores(
        self, draws: range, z: Float[Tensor, "s P"], base: Float[Tensor, "n c"], perturbed: Float[Tensor, "s n c"]
    ) -> Float64[Tensor, "s m"]:
        """Return the scores of some draws for a batch of examples.

        Args:
            draws: the draws.
            z: their perturbations.
            base: the outputs of the examples at θ.
            perturbed: their outputs at θ + z.

        Returns:
            One score per draw and example, (s, n), or shared scores, (s, 1).

        Raises:
            NNTKError: an output that the score compares is not finite.
        """
        if self.weighting.per_example:
            check_finite(perturbed.transpose(0, 1), f"the model's output under draws {draws.start} to {draws.stop - 1}")
            return self.score.of(z.double(), base.double(), perturbed.double())
        return self._shared[draws.start : draws.stop, None]

    def softmax_factors(self, scores: Float64[Tensor, "s m"]) -> Float64[Tensor, "s m"]:
        """Return B·α of whole blocks. Raises: ArgumentError if a score is not finite."""
        check_scores(scores, self.weighting)
        size = self.drawing.draws_per_block
        blocks = scores.unflatten(0, (-1, size))
        weights = _exponential(blocks - blocks.amax(1, keepdim=True), self.weighting.tau)
        return (weights * (size / weights.sum(1, keepdim=True))).flatten(0, 1)

    @cached_property
    def _shared(self) -> Float64[Tensor, " S"]:
        """Scores of all draws, part by part; S passes over the reference batch if the score compares outputs."""
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
        """Score one draw for one or two examples, so that an invalid score fails before the work begins.

        Raises:
            NNTKError: the score or the model fails.
        """
        if not self.weighting.per_example:
            check_scores(self._of_reference(range(1))[:, None], self.weighting)
            return
        rows, draws = x[:2], range(1)
        base = self.evaluator.base(rows)
        z = self.drawing.perturbations(draws, dtype=base.dtype, device=base.device)
        check_scores(self.scores(draws, z, base, self.evaluator.perturbed(rows, z)), self.weighting)


class RunningSoftmax:
    """Softmax over the draws of a block in parts: weights exp(score/τ) relative to the largest score so far.

    Multiply the running sum by `shrink` before you add a part; divide the final sum by `mass`.

    Attributes:
        mass: the sum of the weights so far; None before the first part.
    """

    def __init__(self, weighting: Weighting) -> None:
        self._weighting = weighting
        self._largest: Tensor | None = None
        self.mass: Tensor | None = None

    def take(self, scores: Float64[Tensor, "s m"]) -> tuple[Float64[Tensor, " m"], Float64[Tensor, "s m"]]:
        """Return (shrink, weights) of the next draws. Raises: ArgumentError if a score is not finite."""
        check_scores(scores, self._weighting)
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
    """exp(differences/τ) of differences ≤ 0; subtracting before the division avoids overflow for small τ."""
    return (differences / tau).exp()


def check_scores(scores: Float64[Tensor, "s m"], weighting: Weighting) -> None:
    """Check that the scores of draws are finite. Raises: ArgumentError if one is not."""
    bad = ~torch.isfinite(scores)
    if bool(bad.any()):
        raise ArgumentError(
            f"the score {weighting.label} is NaN or infinite for {int(bad.any(1).sum())} of {len(scores)} draws; "
            "allowed: finite numbers (to ignore a draw, return a large negative number)"
        )


def reference_outputs(evaluator: Evaluator, inputs: Tensor | None) -> Float[Tensor, "n c"]:
    """Return f(x; θ) on the reference batch; no rows if there is no reference batch."""
    if inputs is None:
        first = next(evaluator.model.parameters())
        return torch.zeros(0, 1, dtype=first.dtype, device=first.device)
    outputs = evaluator.base(inputs, REFERENCE_BATCH)
    check_finite(outputs, "the model's output on the reference batch")
    return outputs


def make_attention(
    evaluator: Evaluator, drawing: Drawing, weighting: Weighting, seed: int, reference: Reference
) -> Attention:
    """Make the weights of a kernel's draws.

    Args:
        evaluator: the model.
        drawing: the perturbations.
        weighting: the options: score, temperature.
        seed: the seed of the kernel.
        reference: the reference batch, used if scores compare outputs.

    Raises:
        ArgumentError: the score cannot be imported, or targets or outputs do not suit it.
    """
    inputs = reference.inputs if weighting.compares_outputs else None
    values = evaluator.space.values(evaluator.model)
    basis = ScoreBasis(
        theta=torch.cat([values[name].reshape(-1) for name in evaluator.space.names]),
        outputs=reference_outputs(evaluator, inputs).double(),
        targets=reference.targets,
        per_example=weighting.per_example,
        dimension=weighting.dimension,
        seed=seed,
    )
    return Attention(evaluator, drawing, weighting, weighting.rule.prepare(basis), inputs)
