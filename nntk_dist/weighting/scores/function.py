"""Scores by a user's function of (θ, θ_s, f(X;θ), f(X;θ_s)).

Axes: s draws, n examples, C outputs, P parameters.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from nntk_dist.errors import ArgumentError, NNTKError, one_line
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.weighting.scores.base import ScoreBasis, ScoreFunction


@dataclass(frozen=True)
class FunctionRule:
    """Makes a `FunctionScore`.

    Attributes:
        function: the user's function.
        label: its name in messages.
    """

    function: ScoreFunction
    label: str
    name: ClassVar[str] = "function"
    compares_outputs: ClassVar[bool] = True
    shared_because: ClassVar[str] = ""

    def prepare(self, basis: ScoreBasis) -> "FunctionScore":
        """Return the score."""
        return FunctionScore(self.function, self.label, basis.theta.double(), basis.per_example)


@dataclass(frozen=True)
class FunctionScore:
    """The values of a user's function. The score of a draw must not depend on other draws; this is not checked."""

    function: ScoreFunction
    name: str
    theta: Float64[Tensor, " P"]
    per_example: bool

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, "s *n"]:
        """Return one score for each draw, or for each draw and example.

        Raises:
            ArgumentError: the function fails, or returns something else.
        """
        try:
            result = self.function(self.theta, self.theta + z, base, perturbed)
        except NNTKError:
            raise
        except Exception as error:  # a user's function may raise anything; the exception is chained
            if is_out_of_memory(error):
                raise
            raise ArgumentError(
                f"the score {self.name} failed on {len(z)} draws, parameters of shape {tuple(self.theta.shape)} and "
                f"outputs of shape {tuple(base.shape)}: {type(error).__name__}: {one_line(error)}"
            ) from error
        expected = (len(z), len(base)) if self.per_example else (len(z),)
        if not isinstance(result, Tensor) or tuple(result.shape) != expected or result.is_complex():
            came = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            axes = "draw and example" if self.per_example else "draw"
            raise ArgumentError(
                f"the score {self.name} returned {came} for {len(z)} draws and {len(base)} examples; allowed: a tensor "
                f"of real numbers of shape {expected}, one for each {axes}"
            )
        return result.detach().to(base.device, torch.float64)
