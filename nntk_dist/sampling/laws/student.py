"""The multivariate Student law."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from nntk_dist.registration.options import Number, option
from nntk_dist.sampling.laws.base import Ranged, Uniforms


@dataclass(frozen=True)
class Student(Ranged):
    """Multivariate Student: z = γ√((ν−2)/(2ν))·n/√(χ²_ν/ν), ν > 2; moments of order below ν exist.

    χ²_ν is the quantile of a uniform number, computed on the CPU in float64: the same numbers on every device.

    Raises:
        ArgumentError: γ or ν is out of range.

    Example:
        >>> Student(gamma=0.1, nu=5)
        Student(gamma=0.1, nu=5.0)
    """

    nu: float = option(5.0, Number(above=2), "degrees of freedom")
    name: ClassVar[str] = "student"
    normalised: ClassVar[bool] = False

    def scale(self, num_parameters: int, uniforms: Uniforms) -> Float64[Tensor, " g"]:
        """Return z/n."""
        from scipy import special  # slow to import, and needed by this law alone

        levels = uniforms()
        chi_squared = 2.0 * special.gammaincinv(self.nu / 2.0, levels.cpu().numpy())
        width = self.gamma * math.sqrt((self.nu - 2.0) / 2.0)
        return width / torch.from_numpy(chi_squared).to(levels.device).sqrt()
