"""The law of low-rank perturbations of weight matrices; `nntk_dist.sampling.low_rank` makes them."""

from dataclasses import dataclass
from typing import ClassVar

from nntk_dist.registration.options import WholeNumber, option
from nntk_dist.sampling.laws.base import Ranged


@dataclass(frozen=True)
class LowRank(Ranged):
    """z = (γ/√2)·A·Bᵀ/√r for each tensor of two axes or more, viewed as (out, rest); (γ/√2)·n for vectors.

    Not radial: the gradient of a draw is 2Δz/γ². It tends to ∇f as γ → 0, but at finite γ it gives another kernel.
    Raises: ArgumentError if the rank is below 1.
    """

    rank: int = option(1, WholeNumber(1), "rank r of the perturbation of a matrix")
    name: ClassVar[str] = "lowrank"
