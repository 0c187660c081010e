"""The law of low-rank perturbations of weight matrices; `nntk_dist.sampling.low_rank` generates them."""

from dataclasses import dataclass
from typing import ClassVar

from nntk_dist.registration.options import WholeNumber, option
from nntk_dist.sampling.laws.base import Ranged


@dataclass(frozen=True)
class LowRank(Ranged):
    """z = (γ/√2)·A·Bᵀ/√r for tensors of two or more axes, viewed as (out, rest); (γ/√2)·n for vectors.

    The law is not radial: the gradient of a draw is 2Δz/γ². It tends to ∇f as γ → 0, but at finite γ the kernel
    differs from the Gaussian law's kernel.

    Raises:
        ArgumentError: γ or the rank is out of range.
    """

    rank: int = option(1, WholeNumber(1), "rank r of the perturbation of a matrix")
    name: ClassVar[str] = "lowrank"
