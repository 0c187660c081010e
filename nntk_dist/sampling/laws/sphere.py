"""The uniform law on a sphere."""

import math
from dataclasses import dataclass
from typing import ClassVar

from nntk_dist.sampling.laws.base import Ranged, Uniforms


@dataclass(frozen=True)
class Sphere(Ranged):
    """Uniform on the sphere of radius γ√(P/2)."""

    name: ClassVar[str] = "sphere"
    normalised: ClassVar[bool] = True

    def scale(self, num_parameters: int, uniforms: Uniforms) -> float:
        """Return the radius."""
        return self.gamma * math.sqrt(num_parameters / 2.0)
