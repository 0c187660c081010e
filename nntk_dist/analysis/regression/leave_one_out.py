"""Leave-one-out residuals without the inverse: estimated from a low-rank approximation and a few exact columns.

Example i, left out, has the residual `S_i a_i`. Here `S_i = [(A⁻¹)_ii]⁻¹` is the Schur complement of `A = K + μI`: the
part of the example's own block that the other examples do not explain. The low-rank approximation `B ≤ K` gives
`S_i⁰ ≤ S_i` for all examples; for a few sampled ones `A⁻¹ e_i` is solved, so S_i is exact. For the others
`S_i⁰ + κ (K − B)_ii` is used. It would be exact with κ = 1 if B lacked only example i; κ is fitted on the sample. The
mean square over all examples is then corrected by the ratio of exact and estimated mean squares over the sample, a
ratio estimator (Cochran 1977, Sampling Techniques, §6): its bias falls like 1/s, however good B is. The standard error
is a jackknife over the sample, κ included. If the sample misses a few extreme examples, the standard error does too.
Random probes of the whole diagonal (Bekas, Kokiopoulou & Saad 2007) were tried and fail: at small ridges the entries
off the diagonal are so large that single diagonal entries are lost in them.

Axes: N examples of d kernel rows, n = N·d, t target columns, s sampled examples.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from nntk_dist.sampling.philox import uniform
from nntk_dist.sampling.streams import LEAVE_ONE_OUT_SAMPLE, Stream

_LEAST = 8


@dataclass(frozen=True)
class LeaveOneOutEstimate:
    """Leave-one-out residuals of all examples, and their mean square with its standard error.

    Attributes:
        residuals: exact for sampled examples.
        error: the mean square.
        stderr: its standard error; NaN if fewer than two examples are sampled.
    """

    residuals: Float[np.ndarray, "N d t"]
    error: float
    stderr: float


def num_sampled_examples(num_examples: int, count: int) -> int:
    """Return how many examples are sampled if `count` are requested: at least eight, at most all."""
    return min(num_examples, max(_LEAST, count))


def sampled_examples(num_examples: int, count: int, seed: int) -> Int[np.ndarray, " s"]:
    """Draw `num_sampled_examples` examples, in ascending order; the draw depends only on the seed."""
    keys = uniform(seed, Stream.SAMPLE, torch.tensor([LEAVE_ONE_OUT_SAMPLE]), num_examples)[0]
    return np.sort(keys.argsort()[: num_sampled_examples(num_examples, count)].numpy())


def unit_vectors(num_rows: int, sampled: Int[np.ndarray, " s"], size: int) -> Float[np.ndarray, "n s_d"]:
    """Return `e_i` for every kernel row of the sampled examples."""
    rows = (sampled[:, None] * size + np.arange(size)).reshape(-1)
    units = np.zeros((num_rows, len(rows)))
    units[rows, np.arange(len(rows))] = 1.0
    return units


def estimate_leave_one_out(
    solved: Float[np.ndarray, "N d t"],
    columns: Float[np.ndarray, "N d s d"],
    sampled: Int[np.ndarray, " s"],
    known: Float[np.ndarray, "N d d"],
    missing: Float[np.ndarray, "N d d"],
) -> LeaveOneOutEstimate:
    """Estimate the leave-one-out residuals of all examples and their mean square.

    Args:
        solved: the coefficients a.
        columns: `A⁻¹ e_i` for the sampled examples.
        sampled: their numbers.
        known: diagonal blocks of `(B + μI)⁻¹`.
        missing: diagonal blocks of `K − B`.
    """
    exact = columns[sampled, :, np.arange(len(sampled))]
    exact = 0.5 * (exact + exact.transpose(0, 2, 1))
    complements = np.linalg.inv(known)
    gained = _traces(np.linalg.inv(exact) - complements[sampled])
    left = _traces(missing[sampled])
    seen = np.square(np.linalg.solve(exact, solved[sampled])).mean(axis=(1, 2))
    base, added = complements @ solved, missing @ solved
    # The mean square of an example's residual is a polynomial in κ with these coefficients.
    squares = np.stack([(base * base), 2 * (base * added), (added * added)]).mean(axis=(2, 3))
    share, error = _estimates(
        gained.sum(), left.sum(), seen.sum(), squares[:, sampled].sum(axis=1), squares.mean(axis=1)
    )
    residuals = base + share * added
    residuals[sampled] = np.linalg.solve(exact, solved[sampled])
    count = len(sampled)
    if count < 2:
        return LeaveOneOutEstimate(residuals, float(error), float("nan"))
    _, others = _estimates(
        gained.sum() - gained,
        left.sum() - left,
        seen.sum() - seen,
        squares[:, sampled].sum(axis=1, keepdims=True) - squares[:, sampled],
        squares.mean(axis=1, keepdims=True),
    )
    variance = (1.0 - count / len(solved)) * (count - 1) * float(np.var(others))
    return LeaveOneOutEstimate(residuals, float(error), float(np.sqrt(variance)))


def _estimates(
    gained: np.ndarray, left: np.ndarray, seen: np.ndarray, sampled: np.ndarray, everywhere: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """κ and the mean square over all examples, from sums over one sample or over several samples together."""
    share = np.maximum(gained, 0.0) / np.where(left > 0, left, 1.0)
    powers = np.stack([np.ones_like(share), share, np.square(share)])
    guessed, mean = (sampled * powers).sum(axis=0), (everywhere * powers).sum(axis=0)
    return share, np.where(guessed > 0, seen / np.where(guessed > 0, guessed, 1.0), 1.0) * mean


def _traces(blocks: Float[np.ndarray, "s d d"]) -> Float[np.ndarray, " s"]:
    return np.trace(blocks, axis1=1, axis2=2)
