"""Random numbers as a pure function of (seed, stream, group, draw, index).

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): it has no state
and gives the same integers in any order and on every device. Normals are computed from them in float64, so that
devices agree up to the rounding of `log` and `cos`. Models and perturbations do not belong here.

Axes: g groups (requested counters), i index within the vector of a group, p positions (counters of four numbers).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.func import debug_unwrap
from torch.nn import functional

from nntk_dist.sampling.philox_cpu import centred_words, philox_words, split_words
from nntk_dist.sampling.streams import Stream

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
# Counters per chunk: 256 KiB for each of the four words. Few enough for the L2 or L3 cache, enough to amortise the
# overhead of a call (with an eighth of them, a number takes about twice as long).
_COUNTERS_PER_CHUNK = 1 << 15
_GPU_COUNTERS_PER_CHUNK = 1 << 21  # enough to make the overhead of a call negligible on a GPU
_INDEX_LIMIT = 1 << 50
_UNIT = 2.0**-32  # from a word to the unit interval


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x32-10 of counters of four 32-bit words, in int64 tensors that broadcast together.

    A product of two 32-bit words overflows int64 and wraps modulo 2^64; both halves still have the right bits.
    """
    word0, word1, word2, word3 = torch.broadcast_tensors(*counter)
    key0, key1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(_ROUNDS):
        product0 = word0 * _MULTIPLIERS[0]
        product1 = word2 * _MULTIPLIERS[1]
        high0 = (product0 >> 32).bitwise_and_(_MASK)
        high1 = (product1 >> 32).bitwise_and_(_MASK)
        word0, word1 = high1.bitwise_xor_(word1).bitwise_xor_(key0), product1.bitwise_and_(_MASK)
        word2, word3 = high0.bitwise_xor_(word3).bitwise_xor_(key1), product0.bitwise_and_(_MASK)
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return word0, word1, word2, word3


def _words(
    seed: int, stream: Stream, groups: Int64[Tensor, " g"], draw: int | Int64[Tensor, " g"], first: int, last: int
) -> list[Int64[Tensor, "g p"]]:
    """The four words of the counters `first` to `last` of every group."""
    if _is_plain(groups):
        pairs = _pairs_of_words(seed, stream, groups, draw, first, last)
        return [torch.from_numpy(word.view(np.int64)) for pair in pairs for word in split_words(pair)]
    position = torch.arange(first, last, dtype=torch.int64, device=groups.device)
    high = draw << 16
    counter = (
        (position & _MASK)[None, :],
        (position >> 32)[None, :] | (high[:, None] if isinstance(high, Tensor) else high),
        groups[:, None],
        torch.full((1, 1), int(stream), dtype=torch.int64, device=groups.device),
    )
    return list(philox(counter, (seed & _MASK, (seed >> 32) & _MASK)))


def _centred_words(
    seed: int, stream: Stream, groups: Int64[Tensor, " g"], draw: int | Int64[Tensor, " g"], first: int, last: int
) -> list[Float64[Tensor, "g p"]]:
    """`_words` plus a half, from 0.5 to 2^32 − 0.5."""
    if _is_plain(groups):
        pairs = _pairs_of_words(seed, stream, groups, draw, first, last)
        return [torch.from_numpy(word) for pair in pairs for word in centred_words(pair)]
    return [_centred(word) for word in _words(seed, stream, groups, draw, first, last)]


def _is_plain(groups: Tensor) -> bool:
    """Whether NumPy can use the tensor: it is on the CPU, and not wrapped by vmap or grad."""
    return groups.device.type == "cpu" and debug_unwrap(groups) is groups


def _pairs_of_words(
    seed: int, stream: Stream, groups: Tensor, draw: int | Tensor, first: int, last: int
) -> NDArray[np.uint64]:
    draws = draw.numpy() if isinstance(draw, Tensor) else draw
    return philox_words((first, last), draws, groups.numpy(), int(stream), seed)


def _centred(word: Int64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    return word.to(torch.float64).add_(0.5)


def uniform(
    seed: int, stream: Stream, groups: Int64[Tensor, " g"], count: int, *, draw: int = 0, start: int = 0
) -> Float64[Tensor, "g {count}"]:
    """Return Uniform(0, 1) numbers, `count` for each group from index `start` on, each an odd multiple of 2^-33.

    `start` must be a multiple of four, because a counter gives four numbers.
    """
    if start % 4 or not 0 <= start <= start + count <= _INDEX_LIMIT:
        raise ValueError(f"index range {start}:{start + count} is outside 0:{_INDEX_LIMIT}, or begins within a counter")
    words = _centred_words(seed, stream, groups, draw, start // 4, -(-(start + count) // 4))
    return torch.stack(words, dim=-1).flatten(1)[:, :count] * _UNIT


def normal(
    seed: int,
    stream: Stream,
    groups: Int64[Tensor, " g"],
    start: int,
    stop: int,
    *,
    draw: int | Int64[Tensor, " g"] = 0,
    dtype: torch.dtype = torch.float64,
    times: Float[Tensor, " g"] | None = None,
) -> Float[Tensor, "g i"]:
    """Return the standard normals with index `start` to `stop` of every group, by the Box–Muller transform.

    Calls with overlapping ranges agree on the overlap. The largest magnitude is 6.8; 1 in 10^11 would exceed it.
    Cost: about 100 elementwise operations for four numbers.

    Args:
        seed: the seed.
        stream: the stream of random numbers.
        groups: the groups.
        start: the first index.
        stop: the end of the indices.
        draw: a number below 2^16, one for all groups or one for each.
        dtype: the dtype of the result; the normals are computed in float64.
        times: one factor for each group, applied after rounding to `dtype` and while the numbers are in the cache.
    """
    if not 0 <= start <= stop <= _INDEX_LIMIT:
        raise ValueError(f"index range {start}:{stop} is outside 0:{_INDEX_LIMIT}")
    result = torch.empty(len(groups), stop - start, dtype=dtype, device=groups.device)
    first, last = start // 4, -(-stop // 4)
    most = _GPU_COUNTERS_PER_CHUNK if groups.is_cuda else _COUNTERS_PER_CHUNK
    step = max(1, most // max(1, len(groups)))
    for begin in range(first, last, step):
        end = min(begin + step, last)
        low, high = max(start, 4 * begin), min(stop, 4 * end)
        own = result[:, low - start : high - start]
        whole = own if own.shape[1] == 4 * (end - begin) else result.new_empty(len(groups), 4 * (end - begin))
        by_lane = whole.unflatten(1, (-1, 4))
        for lane, values in enumerate(_box_muller(_centred_words(seed, stream, groups, draw, begin, end))):
            by_lane[..., lane] = values
        if whole is not own:  # the range begins or ends inside a counter
            own.copy_(whole[:, low - 4 * begin : high - 4 * begin])
        if times is not None:
            own.mul_(times.to(dtype)[:, None])
    return result


def _box_muller(words: Sequence[Float64[Tensor, "*shape"]]) -> list[Float64[Tensor, "*shape"]]:
    """Four standard normals from the four words of a counter, each plus a half; the words are overwritten."""
    lanes = []
    for radial, angular in (words[:2], words[2:]):
        radius = radial.mul_(_UNIT).log_().mul_(-2.0).sqrt_()
        angle = angular.mul_(2.0 * math.pi * _UNIT)
        lanes += [angle.cos().mul_(radius), angle.sin_().mul_(radius)]
    return lanes


def normals_at(
    seed: int, stream: Stream, group: int, counters: Int64[Tensor, "*shape"], *, draw: int = 0
) -> Float64[Tensor, "*shape 4"]:
    """Return the standard normals with index 4c to 4c + 3 of one group, for arbitrary counters c.

    These are the numbers of `normal`, bit for bit. Counters must be from 0 to 2^48 − 1; checking that would cost a pass
    over them. `torch.func.vmap` may batch the counters; arguments are not modified.
    """
    zero = torch.zeros_like(counters)  # philox works in place, so all four words must be batched like the counters
    counter = (counters & _MASK, (counters >> 32) | (draw << 16), zero + group, zero + int(stream))
    key = (seed & _MASK, (seed >> 32) & _MASK)
    return torch.stack(_box_muller([_centred(word) for word in philox(counter, key)]), dim=-1)


def signs(
    seed: int,
    stream: Stream,
    groups: Int64[Tensor, " g"],
    count: int,
    *,
    draw: int = 0,
    start: int = 0,
    dtype: torch.dtype,
) -> Float[Tensor, "g {count}"]:
    """Return random signs ±1, `count` for each group from index `start` on, one bit each.

    `start` must be a multiple of 128, because a counter gives 128 signs. A table maps each byte to eight signs: eight
    times as fast as shifting out single bits.
    """
    if start % 128:
        raise ValueError(f"index {start} lies within a counter")
    words = torch.stack(_words(seed, stream, groups, draw, start // 128, -(-(start + count) // 128)), dim=-1)
    octets = words.to(torch.int32).view(torch.uint8).flatten(1)  # the least significant first
    bits = (torch.arange(256, device=groups.device)[:, None] >> torch.arange(8, device=groups.device)).bitwise_and_(1)
    return functional.embedding(octets.int(), bits.to(dtype).mul_(-2.0).add_(1.0)).flatten(1)[:, :count]
