"""The score `parameter`: attention of the parameters θ to the perturbed parameters θ_s, ⟨Qθ, Kθ_s⟩/√d_k.

Axes: s draws, P parameters, k = d_k entries of a query or key.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import KEY_DRAW, QUERY_DRAW, Stream
from nntk_dist.weighting.scores.base import ScoreBasis

_SLICE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class ParameterRule:
    """Makes a `ParameterScore`; Q and K are seeded, with entries N(0, 1/P)."""

    name: ClassVar[str] = "parameter"
    compares_outputs: ClassVar[bool] = False
    shared_because: ClassVar[str] = "a score of parameters depends on no example"

    def prepare(self, basis: ScoreBasis) -> "ParameterScore":
        """Return the score. Cost: 2·d_k·P random numbers."""
        direction = key_of_query(basis.theta, basis.dimension, basis.seed)
        return ParameterScore(basis.theta.double(), direction, basis.dimension)


@dataclass(frozen=True)
class ParameterScore:
    """⟨Qθ, Kθ_s⟩/√d_k = ⟨w, θ_s⟩/√d_k with w = KᵀQθ. Memory: one vector of length P. Cost: P multiply-adds per draw.

    Scores vary by about rms(θ)·γ/√2 between draws; they matter if the temperature is about as small.
    """

    theta: Float64[Tensor, " P"]
    direction: Float64[Tensor, " P"]
    dimension: int

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, " s"]:
        """Return one score for each draw."""
        return (z @ self.direction + self.theta @ self.direction) / math.sqrt(self.dimension)


def key_of_query(theta: Tensor, dimension: int, seed: int) -> Float64[Tensor, " P"]:
    """Return w = KᵀQθ; Q and K are (d_k, P) with entries N(0, 1/P), generated a slice of parameters at a time."""
    parameters = theta.double()
    count, rows = len(parameters), torch.arange(dimension, dtype=torch.int64, device=theta.device)
    query = torch.zeros(dimension, dtype=torch.float64, device=theta.device)
    for start, stop in _slices(count, dimension):
        query += normal(seed, Stream.ATTENTION, rows, start, stop, draw=QUERY_DRAW) @ parameters[start:stop]
    parts = [normal(seed, Stream.ATTENTION, rows, *part, draw=KEY_DRAW).T @ query for part in _slices(count, dimension)]
    return torch.cat(parts) / count


def _slices(count: int, dimension: int) -> Iterator[tuple[int, int]]:
    width = max(256, _SLICE_ELEMENTS // dimension)
    for start in range(0, count, width):
        yield start, min(start + width, count)
