"""The perturbations of a kernel: law, design, groups and blocks of draws, each a pure function of its number.

z = D·u, with u from the law and D = 1 or one scale per tensor. Draws that depend on each other (±z of an antithetic
pair, orthonormal directions) form a group. A group lies in one block, so that blocks are independent and identically
distributed; every standard error relies on this. The gradient is g = mean Δ_s v_s, with output differences Δ and
*directions* v = P·D⁻¹u/|u|² for radial laws, v = D⁻¹·2u/γ² for the low-rank law. No model is evaluated here.

Axes: s draws, r blocks, P parameters; m members: independent vectors before scaling, one for both draws of a pair.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.errors import check_choice
from nntk_dist.sampling.designs import GROUP_SIZES, Design, check_draws, group_size
from nntk_dist.sampling.laws import Law, LowRank, RadialLaw
from nntk_dist.sampling.low_rank import low_rank_factors, low_rank_normals
from nntk_dist.sampling.orthogonal import inverse_factors, needs_whole_vectors, orthonormal_rows, triangular_factors
from nntk_dist.sampling.philox import normal, uniform
from nntk_dist.sampling.streams import LAW_DRAW, Stream

_SLICE = 1 << 14  # parameters at a time; fixed, because the order of summation affects the bits of a perturbation
_SLICE_ELEMENTS = 1 << 24
DRAW_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Drawing:
    """S perturbations in R blocks, a pure function of the seed; draw s lies in block s // (S/R).

    Attributes:
        distribution: the law of u.
        num_draws: S.
        num_blocks: R.
        num_parameters: P.
        design: how draws depend on each other.
        seed: the seed of the kernel.
        stream: the stream of random numbers.
        shapes: the shapes of the tensors that form the parameter vector, in order; required for `LowRank` and for
            `scales`.
        scales: the diagonal of D, one number per tensor, or () for D = 1.

    Raises:
        ArgumentError: S is not a multiple of R times the group size, or R < 4 and groups are not complete.

    Example:
        >>> from nntk_dist.sampling.laws import Gaussian
        >>> drawing = Drawing(Gaussian(gamma=0.1), num_draws=8, num_blocks=4, num_parameters=3)
        >>> drawing.perturbations(range(2), dtype=torch.float64).shape
        torch.Size([2, 3])
    """

    distribution: Law
    num_draws: int
    num_blocks: int
    num_parameters: int
    design: str = Design.IID
    seed: int = 0
    stream: Stream = Stream.PARAMETER
    shapes: tuple[tuple[int, ...], ...] = ()
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice("design", self.design, Design)
        check_draws(self.num_draws, self.num_blocks, self.design, self.num_parameters)
        if (self.shapes or self.scales or isinstance(self.distribution, LowRank)) and (
            sum(map(math.prod, self.shapes)) != self.num_parameters or len(self.scales) not in (0, len(self.shapes))
        ):
            raise ValueError(f"shapes {self.shapes} and scales {self.scales} do not fit {self.num_parameters} numbers")

    @property
    def group_size(self) -> int:
        """The number of draws in a group; draws of different groups are independent."""
        return group_size(self.design, self.draws_per_block, self.num_parameters)

    @property
    def draws_per_block(self) -> int:
        """The number of draws in a block."""
        return self.num_draws // self.num_blocks

    def by_group(self, draws: range) -> Iterator[tuple[int, range]]:
        """Yield the groups of consecutive draws, each with its members among the given draws.

        A group is an antithetic pair, an orthogonal group or a single draw. Group g has draws g·k to (g+1)·k − 1, k
        being the group size. The draws of a group share the noise of a noisy model.
        """
        size = self.group_size
        for group in range(draws.start // size, -(-draws.stop // size)):
            yield group, range(max(draws.start, group * size), min(draws.stop, (group + 1) * size))

    def perturbations(
        self,
        draws: range,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "s P"]:
        """Return coordinates `start` to `stop` of the perturbations z of consecutive draws.

        Equal calls give equal bits; different slices agree to rounding. Cost: O(s·(stop − start)), plus passes over all
        coordinates if the law needs |n| or the design is orthogonal. Partial groups cost as much as whole ones.

        Args:
            draws: consecutive draws.
            start: the first coordinate.
            stop: the end of the coordinates; None for P.
            dtype: the dtype of the result.
            device: the device of the result.
        """
        stop = self.num_parameters if stop is None else stop
        first, last = draws.start // self.group_size, -(-draws.stop // self.group_size)
        whole = range(first * self.group_size, last * self.group_size)
        members = self._members(whole, device)
        if isinstance(self.distribution, LowRank):
            values = self._low_rank(members, start, stop, self.distribution.gamma / math.sqrt(2.0), dtype)
        elif self.design == Design.ORTHOGONAL:
            values = self._orthogonal(members, start, stop, dtype)
        else:
            times = self._multipliers(members)
            values = normal(self.seed, self.stream, members, start, stop, dtype=dtype, times=times)
        if self.scales:
            values *= self._scale_vector(start, stop, device).to(dtype)
        if self.design == Design.ANTITHETIC:
            values = torch.stack((values, -values), dim=1).flatten(0, 1)
        offset = draws.start - whole.start
        return values[offset : offset + len(draws)]

    def low_rank_factors(
        self, draws: range, *, dtype: torch.dtype, device: torch.device | str
    ) -> list[tuple[Float[Tensor, "s out r"], Float[Tensor, "s rest r"] | None]]:
        """Return low-rank perturbations tensor by tensor, as factors A, B with z = A·Bᵀ.

        Args:
            draws: consecutive draws that form whole groups.
            dtype: the dtype of the result.
            device: the device of the result.

        Returns:
            A and B for tensors of two or more axes; z of shape (s, size, 1) and None for vectors and numbers.
        """
        assert isinstance(self.distribution, LowRank)
        members = self._members(draws, device)
        scales = self.scales or (1.0,) * len(self.shapes)
        signed = torch.tensor([1.0, -1.0] if self.design == Design.ANTITHETIC else [1.0], dtype=dtype, device=device)
        parts = low_rank_factors(self.seed, self.stream, members, self.shapes, self.distribution.rank)
        result = []
        for scale, (left, right) in zip(scales, parts, strict=True):
            left = left.mul_(scale * self.distribution.gamma / math.sqrt(2.0)).to(dtype)
            left = (left[:, None] * signed[:, None, None]).flatten(0, 1)
            result.append((left, None if right is None else right.to(dtype).repeat_interleave(len(signed), 0)))
        return result

    def directions(self, z: Float[Tensor, "s P"]) -> Float64[Tensor, "s P"]:
        """Return the directions v_s of perturbations z_s, computed from the rounded values that moved the model."""
        u = z.to(torch.float64, copy=True)
        if not self.scales:
            return u.mul_(self._direction_factor(u.square().sum(1))[:, None])
        scale = self._scale_vector(0, self.num_parameters, z.device)
        u /= scale
        return u.mul_(self._direction_factor(u.square().sum(1))[:, None]).div_(scale)

    def shrinkage(self, draws: range, *, device: torch.device | str = "cpu") -> Float64[Tensor, " s"]:
        """Return U^{1/P} of each draw, U ~ Uniform(0, 1): the radial factor of estimator `autodiff`; pairs share U."""
        numbers = torch.arange(draws.start, draws.stop, dtype=torch.int64, device=device)
        groups = numbers // GROUP_SIZES[self.design]
        return uniform(self.seed, Stream.RADIUS, groups, 1)[:, 0] ** (1.0 / self.num_parameters)

    def shrunken(self, draws: range, *, device: torch.device | str = "cpu") -> Iterator[Float64[Tensor, " P"]]:
        """Yield U^{1/P} z of each draw, one by one.

        Memory: a part of at most 2^22 numbers, or one group. It is released once the caller has dropped its last draw.
        """
        for part in draw_chunks(draws, self.num_parameters, self.group_size):
            z = self.perturbations(part, dtype=torch.float64, device=device)
            left = [*z.mul_(self.shrinkage(part, device=device)[:, None])][::-1]
            del z
            while left:
                yield left.pop()

    def squared_norms(self, *, device: torch.device | str = "cpu") -> Float64[Tensor, " s"]:
        """Return |u_s|² of all draws of a radial law, summed over slices of parameters. Memory: O(S + 2^24)."""
        members = self._members(range(self.num_draws), device)
        squares = self._member_squares(members) * self._multipliers(members).square()
        return squares.repeat_interleave(2) if self.design == Design.ANTITHETIC else squares

    def direction_products(
        self, counted: Sequence[tuple[int, int]] | None = None, *, device: torch.device | str = "cpu"
    ) -> Float64[Tensor, "s s"]:
        """Return ⟨v_s, v_t⟩ for all draws s, t, from regenerated slices of the perturbations.

        Cost: 2·S²·P operations; memory O(S² + 2^24).

        Args:
            counted: half-open intervals of the parameters over which products are summed; all by default.
            device: where to compute.
        """
        if self.design == Design.ORTHOGONAL and needs_whole_vectors(self.group_size, self.num_parameters):
            z = self.perturbations(range(self.num_draws), dtype=torch.float64, device=device)
            v = self.directions(z)  # no larger than the result: P < 2k ≤ S
            v = v if counted is None else torch.cat([v[:, start:stop] for start, stop in counted], dim=1)
            return v @ v.T
        members = self._members(range(self.num_draws), device)
        squares = torch.zeros(len(members), dtype=torch.float64, device=device)
        products = torch.zeros(len(members), len(members), dtype=torch.float64, device=device)
        grams = self._no_grams(members) if self.design == Design.ORTHOGONAL else None
        for start, stop in self._slices(len(members)):
            part = self._normals(members, start, stop)
            squares += part.square().sum(1)
            if grams is not None:
                rows = part.unflatten(0, (-1, self.group_size))
                grams += rows @ rows.mT
            if self.scales:
                part /= self._scale_vector(start, stop, device)
            for low, high in [(start, stop)] if counted is None else counted:
                some = part[:, max(low - start, 0) : max(high - start, 0)]
                products.addmm_(some, some.T)
        if grams is not None:
            inverses = inverse_factors(triangular_factors(grams))
            for _ in range(2):  # L⁻¹ from the left, then from the right
                rows = inverses @ products.unflatten(0, (-1, self.group_size))
                products = rows.flatten(0, 1).T.contiguous()
        return self._finished(products, squares, members)

    def _finished(self, products: Tensor, squares: Tensor, members: Tensor) -> Float64[Tensor, "s s"]:
        """Inner products of directions, from inner products of the members' vectors (n, or orthonormal q)."""
        if isinstance(self.distribution, LowRank):
            products *= 2.0 / self.distribution.gamma**2
        else:
            factor = self.num_parameters / self._multipliers(members, squares)
            factor /= squares.sqrt() if self.design == Design.ORTHOGONAL else squares
            products *= factor[:, None] * factor[None, :]
        if self.design != Design.ANTITHETIC:
            return products
        signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64, device=products.device)
        return torch.kron(products, signs)

    def _direction_factor(self, squares: Float64[Tensor, " s"]) -> Float64[Tensor, " s"]:
        """The factor of u in D·v, from |u|²."""
        if isinstance(self.distribution, LowRank):
            return torch.full_like(squares, 2.0 / self.distribution.gamma**2)
        return self.num_parameters / squares

    def _members(self, draws: range, device: torch.device | str) -> Tensor:
        """The members of whole groups of draws: one for an antithetic pair, otherwise one for each draw."""
        sharing = GROUP_SIZES[self.design]
        return torch.arange(draws.start // sharing, draws.stop // sharing, dtype=torch.int64, device=device)

    def _normals(self, members: Tensor, start: int, stop: int) -> Float64[Tensor, "m k"]:
        """A slice of the members' vectors n, of unit variance, before orthonormalisation."""
        if isinstance(self.distribution, LowRank):
            return self._low_rank(members, start, stop)
        return normal(self.seed, self.stream, members, start, stop)

    def _low_rank(
        self, members: Tensor, start: int, stop: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "m k"]:
        """A slice of the members' low-rank vectors, multiplied by `scale`."""
        assert isinstance(self.distribution, LowRank)
        numbers = self.seed, self.stream, members, self.shapes, self.distribution.rank, start, stop
        return low_rank_normals(*numbers, scale=scale, dtype=dtype)

    def _multipliers(self, members: Tensor, squares: Tensor | None = None) -> Float64[Tensor, " m"]:
        """u/n; laws that prescribe the length |u| need |n|², in `squares` if it is known."""
        assert isinstance(self.distribution, RadialLaw)
        scale = self.distribution.scale(
            self.num_parameters, lambda: uniform(self.seed, self.stream, members, 1, draw=LAW_DRAW)[:, 0]
        )
        multipliers = torch.as_tensor(scale, dtype=torch.float64, device=members.device).expand(len(members))
        if not self.distribution.normalised:
            return multipliers
        return multipliers / (self._member_squares(members) if squares is None else squares).sqrt()

    def _member_squares(self, members: Tensor) -> Float64[Tensor, " m"]:
        """|n|² of members, a slice at a time."""
        squares = torch.zeros(len(members), dtype=torch.float64, device=members.device)
        for start, stop in self._slices():
            squares += self._normals(members, start, stop).square().sum(1)
        return squares

    def _orthogonal(self, members: Tensor, start: int, stop: int, dtype: torch.dtype) -> Float[Tensor, "m k"]:
        """A slice of orthogonal perturbations: orthonormal directions with the lengths of independent draws."""
        size = self.group_size
        if needs_whole_vectors(size, self.num_parameters):
            rows = self._normals(members, 0, self.num_parameters)
            lengths = self._multipliers(members, rows.square().sum(1)) * rows.norm(dim=1)
            q = orthonormal_rows(rows.unflatten(0, (-1, size))).flatten(0, 1)
            return (q[:, start:stop] * lengths[:, None]).to(dtype)
        grams, everything = self._no_grams(members), (start, stop) == (0, self.num_parameters)
        kept = deque[Tensor]()  # for all parameters, keep the normals; for a slice, generate its normals twice
        for low, high in self._slices():
            rows = self._normals(members, low, high).unflatten(0, (-1, size))
            grams += rows @ rows.mT
            if everything:
                kept.append(rows)
        squares = grams.diagonal(dim1=1, dim2=2).flatten()
        lengths = (self._multipliers(members, squares) * squares.sqrt()).reshape(-1, size, 1)
        mixing = inverse_factors(triangular_factors(grams)).mul_(lengths)
        result = torch.empty(len(members), stop - start, dtype=dtype, device=members.device)
        for low in range(start, stop, _SLICE):
            high = min(low + _SLICE, stop)
            rows = kept.popleft() if kept else self._normals(members, low, high).unflatten(0, (-1, size))
            result[:, low - start : high - start] = (mixing @ rows).flatten(0, 1)
        return result

    def _no_grams(self, members: Tensor) -> Float64[Tensor, "g k k"]:
        size = self.group_size
        return torch.zeros(len(members) // size, size, size, dtype=torch.float64, device=members.device)

    def _scale_vector(self, start: int, stop: int, device: torch.device | str) -> Float64[Tensor, " k"]:
        """A slice of D's diagonal."""
        ends = list(itertools.accumulate(map(math.prod, self.shapes)))
        overlaps = [
            max(0, min(stop, end) - max(start, end - math.prod(shape)))
            for end, shape in zip(ends, self.shapes, strict=True)
        ]
        values = torch.tensor(self.scales, dtype=torch.float64, device=device)
        return values.repeat_interleave(torch.tensor(overlaps, device=device))

    def _slices(self, num_rows: int | None = None) -> Iterator[tuple[int, int]]:
        """Intervals that cover the parameters: of fixed width, or narrower the more rows are in memory."""
        width = _SLICE if num_rows is None else max(256, min(1 << 16, _SLICE_ELEMENTS // num_rows))
        for start in range(0, self.num_parameters, width):
            yield start, min(start + width, self.num_parameters)


def draw_chunks(draws: range, num_parameters: int, group_size: int = 1) -> Iterator[range]:
    """Split a range of draws into parts of whole groups, with at most 2^22 numbers each, or one group."""
    step = max(1, DRAW_ELEMENTS // (num_parameters * group_size)) * group_size
    for start in range(draws.start, draws.stop, step):
        yield range(start, min(start + step, draws.stop))
