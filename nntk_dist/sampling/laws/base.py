"""The interface of laws (`Law`, `RadialLaw`), and the base class with the range γ (`Ranged`).

Axes: P parameters, g perturbations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float64
from torch import Tensor

from nntk_dist.registration.options import REQUIRED, Number, convert_options, option

Uniforms: TypeAlias = Callable[[], Float64[Tensor, " g"]]


@runtime_checkable
class Law(Protocol):
    """A probability law of perturbations, hashable and comparable by value.

    Attributes:
        name: the name in messages and in a store.
    """

    name: ClassVar[str]

    @property
    def gamma(self) -> float:
        """The range: E|z|² = P·γ²/2."""


@runtime_checkable
class RadialLaw(Law, Protocol):
    """A radial law on R^P: z = scale · n, or scale · n/|n| if `normalised`; n is standard normal.

    Attributes:
        normalised: whether `scale` multiplies n/|n| instead of n.
    """

    normalised: ClassVar[bool]

    def scale(self, num_parameters: int, uniforms: Uniforms) -> float | Float64[Tensor, " g"]:
        """Return the factor of n, or of n/|n|.

        Args:
            num_parameters: P.
            uniforms: returns one Uniform(0, 1) number for each perturbation, independent of n; call it at most once.

        Returns:
            One number, or one for each perturbation.
        """


@dataclass(frozen=True)
class Ranged:
    """Base class of this project's laws: the range γ; all options are checked when a law is made."""

    gamma: float = option(REQUIRED, Number(above=0), "range of the perturbations: E|z|² = P·γ²/2")

    def __post_init__(self) -> None:
        convert_options(self)
