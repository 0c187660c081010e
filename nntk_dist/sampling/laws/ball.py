"""The uniform law on a ball."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from nntk_dist.sampling.laws.base import Ranged, Uniforms


@dataclass(frozen=True)
class Ball(Ranged):
    """Uniform on the ball of radius R = γ√((P+2)/2): |z| = R·u^{1/P}, u ~ Uniform(0, 1)."""

    name: ClassVar[str] = "ball"
    normalised: ClassVar[bool] = True

    def scale(self, num_parameters: int, uniforms: Uniforms) -> Float64[Tensor, " g"]:
        """Return |z|."""
        return self.gamma * math.sqrt((num_parameters + 2.0) / 2.0) * uniforms() ** (1.0 / num_parameters)
