"""Low-rank perturbations of weight matrices, any slice of the long vector at a time.

A tensor of two axes or more is viewed as (out, rest) and moved by A·Bᵀ/√r with standard normal A, (out, r), and B,
(rest, r): unit variance, uncorrelated entries, rank r. Vectors and numbers get plain normals. The normals have an index
space of their own: tensor by tensor, A before B, rows first.

Axes: g perturbations, P parameters, r rank.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from nntk_dist.philox import Stream, normal


def low_rank_normals(
    seed: int,
    stream: Stream,
    groups: Int64[Tensor, " g"],
    shapes: Sequence[tuple[int, ...]],
    rank: int,
    start: int,
    stop: int,
) -> Float64[Tensor, "g k"]:
    """Coordinates `start` to `stop` of the vectors that tensors of these shapes make; equal slices to rounding.

    Cost O(g·r·(stop − start)) for matrices that are not much longer than the slice.
    """
    parts = []
    offset = first = 0  # of the tensor's coordinates, of its normals
    for shape in shapes:
        size = math.prod(shape)
        low, high = max(start - offset, 0), min(stop - offset, size)
        matrix = len(shape) >= 2
        out, rest = (shape[0], size // max(1, shape[0])) if matrix else (size, 0)
        if low < high and not matrix:
            parts.append(normal(seed, stream, groups, first + low, first + high))
        elif low < high:
            above, below = low // rest, -(-high // rest)
            left = normal(seed, stream, groups, first + above * rank, first + below * rank).unflatten(1, (-1, rank))
            begin = first + out * rank
            right = normal(seed, stream, groups, begin, begin + rest * rank).unflatten(1, (-1, rank))
            rows = (left @ right.mT).div_(math.sqrt(rank)).flatten(1)
            parts.append(rows[:, low - above * rest : high - above * rest])
        offset += size
        first += (out + rest) * rank if matrix else size
    return torch.cat(parts, dim=1) if parts else torch.empty(len(groups), 0, dtype=torch.float64, device=groups.device)


def low_rank_factors(
    seed: int, stream: Stream, groups: Int64[Tensor, " g"], shapes: Sequence[tuple[int, ...]], rank: int
) -> Iterator[tuple[Float64[Tensor, "g out r"], Float64[Tensor, "g rest r"] | None]]:
    """What the same vectors are made of, tensor by tensor: A/√r and B, or the normals of a vector as (g, size, 1)."""
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
