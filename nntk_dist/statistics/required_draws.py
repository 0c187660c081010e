"""The number of draws that a requested accuracy takes: a few rows are computed with more and more draws.

A *look* computes part of the sample of entries that calibrates a kernel's standard errors
(`nntk_dist.statistics.standard_errors`) with S draws, and takes from it the 95 % bound of ‖U − Θ‖/‖Θ‖. The shares of
the noise that fall like 1/S and like 1/S² determine the next look. The search is a function of the looks so far and
nothing else, so a search that was stopped continues as if it had not been. No models, no features here.

A search ends when a bound happens to be low. So the bound holds a little less often than in 95 % of all cases, and U
has a small bias; docs/estimators.md reports how often it held. Rows outside the sample are assumed to have the same
error. The error of a sketch does not fall with more draws, and may end the search.

Axes: S draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

from nntk_dist.errors import ArgumentError
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from nntk_dist.statistics.standard_errors import Calibration

# Looks cost little beside the rows that follow, but not nothing. A prediction over more than a factor of 4 is a
# guess. A step goes only part of the predicted way, since superfluous draws cost more than another look.
_SMALLEST_STEP = 1.1
_LARGEST_STEP = 4.0
_PART_OF_THE_WAY = 0.7
# Many blocks estimate an error better than few: with 8, a bound is up to 1.2 times wider than with known noise.
_MOST_BLOCKS = 32


@dataclass(frozen=True)
class Look:
    """The error on the sample with S draws; see `Calibration` for the numbers."""

    draws: int
    relative_error: float
    bound: float
    pair_share: float
    sketch_share: float

    @classmethod
    def of(cls, draws: int, calibration: Calibration, *, looked_at: int, blocks: int) -> Self:
        """Return the look at a kernel with `blocks` blocks from a calibration of S draws in `looked_at` blocks.

        U leaves out pairs within a block, and larger blocks have more of these: what pairs of draws add to its variance
        is proportional to R/(R − 1).
        """
        larger = (1.0 - 1.0 / looked_at) / (1.0 - 1.0 / blocks)
        k, w = calibration.sketch_share, calibration.pair_share
        noise = k + (1.0 - k) * (1.0 - w + w * larger)
        error, bound = (value * math.sqrt(noise) for value in (calibration.relative_error, calibration.bound))
        return cls(draws, error, bound, w, k)

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> Self:
        """Return the look from its numbers."""
        values = {name: numbers[name] for name in cls.__dataclass_fields__}
        return cls(**values | {"draws": int(values["draws"])})  # type: ignore[arg-type]

    @property
    def numbers(self) -> dict[str, float]:
        """The fields as plain numbers."""
        return {name: float(value) for name, value in asdict(self).items()}

    def reaches(self, rtol: float) -> bool:
        """Return whether the bound is at most `rtol`."""
        return self.bound <= rtol


def draws_for(look: Look, rtol: float) -> float:
    """Return S at which the bound is expected to be `rtol`; infinite if the sketch's own error is too large.

    Solves (1 − k)((1 − w)u + w u²) + k = (rtol/bound)² for u = S_look/S, with w and k the shares of pairs and sketch.
    """
    allowed = (rtol / look.bound) ** 2 if look.bound > 0 else math.inf
    left = allowed - look.sketch_share
    if left <= 0 < look.sketch_share:
        return math.inf
    part = left / (1.0 - look.sketch_share)
    if part <= 0:  # there is only noise so far
        return math.inf
    w = look.pair_share
    u = part if w == 0 else (math.sqrt((1 - w) ** 2 + 4 * w * part) - (1 - w)) / (2 * w)
    return look.draws / u


def error_with(look: Look, num_draws: int) -> float:
    """Return the relative error that is expected of S draws: the other way round from `draws_for`."""
    k, w, u = look.sketch_share, look.pair_share, look.draws / num_draws
    return look.relative_error * math.sqrt((1.0 - k) * ((1.0 - w) * u + w * u * u) + k)


def next_draws(looks: Sequence[Look], *, rtol: float, max_draws: int, unit: int) -> int | None:
    """Return how many draws to look at next, a multiple of `unit`; None if the search is over.

    It is over if the last look reaches `rtol`, if no whole unit is left below `max_draws`, or if only a larger sketch
    could help.
    """
    last = looks[-1]
    most = max_draws // unit * unit
    if last.reaches(rtol) or last.draws >= most:
        return None
    wanted = draws_for(last, rtol)
    if math.isinf(wanted) and math.isfinite(last.bound):
        return None
    step = min(max((wanted / last.draws) ** _PART_OF_THE_WAY, _SMALLEST_STEP), _LARGEST_STEP)
    return min(most, math.ceil(step * last.draws / unit) * unit)


def blocks_to_look_at(num_draws: int, blocks: int, group_size: int) -> int:
    """Return the number of blocks of a look: up to 32, as many as whole groups allow, and no fewer than R."""
    groups = num_draws // group_size
    return max(blocks, max(count for count in range(1, min(groups, _MOST_BLOCKS) + 1) if groups % count == 0))


def verdict(look: Look, *, rtol: float, max_draws: int) -> str:
    """Return how the search ended, in words."""
    found = f"bound {look.bound:.3g} with {look.draws} draws"
    if look.reaches(rtol):
        return f"rtol {rtol:g} is reached: {found}"
    if math.isfinite(look.bound) and math.isinf(draws_for(look, rtol)):
        return f"rtol {rtol:g} is not reached: {found}, and the sketch's own error stays; make sketch larger"
    return f"rtol {rtol:g} is not reached: {found}, and max_draws is {max_draws}"


def check_accuracy(rtol: float | None, max_draws: int, *, kind: str, blocks: int, draws: int | str) -> None:
    """Check that draws can be searched for an asked accuracy.

    Raises:
        ArgumentError: they cannot; the first word of the message is the argument to change.
    """
    if rtol is None:
        return
    if kind == "local":
        raise ArgumentError(f"rtol is {rtol:g}; allowed for kind local, which has no draws: none")
    if blocks < MINIMUM_BLOCKS:
        raise ArgumentError(
            f"rtol is {rtol:g}; allowed for blocks {blocks}, which give no error bars: none (or take "
            f"{MINIMUM_BLOCKS} blocks or more)"
        )
    if isinstance(draws, int) and draws > max_draws:
        raise ArgumentError(
            f"draws is {draws}, the start of the search for rtol; allowed: auto, or up to max_draws, {max_draws}"
        )
