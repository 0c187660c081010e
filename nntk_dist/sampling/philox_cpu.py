"""Philox4x32-10 on a CPU: the integers of `nntk_dist.sampling.philox`, bit for bit, in less than a third of the time.

One 64-bit number holds two 32-bit words. A round multiplies two words and applies exclusive ors to the product, so the
64-bit product is used directly: ten in-place operations a round, on arrays that stay in the L2 cache. This needs
unsigned 64-bit arithmetic, which NumPy has and PyTorch lacks.

Axes: g groups, p positions (counters).
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
# The bits of the float64 number 2^52; a word in their lower half makes it 2^52 + word.
_FLOAT_BITS, _FLOAT = np.uint64(0x4330000000000000), 2.0**52

Words = NDArray[np.uint64]


def philox_words(
    positions: tuple[int, int], draw: int | NDArray[np.int64], groups: NDArray[np.int64], stream: int, seed: int
) -> Words:
    """Return words 0 and 1, and words 2 and 3, each pair as one number with the first word in its upper half.

    The counter at position p is: lower half of p; upper half of p, with the draw from bit 16 on; group; stream.

    Args:
        positions: the first position and the end.
        draw: a number below 2^16, one for all groups or one for each.
        groups: the groups.
        stream: the stream of random numbers.
        seed: the seed.

    Returns:
        An array of shape (2, g, p).
    """
    keys = _keys(seed)
    position = np.arange(*positions, dtype=np.uint64)
    upper = position >> _HALF
    if len(upper) and upper[0] == upper[-1]:
        upper = upper[:1]
    word1 = upper | (np.asarray(draw, dtype=np.uint64) << np.uint64(16)).reshape(-1, 1)
    # The second round is the first to combine positions and groups. Before it, one number per position and one per
    # group are enough, unless the upper half of the positions changes.
    first = (groups.astype(np.uint64)[:, None] * _MULTIPLIERS[1]) ^ (word1 << _HALF) ^ keys[0, 0]
    second = ((position & _MASK) * _MULTIPLIERS[0]) ^ (np.uint64(stream) << _HALF) ^ keys[0, 1]
    state = np.empty((2, len(groups), len(position)), dtype=np.uint64)
    np.bitwise_xor((second >> _HALF) * _MULTIPLIERS[1], (first << _HALF) ^ keys[1, 0], out=state[0])
    np.bitwise_xor((first >> _HALF) * _MULTIPLIERS[0], (second << _HALF) ^ keys[1, 1], out=state[1])
    products = np.empty_like(state)
    for key in keys[2:]:
        np.right_shift(state, _HALF, out=products)
        np.multiply(products, _MULTIPLIERS[:, None, None], out=products)
        np.left_shift(state, _HALF, out=state)
        np.bitwise_xor(state, products[::-1], out=state)
        np.bitwise_xor(state, key[:, None, None], out=state)
    return state


def _keys(seed: int) -> Words:
    """The two words of the key of every round, each in the upper half of a number: (rounds, 2)."""
    words = np.array([seed & int(_MASK), (seed >> 32) & int(_MASK)], dtype=np.uint64)
    return ((words + np.arange(_ROUNDS, dtype=np.uint64)[:, None] * _WEYL) & _MASK) << _HALF


def split_words(pairs: Words) -> tuple[Words, Words]:
    """Return the two words of every number, the upper word first."""
    return pairs >> _HALF, pairs & _MASK


def centred_words(pairs: Words) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the two words of every number plus a half, exactly, in float64; faster than a conversion."""
    first, second = (np.bitwise_or(word, _FLOAT_BITS, out=word).view(np.float64) for word in split_words(pairs))
    first -= _FLOAT - 0.5
    second -= _FLOAT - 0.5
    return first, second
