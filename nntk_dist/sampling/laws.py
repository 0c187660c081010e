"""The laws ρ of a perturbation, each scaled so that E|z|² = P·γ²/2: one meaning of γ for all.

A radial law turns a standard normal vector n and a uniform number into z = scale · n, or scale · n/|n| where it is
`normalised`. The low-rank law is not radial; it only says what its matrices are made of
(`nntk_dist.sampling.low_rank`). Nothing is drawn here, and no model is known.

Axes: P parameters, g perturbations.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float64
from scipy import special
from torch import Tensor

from nntk_dist.errors import NNTKError, check_choice

Uniforms: TypeAlias = Callable[[], Float64[Tensor, " g"]]
GAMMA_SCALES = ("absolute", "relative")


@runtime_checkable
class RadialLaw(Protocol):
    """A radial probability density on R^P: z = scale · n, divided by |n| where `normalised`; n standard normal."""

    name: ClassVar[str]
    normalised: ClassVar[bool]

    @property
    def gamma(self) -> float:
        """The range: E|z|² = P·γ²/2."""
        ...

    def scale(self, num_parameters: int, uniforms: Uniforms) -> float | Float64[Tensor, " g"]:
        """What n or n/|n| is multiplied by; `uniforms` gives a Uniform(0, 1) number for each perturbation, if asked."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Density ∝ exp(−|z|²/γ²), the paper's: z = (γ/√2)·n."""

    gamma: float
    name: ClassVar[str] = "gaussian"
    normalised: ClassVar[bool] = False

    def scale(self, num_parameters: int, uniforms: Uniforms) -> float:
        return self.gamma / math.sqrt(2.0)


@dataclass(frozen=True)
class Sphere:
    """Uniform on the sphere of radius γ√(P/2)."""

    gamma: float
    name: ClassVar[str] = "sphere"
    normalised: ClassVar[bool] = True

    def scale(self, num_parameters: int, uniforms: Uniforms) -> float:
        return self.gamma * math.sqrt(num_parameters / 2.0)


@dataclass(frozen=True)
class Ball:
    """Uniform on the ball of radius R = γ√((P+2)/2): |z| = R·u^{1/P}."""

    gamma: float
    name: ClassVar[str] = "ball"
    normalised: ClassVar[bool] = True

    def scale(self, num_parameters: int, uniforms: Uniforms) -> Float64[Tensor, " g"]:
        return self.gamma * math.sqrt((num_parameters + 2.0) / 2.0) * uniforms() ** (1.0 / num_parameters)


@dataclass(frozen=True)
class Fractional:
    """The Riesz fractional gradient's weight, truncated: |z| = R·u^{1/(1−α)}, R = γ√(P(3−α)/(2(1−α))), 0 ≤ α < 1.

    Raises: NNTKError for an α out of range.
    """

    gamma: float
    alpha: float = 0.5
    name: ClassVar[str] = "fractional"
    normalised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < 1.0:
            raise NNTKError(f"alpha is {self.alpha}; allowed: from 0 to below 1, the order of the fractional gradient")

    def scale(self, num_parameters: int, uniforms: Uniforms) -> Float64[Tensor, " g"]:
        left = 1.0 - self.alpha
        radius = self.gamma * math.sqrt(num_parameters * (2.0 + left) / (2.0 * left))
        return radius * uniforms() ** (1.0 / left)


@dataclass(frozen=True)
class Student:
    """Multivariate Student: z = γ√((ν−2)/(2ν))·n/√(χ²_ν/ν), ν > 2; moments below ν exist.

    χ²_ν is the quantile of a uniform, taken on the CPU in float64: the same numbers on every device.

    Raises: NNTKError for a ν out of range.
    """

    gamma: float
    nu: float = 5.0
    name: ClassVar[str] = "student"
    normalised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (self.nu > 2.0 and math.isfinite(self.nu)):
            raise NNTKError(f"nu is {self.nu}; allowed: a finite number above 2, or E|z|² would be infinite")

    def scale(self, num_parameters: int, uniforms: Uniforms) -> Float64[Tensor, " g"]:
        levels = uniforms()
        chi_squared = 2.0 * special.gammaincinv(self.nu / 2.0, levels.cpu().numpy())
        width = self.gamma * math.sqrt((self.nu - 2.0) / 2.0)
        return width / torch.from_numpy(chi_squared).to(levels.device).sqrt()


@dataclass(frozen=True)
class LowRank:
    """z = (γ/√2)·A·Bᵀ/√r for each tensor of two axes or more, viewed as (out, rest); (γ/√2)·n for vectors.

    Not radial: a draw's gradient is 2Δz/γ², whose limit for γ → 0 is ∇f too; at finite γ it is another kernel.

    Raises: NNTKError for a rank below 1.
    """

    gamma: float
    rank: int = 1
    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "rank", operator.index(self.rank))
        except TypeError:
            raise NNTKError(f"rank is {self.rank!r}; allowed: a whole number, 1 or more") from None
        if self.rank < 1:
            raise NNTKError(f"rank is {self.rank}; allowed: a whole number, 1 or more")


Distribution: TypeAlias = RadialLaw | LowRank
_CLASSES: tuple[type[Distribution], ...] = (Gaussian, Sphere, Ball, Fractional, Student, LowRank)
DISTRIBUTIONS = {kind.name: kind for kind in _CLASSES}
RADIAL = tuple(name for name in DISTRIBUTIONS if name != LowRank.name)
# Option -> the distribution that has it.
OPTIONS = {"alpha": Fractional.name, "nu": Student.name, "rank": LowRank.name}


def make_distribution(name: str, gamma: float, **options: float | None) -> Distribution:
    """The distribution called `name` with range γ; options that are None take their defaults.

    Raises: NNTKError for an unknown name, a γ that is not a positive finite number, or an option out of range or of
    another distribution.
    """
    check_choice("distribution", name, DISTRIBUTIONS)
    if not (math.isfinite(gamma) and gamma > 0):
        raise NNTKError(f"gamma is {gamma}; allowed: a positive finite number, the range of the perturbations")
    given = {option: value for option, value in options.items() if value is not None}
    kind = DISTRIBUTIONS[name]
    own = [field.name for field in dataclasses.fields(kind) if field.name != "gamma"]  # type: ignore[arg-type]
    for option, value in given.items():
        if option not in own:
            known = f"an option of {OPTIONS[option]}" if option in OPTIONS else "no option of any distribution"
            raise NNTKError(
                f"{option} is {value}, but it is {known}; allowed for distribution {name}: {', '.join(own) or 'none'}"
            )
    return kind(gamma=float(gamma), **given)  # type: ignore[arg-type, call-arg]
