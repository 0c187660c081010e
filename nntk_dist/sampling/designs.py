"""Designs: how draws depend on each other, in which groups, and which kernels, laws and designs go together.

`iid` draws stand alone; `antithetic` ones come in pairs ±z; `orthogonal` ones in groups whose directions are
orthonormal. Only words and counts here; the numbers are drawn in `nntk_dist.sampling.draws`.

Axes: P parameters; S draws in R blocks.
"""

from nntk_dist.errors import NNTKError, check_choice
from nntk_dist.sampling.laws import GAMMA_SCALES, RADIAL, Gaussian, LowRank

# The smallest group of every design.
GROUP_SIZES = {"iid": 1, "antithetic": 2, "orthogonal": 1}
MINIMUM_BLOCKS = 4
AUTO_DRAWS = 256
# Orthogonal groups: of all P directions up to here, which is exact for linear f; otherwise of so many at most.
COMPLETE_PARAMETERS = 4096
PARTIAL_GROUP = 256


def completes_groups(draws_per_block: int, num_parameters: int) -> bool:
    """Whether a block has room for an orthogonal group of all P directions."""
    return num_parameters <= COMPLETE_PARAMETERS and draws_per_block >= num_parameters


def group_size(design: str, draws_per_block: int, num_parameters: int) -> int:
    """Draws in a group. Orthogonal: P where a block has room for that, else the largest divisor up to min(P, 256)."""
    if design != "orthogonal":
        return GROUP_SIZES[design]
    if completes_groups(draws_per_block, num_parameters):
        return num_parameters
    largest = min(num_parameters, PARTIAL_GROUP)
    return max(size for size in range(1, largest + 1) if draws_per_block % size == 0)


def check_draws(draws: int, blocks: int, design: str, num_parameters: int) -> None:
    """Raise an NNTKError unless S draws fill R blocks with whole groups, and R is enough for the design."""
    size = GROUP_SIZES[design]
    if design == "orthogonal" and blocks > 0 and completes_groups(draws // blocks, num_parameters):
        size = num_parameters
    if blocks < 1 or (blocks < MINIMUM_BLOCKS and not (design == "orthogonal" and size == num_parameters)):
        raise NNTKError(blocks_message(blocks))
    unit = blocks * size
    if draws < unit or draws % unit:
        nearest = max(unit, round(draws / unit) * unit)
        raise NNTKError(
            f"draws is {draws}; allowed: multiples of {unit} ({blocks} blocks of {design} groups of {size}); "
            f"the nearest is {nearest}"
        )


def blocks_message(blocks: int) -> str:
    """What to say of too few blocks."""
    return (
        f"blocks is {blocks}; allowed: {MINIMUM_BLOCKS} or more, which the error bars need (1 or more without error "
        f"bars, where design orthogonal has groups of all P parameters, at most {COMPLETE_PARAMETERS}, in every block)"
    )


def automatic_draws(estimator: str, blocks: int, design: str, num_parameters: int) -> int:
    """`draws: auto`: one group a block where gradients are drawn, otherwise 256 rounded up to whole groups in every
    block.

    The smallest orthogonal group that is one is a pair; fewer than four blocks need complete groups.
    """
    if design != "orthogonal":
        unit = blocks * GROUP_SIZES[design]
        return unit if estimator == "autodiff" else -(-AUTO_DRAWS // unit) * unit
    per_block = min(2, num_parameters) if estimator == "autodiff" else -(-AUTO_DRAWS // max(1, blocks))
    complete = num_parameters <= COMPLETE_PARAMETERS and (per_block >= num_parameters or blocks < MINIMUM_BLOCKS)
    if complete:
        per_block = -(-per_block // num_parameters) * num_parameters
    return blocks * per_block


ACTIVATION_DESIGNS = ("iid", "antithetic")


def _check_activation(distribution: str, design: str) -> None:
    if distribution != Gaussian.name:
        raise NNTKError(
            f"estimator is 'activation', whose noise by layer is Gaussian; allowed for distribution {distribution}: "
            "auto, weight, autodiff"
        )
    if design not in ACTIVATION_DESIGNS:
        raise NNTKError(
            f"design is '{design}'; allowed for estimator activation, whose examples have noise of their own: "
            f"{', '.join(ACTIVATION_DESIGNS)}"
        )


def check_combination(
    *, kind: str, estimator: str, statistic: str, distribution: str, gamma_scale: str, design: str, blocks: int
) -> None:
    """Raise an NNTKError, its first word the argument to change, where the words of a kernel do not go together."""
    check_choice("design", design, GROUP_SIZES)
    check_choice("gamma_scale", gamma_scale, GAMMA_SCALES)
    if kind == "local":
        return
    if blocks < 1 or (blocks < MINIMUM_BLOCKS and design != "orthogonal"):
        raise NNTKError(blocks_message(blocks))
    if blocks == 1 and kind == "nonlocal" and statistic != "plugin":
        raise NNTKError(
            f"statistic is '{statistic}'; allowed for blocks 1: plugin (the unbiased one pairs different blocks)"
        )
    if kind == "covariance" and gamma_scale == "relative":
        raise NNTKError(
            "gamma_scale is 'relative'; allowed for kind covariance: absolute (scaled by tensor, it would tend to "
            "another kernel than the NTK)"
        )
    if estimator == "activation":
        _check_activation(distribution, design)
    if distribution != LowRank.name:
        return
    if kind != "nonlocal":
        raise NNTKError(f"distribution is 'lowrank', which is not radial; allowed for kind {kind}: {', '.join(RADIAL)}")
    if estimator not in ("auto", "weight"):
        raise NNTKError(
            f"estimator is '{estimator}'; allowed for distribution lowrank, which is not radial: auto, weight"
        )
    if design == "orthogonal":
        raise NNTKError("design is 'orthogonal'; allowed for distribution lowrank: iid, antithetic")
