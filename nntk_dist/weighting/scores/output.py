"""The score `output`: the negative squared change of the outputs.

Axes: s draws, n examples, C outputs.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from nntk_dist.errors import ArgumentError
from nntk_dist.weighting.scores.base import ScoreBasis


@dataclass(frozen=True)
class OutputRule:
    """Makes an `OutputScore`, relative to the mean square of the outputs on the reference batch."""

    name: ClassVar[str] = "output"
    compares_outputs: ClassVar[bool] = True
    shared_because: ClassVar[str] = ""

    def prepare(self, basis: ScoreBasis) -> "OutputScore":
        """Return the score. Raises: ArgumentError if all outputs are 0."""
        mean_square = float(basis.outputs.square().sum(1).mean())
        if mean_square == 0.0:
            raise ArgumentError(
                "weighting is 'output', which compares changes with the outputs on the reference batch, but these are "
                "all 0; give another reference, or your own score"
            )
        return OutputScore(mean_square, basis.per_example)


@dataclass(frozen=True)
class OutputScore:
    """−mean_i |f(x_i;θ_s) − f(x_i;θ)|² / m over the reference batch, with m = mean_i |f(x_i;θ)|².

    With `per_example`, −|f(x;θ_s) − f(x;θ)|² / m for each example x. The score is 0 if outputs do not change, and −1 if
    they change by their own size.
    """

    mean_square: float
    per_example: bool

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, "s *n"]:
        """Return one score for each draw, or for each draw and example."""
        distances = (perturbed - base).square().sum(2) / -self.mean_square
        return distances if self.per_example else distances.mean(1)
