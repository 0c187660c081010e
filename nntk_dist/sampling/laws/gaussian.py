"""The Gaussian law, which the paper uses."""

import math
from dataclasses import dataclass
from typing import ClassVar

from nntk_dist.sampling.laws.base import Ranged, Uniforms


@dataclass(frozen=True)
class Gaussian(Ranged):
    """Density ∝ exp(−|z|²/γ²): z = (γ/√2)·n.

    Example:
        >>> Gaussian(gamma=0.1)
        Gaussian(gamma=0.1)
    """

    name: ClassVar[str] = "gaussian"
    normalised: ClassVar[bool] = False

    def scale(self, num_parameters: int, uniforms: Uniforms) -> float:
        """Return γ/√2."""
        return self.gamma / math.sqrt(2.0)
