"""The truncated Riesz law of the fractional gradient."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from nntk_dist.registration.options import Number, option
from nntk_dist.sampling.laws.base import Ranged, Uniforms


@dataclass(frozen=True)
class Fractional(Ranged):
    """The truncated weight of the Riesz fractional gradient of order α: |z| = R·u^{1/(1−α)}, u ~ Uniform(0, 1).

    R = γ√(P(3−α)/(2(1−α))), 0 ≤ α < 1.

    Raises:
        ArgumentError: γ or α is out of range.
    """

    alpha: float = option(0.5, Number(at_least=0, below=1), "order of the fractional gradient")
    name: ClassVar[str] = "fractional"
    normalised: ClassVar[bool] = True

    def scale(self, num_parameters: int, uniforms: Uniforms) -> Float64[Tensor, " g"]:
        """Return |z|."""
        left = 1.0 - self.alpha
        radius = self.gamma * math.sqrt(num_parameters * (2.0 + left) / (2.0 * left))
        return radius * uniforms() ** (1.0 / left)
