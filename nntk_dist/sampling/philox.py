"""Random numbers as a pure function of (seed, stream, group, draw, index).

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): no state, no
order, the same integers on every device. A normal is made from them in float64, so that devices agree to the rounding
of `log` and `cos`. This module knows nothing of models or perturbations, and keeps no generator object anywhere.

Axes: g groups (requested counters), i index within one group's vector.
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
# Counters handled at a time: 256 KiB for each word of theirs, few enough for the second or third cache, many enough to
# spread a call's overhead (with an eighth of them a number takes about twice as long).
_COUNTERS_PER_CHUNK = 1 << 15
_GPU_COUNTERS_PER_CHUNK = 1 << 21  # so many that a call's overhead is nothing there
_INDEX_LIMIT = 1 << 50
_UNIT = 2.0**-32  # from a word to the unit interval


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of a counter of four 32-bit words held in int64 tensors that broadcast together.

    A product of two 32-bit words overflows int64, which wraps modulo 2^64; its two halves are still the right bits.
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
    """Whether NumPy can have it: on the CPU, and no tensor of vmap or grad."""
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
    """Uniform(0, 1) numbers, `count` for each group from index `start` on, each an odd multiple of 2^-33.

    `start` is a multiple of four, the numbers of a counter.
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
    """Standard normals of index `start` to `stop` of every group's vector, by Box and Muller's transform.

    `draw` is below 2^16, one for all groups or one for each. `times`: what each group's numbers, once they are of
    `dtype`, are multiplied by, while they are in the cache. Any two calls agree on the indices that they share. Cost:
    about 100 elementwise operations for four numbers.
    Normals reach out to 6.8 standard deviations, beyond which 1 in 10^11 would lie.
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
        if whole is not own:  # begins or ends within a counter
            own.copy_(whole[:, low - 4 * begin : high - 4 * begin])
        if times is not None:
            own.mul_(times.to(dtype)[:, None])
    return result


def _box_muller(words: Sequence[Float64[Tensor, "*shape"]]) -> list[Float64[Tensor, "*shape"]]:
    """Four standard normals from the four words of a counter, each plus a half, which are used up."""
    lanes = []
    for radial, angular in (words[:2], words[2:]):
        radius = radial.mul_(_UNIT).log_().mul_(-2.0).sqrt_()
        angle = angular.mul_(2.0 * math.pi * _UNIT)
        lanes += [angle.cos().mul_(radius), angle.sin_().mul_(radius)]
    return lanes


def normals_at(
    seed: int, stream: Stream, group: int, counters: Int64[Tensor, "*shape"], *, draw: int = 0
) -> Float64[Tensor, "*shape 4"]:
    """The standard normals of index 4c to 4c + 3 of one group's vector, for counters c scattered anywhere.

    The numbers of `normal`, bit for bit. Counters are from 0 to 2^48 − 1, which is not checked: that would take a pass
    over them. They may be batched by `torch.func.vmap`; nothing is written into what comes in.
    """
    zero = torch.zeros_like(counters)  # all four words are batched where the counters are: philox works in place
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
    """Random signs ±1, `count` for each group from index `start` on: one bit each, 128 from a counter.

    `start` is a multiple of 128. Eight signs at a time are looked up by their byte: eightfold faster than shifting bits
    out one by one.
    """
    if start % 128:
        raise ValueError(f"index {start} lies within a counter")
    words = torch.stack(_words(seed, stream, groups, draw, start // 128, -(-(start + count) // 128)), dim=-1)
    octets = words.to(torch.int32).view(torch.uint8).flatten(1)  # the least significant first
    bits = (torch.arange(256, device=groups.device)[:, None] >> torch.arange(8, device=groups.device)).bitwise_and_(1)
    return functional.embedding(octets.int(), bits.to(dtype).mul_(-2.0).add_(1.0)).flatten(1)[:, :count]
