"""The radial densities ρ of a perturbation z, each scaled so that E|z|² = P·γ²/2: one meaning of γ for all.

A distribution turns standard normals and uniforms into perturbations; it draws nothing itself and knows no model.

Axes: P parameters, g groups of draws.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nntk_dist.errors import NNTKError, check_choice
from nntk_dist.philox import Stream, normal


@runtime_checkable
class Distribution(Protocol):
    """A radial probability density on R^P, known by its name and its range γ."""

    @property
    def name(self) -> str:
        """The name in configurations."""
        ...

    @property
    def gamma(self) -> float:
        """The range: E|z|² = P·γ²/2."""
        ...

    def sample(
        self,
        seed: int,
        groups: Tensor,
        num_parameters: int,
        start: int,
        stop: int,
        *,
        stream: Stream,
        dtype: torch.dtype,
    ) -> Tensor:
        """Coordinates `start` to `stop` of the perturbation of each group, (g, stop - start)."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Density ∝ exp(−|z|²/γ²), the paper's: z = (γ/√2)·n with n standard normal."""

    gamma: float
    name: str = "gaussian"

    def sample(
        self,
        seed: int,
        groups: Tensor,
        num_parameters: int,
        start: int,
        stop: int,
        *,
        stream: Stream,
        dtype: torch.dtype,
    ) -> Tensor:
        return normal(seed, stream, groups, start, stop, dtype=dtype).mul_(self.gamma / math.sqrt(2.0))


DISTRIBUTIONS = {"gaussian": Gaussian}


def make_distribution(name: str, gamma: float) -> Distribution:
    """The distribution called `name` with range γ.

    Raises: NNTKError for an unknown name or a γ that is not a positive finite number.
    """
    check_choice("distribution", name, DISTRIBUTIONS)
    if not (math.isfinite(gamma) and gamma > 0):
        raise NNTKError(f"gamma is {gamma}; allowed: a positive finite number, the range of the perturbations")
    return DISTRIBUTIONS[name](gamma=float(gamma))
