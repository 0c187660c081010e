"""Low-rank perturbations of weight matrices, for any slice of the parameter vector.

A tensor of two or more axes is viewed as (out, rest) and perturbed by A·Bᵀ/√r with standard normal A, (out, r), and B,
(rest, r): unit variance, uncorrelated entries, rank r. Vectors and numbers get plain normals. The index of a normal
counts tensor by tensor, A before B, row by row.

Axes: g perturbations, P parameters, r rank.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream

_PRODUCT_ELEMENTS = 1 << 18  # in float64


def low_rank_normals(
    seed: int,
    stream: Stream,
    groups: Int64[Tensor, " g"],
    shapes: Sequence[tuple[int, ...]],
    rank: int,
    start: int,
    stop: int,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "g k"]:
    """Return coordinates `start` to `stop` of low-rank perturbations, multiplied by `scale`.

    Computed in float64 and rounded to `dtype`; different slices agree to rounding. Cost: O(g·r·(stop − start)) if the
    matrices are not much longer than the slice.

    Args:
        seed: the seed of the kernel.
        stream: the stream of random numbers.
        groups: one counter for each perturbation.
        shapes: the shapes of the tensors that form the parameter vector, in order.
        rank: r.
        start: the first coordinate.
        stop: the end of the coordinates.
        scale: a factor.
        dtype: the dtype of the result.
    """
    result = torch.empty(len(groups), stop - start, dtype=dtype, device=groups.device)
    offset = first = 0  # of the tensor's coordinates, of its normals
    for shape in shapes:
        size = math.prod(shape)
        low, high = max(start - offset, 0), min(stop - offset, size)
        matrix = len(shape) >= 2
        out, rest = (shape[0], size // max(1, shape[0])) if matrix else (size, 0)
        own = result[:, offset + low - start : offset + high - start]
        if low < high and not matrix:
            own.copy_(normal(seed, stream, groups, first + low, first + high).mul_(scale))
        elif low < high:
            above, below = low // rest, -(-high // rest)
            left = normal(seed, stream, groups, first + above * rank, first + below * rank).unflatten(1, (-1, rank))
            begin = first + out * rank
            right = normal(seed, stream, groups, begin, begin + rest * rank).unflatten(1, (-1, rank))
            _multiply_into_(own, left.mul_(scale / math.sqrt(rank)), right, low - above * rest)
        offset += size
        first += (out + rest) * rank if matrix else size
    return result


def _multiply_into_(
    result: Float[Tensor, "g k"], left: Float64[Tensor, "g o r"], right: Float64[Tensor, "g i r"], start: int
) -> None:
    """Write coordinates of A·Bᵀ from `start` on, a few perturbations at a time, so that products stay in the cache."""
    shape = left.shape[1], right.shape[1]
    step = max(1, _PRODUCT_ELEMENTS // math.prod(shape))
    buffer = left.new_empty(min(step, len(left)), *shape)
    for own, a, b in zip(result.split(step), left.split(step), right.split(step), strict=True):
        product = torch.bmm(a, b.mT, out=buffer[: len(a)])
        own.copy_(product.flatten(1)[:, start : start + result.shape[1]])


def low_rank_factors(
    seed: int, stream: Stream, groups: Int64[Tensor, " g"], shapes: Sequence[tuple[int, ...]], rank: int
) -> Iterator[tuple[Float64[Tensor, "g out r"], Float64[Tensor, "g rest r"] | None]]:
    """Yield the factors of the same perturbations, tensor by tensor: A/√r and B, or (g, size, 1) normals and None."""
    first = 0
    for shape in shapes:
        size = math.prod(shape)
        if len(shape) < 2:
            yield normal(seed, stream, groups, first, first + size)[:, :, None], None
            first += size
            continue
        out, rest = shape[0], size // max(1, shape[0])
        values = normal(seed, stream, groups, first, first + (out + rest) * rank).unflatten(1, (-1, rank))
        yield values[:, :out] / math.sqrt(rank), values[:, out:]
        first += (out + rest) * rank
