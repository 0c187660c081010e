"""How many draws an asked accuracy takes: looks at a few rows, each with more draws, until the bound is low enough.

A *look* computes part of the sample of entries that calibrates a kernel's standard errors
(`nntk_dist.statistics.estimates`), with S draws, and takes from it the 95 % bound of ‖U − Θ‖/‖Θ‖. From how much of the
noise falls like 1/S and how much like 1/S² follows where to look next. A function of the looks so far and nothing else:
a search that was stopped goes on as if it had not been. No model, no features here.

A search ends where the bound happens to be low, so it holds a little less often than 95 %, and U has a bias of that
origin; docs/estimators.md has how often it held. Other rows than the sampled ones are taken to err alike. What a sketch
adds does not fall with draws, and may end the search.

Axes: S draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Self

from nntk_dist.errors import NNTKError
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from nntk_dist.statistics.estimates import Calibration

# Looks are cheap beside the rows that follow, but not free; a prediction over more than a factor of 4 is a guess. A
# step takes only part of the way that it predicts, since draws beyond those needed cost more than another look.
_SMALLEST_STEP = 1.1
_LARGEST_STEP = 4.0
_PART_OF_THE_WAY = 0.7
# Many blocks tell an error better than few: with 8 of them a bound is up to 1.2 times wider than with known noise.
_MOST_BLOCKS = 32


@dataclass(frozen=True)
class Look:
    """What S draws give on the sample; see `Calibration` for the numbers."""

    draws: int
    relative_error: float
    bound: float
    pair_share: float
    sketch_share: float

    @classmethod
    def of(cls, draws: int, calibration: Calibration, *, looked_at: int, blocks: int) -> Self:
        """The look that a calibration of S draws in `looked_at` blocks is at a kernel with `blocks`.

        Pairs within a block are left out of U, of which larger blocks have more: what pairs of draws add to its
        variance is in proportion to R/(R − 1).
        """
        larger = (1.0 - 1.0 / looked_at) / (1.0 - 1.0 / blocks)
        k, w = calibration.sketch_share, calibration.pair_share
        noise = k + (1.0 - k) * (1.0 - w + w * larger)
        error, bound = (value * math.sqrt(noise) for value in (calibration.relative_error, calibration.bound))
        return cls(draws, error, bound, w, k)

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> Self:
        """The look that `numbers` describes."""
        values = {name: numbers[name] for name in cls.__dataclass_fields__}
        return cls(**values | {"draws": int(values["draws"])})  # type: ignore[arg-type]

    @property
    def numbers(self) -> dict[str, float]:
        """The fields as plain numbers."""
        return {name: float(value) for name, value in asdict(self).items()}

    def reaches(self, rtol: float) -> bool:
        """Whether the error is below `rtol`, by the bound."""
        return self.bound <= rtol


def draws_for(look: Look, rtol: float) -> float:
    """S at which the bound is expected to be `rtol`; infinite where the sketch's own error is too large.

    Solves (1 − k)((1 − w)u + w u²) + k = (rtol/bound)² for u = S_look/S, w and k the shares of pairs and sketch.
    """
    allowed = (rtol / look.bound) ** 2 if look.bound > 0 else math.inf
    left = allowed - look.sketch_share
    if left <= 0 < look.sketch_share:
        return math.inf
    part = left / (1.0 - look.sketch_share)
    if part <= 0:  # noise is all there is yet
        return math.inf
    w = look.pair_share
    u = part if w == 0 else (math.sqrt((1 - w) ** 2 + 4 * w * part) - (1 - w)) / (2 * w)
    return look.draws / u


def next_draws(looks: Sequence[Look], *, rtol: float, max_draws: int, unit: int) -> int | None:
    """How many draws to look at next, a multiple of `unit`; None where the search has ended.

    It ends where the last look reaches `rtol`, where no whole unit is left below `max_draws`, or where only a larger
    sketch could help.
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
    """How many blocks a look divides its draws into: up to 32, as many as whole groups allow, and no fewer than R."""
    groups = num_draws // group_size
    return max(blocks, max(count for count in range(1, min(groups, _MOST_BLOCKS) + 1) if groups % count == 0))


def verdict(look: Look, *, rtol: float, max_draws: int) -> str:
    """How the search ended, in words."""
    found = f"bound {look.bound:.3g} with {look.draws} draws"
    if look.reaches(rtol):
        return f"rtol {rtol:g} is reached: {found}"
    if math.isfinite(look.bound) and math.isinf(draws_for(look, rtol)):
        return f"rtol {rtol:g} is not reached: {found}, and the sketch's own error stays; make sketch larger"
    return f"rtol {rtol:g} is not reached: {found}, and max_draws is {max_draws}"


def check_accuracy(rtol: float | None, max_draws: int, *, kind: str, blocks: int, draws: int | str) -> None:
    """Raise an NNTKError, its first word the argument to change, unless an asked accuracy can be looked for."""
    if max_draws < 1:
        raise NNTKError(f"max_draws is {max_draws}; allowed: a whole number, 1 or more")
    if rtol is None:
        return
    if isinstance(rtol, bool) or not isinstance(rtol, Real) or not 0 < rtol < 1:
        raise NNTKError(f"rtol is {rtol!r}; allowed: none, or a number above 0 and below 1, such as 0.05")
    if kind == "local":
        raise NNTKError(f"rtol is {rtol:g}; allowed for kind local, which is exact: none")
    if blocks < MINIMUM_BLOCKS:
        raise NNTKError(
            f"rtol is {rtol:g}; allowed for blocks {blocks}, which give no error bars: none (or take "
            f"{MINIMUM_BLOCKS} blocks or more)"
        )
    if isinstance(draws, int) and draws > max_draws:
        raise NNTKError(
            f"draws is {draws}, where the search for rtol begins; allowed: auto, or up to max_draws, {max_draws}"
        )
