"""Designs: how draws depend on each other, in which groups, and how many draws fill the blocks.

Draws are independent (`iid`), come in pairs ±z (`antithetic`), or in groups with orthonormal directions (`orthogonal`).
This module counts only; `nntk_dist.sampling.draws` generates the numbers.

Axes: P parameters; S draws in R blocks.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from nntk_dist.errors import ArgumentError


class Design(StrEnum):
    """How the draws of a kernel depend on each other."""

    IID = "iid"
    ANTITHETIC = "antithetic"
    ORTHOGONAL = "orthogonal"


# The smallest group of each design.
GROUP_SIZES: Mapping[str, int] = MappingProxyType({Design.IID: 1, Design.ANTITHETIC: 2, Design.ORTHOGONAL: 1})
MINIMUM_BLOCKS = 4
AUTO_DRAWS = 256
# An orthogonal group has all P directions up to this P, which is exact for linear f; otherwise at most PARTIAL_GROUP.
COMPLETE_PARAMETERS = 4096
PARTIAL_GROUP = 256


def completes_groups(draws_per_block: int, num_parameters: int) -> bool:
    """Return whether a block can hold an orthogonal group of all P directions."""
    return num_parameters <= COMPLETE_PARAMETERS and draws_per_block >= num_parameters


def group_size(design: str, draws_per_block: int, num_parameters: int) -> int:
    """Return the draws in a group.

    An orthogonal group has P draws if a block can hold them, else the largest divisor of the block's draws up to
    min(P, 256).
    """
    if design != Design.ORTHOGONAL:
        return GROUP_SIZES[design]
    if completes_groups(draws_per_block, num_parameters):
        return num_parameters
    largest = min(num_parameters, PARTIAL_GROUP)
    return max(size for size in range(1, largest + 1) if draws_per_block % size == 0)


def check_draws(draws: int, blocks: int, design: str, num_parameters: int) -> None:
    """Check that S draws fill R blocks with whole groups, and that R is large enough for the design.

    Raises:
        ArgumentError: they do not, or it is not.
    """
    size = GROUP_SIZES[design]
    if design == Design.ORTHOGONAL and blocks > 0 and completes_groups(draws // blocks, num_parameters):
        size = num_parameters
    if blocks < 1 or (blocks < MINIMUM_BLOCKS and not (design == Design.ORTHOGONAL and size == num_parameters)):
        raise ArgumentError(blocks_message(blocks))
    unit = blocks * size
    if draws < unit or draws % unit:
        nearest = max(unit, round(draws / unit) * unit)
        raise ArgumentError(
            f"draws is {draws}; allowed: multiples of {unit} ({blocks} blocks of {design} groups of {size}); "
            f"the nearest is {nearest}"
        )


def blocks_message(blocks: int) -> str:
    """Return the error message for a number of blocks that is too small."""
    return (
        f"blocks is {blocks}; allowed: {MINIMUM_BLOCKS} or more, which the error bars need (1 or more without error "
        f"bars, if design orthogonal has groups of all P parameters, at most {COMPLETE_PARAMETERS}, in every block)"
    )


def automatic_draws(blocks: int, design: str, num_parameters: int, *, of_gradients: bool) -> int:
    """Return the number of draws that `draws: auto` means.

    One group in each block for the estimator `autodiff`, otherwise 256 rounded up to whole groups in every block.
    Orthogonal groups have at least two draws here; fewer than four blocks need complete groups.
    """
    if design != Design.ORTHOGONAL:
        unit = blocks * GROUP_SIZES[design]
        return unit if of_gradients else -(-AUTO_DRAWS // unit) * unit
    per_block = min(2, num_parameters) if of_gradients else -(-AUTO_DRAWS // max(1, blocks))
    complete = num_parameters <= COMPLETE_PARAMETERS and (per_block >= num_parameters or blocks < MINIMUM_BLOCKS)
    if complete:
        per_block = -(-per_block // num_parameters) * num_parameters
    return blocks * per_block
