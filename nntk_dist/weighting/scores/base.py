"""The interfaces of scores: a score (`Score`), a rule that makes one (`ScoreRule`), and its input (`ScoreBasis`).

The paper defines its scores in the abstract only; `output` and `loss` are this project's definitions.

Axes: s draws, n examples (of the reference batch, or of the current batch if each example has its own score), C
outputs, P parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float64
from torch import Tensor

# From θ (P,), θ_s (s, P), f(X;θ) (n, C) and f(X;θ_s) (s, n, C) to scores (s,) or, if each example has its own, (s, n);
# in float64.
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ScoreBasis:
    """The data for a score that is known before the first draw.

    Attributes:
        theta: the selected parameters, in the model's dtype.
        outputs: f(X; θ) on the reference batch; without examples if the score compares no outputs.
        targets: the targets of the reference batch, if there are any.
        per_example: whether each example has its own scores.
        dimension: d_k, the length of queries and keys.
        seed: the seed of the kernel.
    """

    theta: Tensor
    outputs: Float64[Tensor, "n C"]
    targets: Tensor | None
    per_example: bool
    dimension: int
    seed: int


class Score(Protocol):
    """A function of a draw, or of a draw and an example; a larger score gives a larger weight."""

    def of(
        self, z: Float64[Tensor, "s P"], base: Float64[Tensor, "n C"], perturbed: Float64[Tensor, "s n C"]
    ) -> Float64[Tensor, "s *n"]:
        """Return the scores of the draws that move θ by z and the outputs from `base` to `perturbed`.

        Returns:
            One score for each draw, (s,), or one for each draw and example, (s, n).
        """


@runtime_checkable
class ScoreRule(Protocol):
    """Makes the score of a kernel once its model and reference batch are known.

    Attributes:
        name: the name of the score.
        compares_outputs: whether the score uses outputs, and so needs a reference batch.
        shared_because: the reason why all examples share the scores; empty if each may have its own.
    """

    name: ClassVar[str]
    compares_outputs: ClassVar[bool]
    shared_because: ClassVar[str]

    def prepare(self, basis: ScoreBasis) -> Score:
        """Return the score. Raises: ArgumentError if targets or outputs do not suit it."""
