"""Which perturbation every draw is: designs, blocks, and the perturbations themselves as functions of their number.

Draws that depend on each other (±z of an antithetic pair) form a group, and a group never straddles two blocks: blocks
are independent and identically distributed, on which every standard error rests. Nothing here evaluates a model.

Axes: s draws, r blocks, P parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.distributions import Distribution
from nntk_dist.errors import NNTKError, check_choice
from nntk_dist.philox import Stream, uniform

GROUP_SIZES = {"iid": 1, "antithetic": 2}
MINIMUM_BLOCKS = 4
AUTO_DRAWS = 256
_PARAMETERS_PER_CHUNK = 1 << 16
_SLICE_ELEMENTS = 1 << 24
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Drawing:
    """S perturbations in R blocks, a pure function of the seed; draw s lies in block s // (S/R).

    Raises: NNTKError where R < 4 or where S is not a multiple of R times the design's group size.
    """

    distribution: Distribution
    num_draws: int
    num_blocks: int
    num_parameters: int
    design: str = "iid"
    seed: int = 0
    stream: Stream = Stream.PARAMETER

    def __post_init__(self) -> None:
        check_choice("design", self.design, GROUP_SIZES)
        if self.num_blocks < MINIMUM_BLOCKS:
            raise NNTKError(blocks_message(self.num_blocks))
        unit = self.num_blocks * self.group_size
        if self.num_draws < unit or self.num_draws % unit:
            nearest = max(unit, round(self.num_draws / unit) * unit)
            raise NNTKError(
                f"draws is {self.num_draws}; allowed: multiples of {unit} ({self.num_blocks} blocks of "
                f"{self.design} groups of {self.group_size}); the nearest is {nearest}"
            )

    @property
    def group_size(self) -> int:
        return GROUP_SIZES[self.design]

    @property
    def draws_per_block(self) -> int:
        return self.num_draws // self.num_blocks

    def perturbations(
        self,
        draws: range,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "s P"]:
        """Coordinates `start` to `stop` of the perturbations z of consecutive draws; cost O(s·(stop − start))."""
        stop = self.num_parameters if stop is None else stop
        first = draws.start // self.group_size
        last = -(-draws.stop // self.group_size)
        groups = torch.arange(first, last, dtype=torch.int64, device=device)
        members = self.distribution.sample(
            self.seed, groups, self.num_parameters, start, stop, stream=self.stream, dtype=dtype
        )
        if self.group_size == 1:
            return members
        pairs = torch.stack((members, -members), dim=1).flatten(0, 1)
        offset = draws.start - first * self.group_size
        return pairs[offset : offset + len(draws)]

    def shrinkage(self, draws: range, *, device: torch.device | str = "cpu") -> Float64[Tensor, " s"]:
        """U^{1/P} of each draw, U ~ Uniform(0, 1) shared by a group: the radial factor of `autodiff` (DESIGN §1)."""
        groups = torch.arange(draws.start, draws.stop, dtype=torch.int64, device=device) // self.group_size
        return uniform(self.seed, Stream.RADIUS, groups, 1)[:, 0] ** (1.0 / self.num_parameters)

    def squared_norms(self, *, device: torch.device | str = "cpu") -> Float64[Tensor, " s"]:
        """|z_s|² of all draws, a slice of parameters at a time; memory O(S + 2^24)."""
        result = torch.zeros(self.num_draws, dtype=torch.float64, device=device)
        for part in self._slices(device):
            result += part.square().sum(1)
        return result

    def inner_products(self, *, device: torch.device | str = "cpu") -> Float64[Tensor, "s s"]:
        """⟨z_s, z_t⟩ of all draws, regenerated a slice of parameters at a time: memory O(S² + 2^24), 2·S²·P
        operations.
        """
        result = torch.zeros(self.num_draws, self.num_draws, dtype=torch.float64, device=device)
        for part in self._slices(device):
            result.addmm_(part, part.T)
        return result

    def _slices(self, device: torch.device | str) -> Iterator[Float64[Tensor, "s k"]]:
        """All draws, a slice of parameters at a time; sums over them do not depend on anything but the drawing."""
        width = max(256, min(_PARAMETERS_PER_CHUNK, _SLICE_ELEMENTS // self.num_draws))
        for start in range(0, self.num_parameters, width):
            stop = min(start + width, self.num_parameters)
            yield self.perturbations(range(self.num_draws), start, stop, dtype=torch.float64, device=device)


def draw_chunks(draws: range, num_parameters: int) -> Iterator[range]:
    """Consecutive parts of a range of draws whose perturbations take at most 2^22 numbers (or a single draw)."""
    step = max(1, _CHUNK_ELEMENTS // num_parameters)
    for start in range(draws.start, draws.stop, step):
        yield range(start, min(start + step, draws.stop))


def blocks_message(blocks: int) -> str:
    """What to say of too few blocks."""
    return f"blocks is {blocks}; allowed: {MINIMUM_BLOCKS} or more, which the error bars need"


def automatic_draws(estimator: str, blocks: int, design: str) -> int:
    """`draws: auto`: one group a block where gradients are drawn, otherwise 256 rounded up to whole groups in every
    block.
    """
    unit = blocks * GROUP_SIZES[design]
    return unit if estimator == "autodiff" else -(-AUTO_DRAWS // unit) * unit
