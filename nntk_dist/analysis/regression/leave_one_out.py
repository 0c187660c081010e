"""Leave-one-out errors without the inverse: a few examples exactly, drawn with probabilities that follow a guess.

Example i, left out, has the residual `S_i a_i`. Here `S_i = [(A⁻¹)_ii]⁻¹` is the Schur complement of `A = K + μI`:
the part of the example's own block that the other examples do not explain. For sampled examples `A⁻¹ e_i` is solved, so
the residual is exact up to the solves. Nine tenths of the probability p_i are in proportion to guessed squared
residuals, the rest is even. An example weighs `1/(N p_i)` in the mean square (Hansen & Hurwitz 1943). Draws are
stratified, which their standard error does not count. The coefficients a must be known first, so the sample takes
passes of its own. Guessing a from the preconditioner would save these and multiply the standard error by 3 to 7
(digits, 20 to 300 pivots).

The low-rank approximation `B ≤ K` gives `S_i ≥ L_i = [((B + μI)⁻¹)_ii]⁻¹`. The pivots of other examples leave the
variance u_i unexplained, so about `S_i ≤ L_i + u_i`. With all examples explaining, `S_i ≤ [((B + (μ + τ)I)⁻¹)_ii]⁻¹`, τ
the trace of `K − B`. S_i is guessed as the mean of L_i and the lesser upper bound H_i. The diagonal of `K − B` would be
a poor u_i: it is 0 for pivots, which explain themselves. Random probes of the whole diagonal (Bekas, Kokiopoulou & Saad
2007) fail too: at small ridges the entries off the diagonal are so large that diagonal entries are lost in them.

A sample that misses large squares has a small mean and a small spread, so the standard error is widened twice. The
factor `1 + ¾ |γ|/√s`, γ the sample's skewness, follows from Johnson's t at two standard errors (1978, Modified t tests
and confidence intervals for asymmetrical populations). What undrawn examples may hold is added in quadrature: a fifth
of what the upper bounds put on one draw, `Σ H_i² a_i²/(N s)`, but at most four times what the largest draw put there.
It matters if few pivots explain little. docs/concepts.md has the measured coverage.

Axes: N examples of d kernel rows, n = N·d, t target columns, s sampled examples.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from nntk_dist.analysis.regression.shifted_systems import ShiftedSolution
from nntk_dist.sampling.philox import uniform
from nntk_dist.sampling.streams import LEAVE_ONE_OUT_SAMPLE, Stream

_LEAST = 8
_EVENLY = 0.1  # of the probability: examples that the guess misses are drawn too, and no weight exceeds 10
_UNSEEN = 0.2  # of the upper bounds; with half as much, 15 % of the intervals missed with 40 pivots of 300
_OF_LARGEST = 4.0  # of the largest draw; with half as much, 8 % of the intervals missed in the same case


@dataclass(frozen=True)
class ExampleSample:
    """Sampled examples and what each counts for in a mean over all.

    Attributes:
        examples: their numbers in ascending order; some may appear several times.
        weights: `1/(N p_i)`; 1 if all examples are taken.
        is_whole: whether every example is taken once.
    """

    examples: Int[np.ndarray, " s"]
    weights: Float[np.ndarray, " s"]
    is_whole: bool


@dataclass(frozen=True)
class LeaveOneOutEstimate:
    """Leave-one-out residuals of all examples, and their mean square with its standard error.

    Attributes:
        residuals: exact up to the solves for sampled examples; for the others the guess, scaled to fit the sample.
        error: the mean square.
        stderr: its standard error; bounds of what was not drawn and of unfinished solves are added in quadrature.
    """

    residuals: Float[np.ndarray, "N d t"]
    error: float
    stderr: float


def num_sampled_examples(num_examples: int, count: int) -> int:
    """Return how many examples are sampled if `count` are requested: at least eight, at most all."""
    return min(num_examples, max(_LEAST, count))


def sampled_examples(guessed: Float[np.ndarray, "N d t"], count: int, seed: int) -> ExampleSample:
    """Draw `num_sampled_examples` examples, some perhaps twice, or take all; the draw depends on guesses and seed only.

    Args:
        guessed: guessed leave-one-out residuals.
        count: how many are requested.
        seed: of the draw.
    """
    num_examples = len(guessed)
    size = num_sampled_examples(num_examples, count)
    if size == num_examples:
        return ExampleSample(np.arange(size), np.ones(size), True)
    squares = np.square(guessed).sum(axis=(1, 2))
    even, led = np.full(num_examples, _EVENLY / num_examples), (1.0 - _EVENLY) * _normalised(squares)
    points = uniform(seed, Stream.SAMPLE, torch.tensor([LEAVE_ONE_OUT_SAMPLE]), size)[0].numpy()
    strata = (np.arange(size) + points) / size
    places = np.searchsorted(np.cumsum(np.concatenate([even, led])), strata).clip(max=2 * num_examples - 1)
    chosen, chances = np.sort(places % num_examples), even + led
    return ExampleSample(chosen, 1.0 / (num_examples * chances[chosen]), False)


def unit_vectors(num_rows: int, sampled: Int[np.ndarray, " s"], size: int) -> Float[np.ndarray, "n s_d"]:
    """Return `e_i` for every kernel row of the sampled examples."""
    rows = (sampled[:, None] * size + np.arange(size)).reshape(-1)
    units = np.zeros((num_rows, len(rows)))
    units[rows, np.arange(len(rows))] = 1.0
    return units


def estimate_leave_one_out(
    guessed: Float[np.ndarray, "N d t"],
    most: Float[np.ndarray, "N d t"],
    targets: ShiftedSolution,
    units: ShiftedSolution,
    sample: ExampleSample,
    ridge: float,
) -> LeaveOneOutEstimate:
    """Estimate the leave-one-out residuals of all examples and their mean square.

    The solves are not exact. Let r be the residual of the targets and r_i that of a unit vector, x_i its solution. The
    coefficient is corrected to `a_i + x_iᵀ r`, which leaves at most `‖r_i‖ ‖r‖ / μ`, and `(A⁻¹)_ii` errs by at most
    `‖r_i‖² / μ`.

    Args:
        guessed: guessed leave-one-out residuals, scaled to fit the sample for the other examples.
        most: the same from upper bounds of S_i.
        targets: the coefficients a.
        units: `A⁻¹ e_i` for the sampled examples.
        sample: the examples.
        ridge: μ.
    """
    num_examples, size, num_right = guessed.shape
    count = len(sample.examples)
    columns = units.x.reshape(num_examples, size, count, size)
    diagonal = columns[sample.examples, :, np.arange(count)]
    complements = np.linalg.inv(0.5 * (diagonal + diagonal.transpose(0, 2, 1)))
    corrected = targets.x.reshape(guessed.shape)[sample.examples]
    corrected = corrected + (units.x.T @ targets.missed).reshape(count, size, num_right)
    exact = complements @ corrected
    squares = np.square(exact).mean(axis=(1, 2))
    unsolved = np.linalg.norm(np.linalg.norm(units.missed, axis=0).reshape(count, size), axis=1)
    lengths = np.linalg.norm(complements, ord=2, axis=(1, 2))
    missed = np.linalg.norm(targets.missed) / np.sqrt(size * num_right)
    off = np.sqrt(squares) * unsolved**2 * lengths / ridge + lengths * unsolved * missed / ridge
    from_solves = float((sample.weights * (2.0 * np.sqrt(squares) * off + np.square(off))).mean())
    weighed = sample.weights * squares
    possible = min(_UNSEEN * float(np.square(most).mean()), _OF_LARGEST * float(weighed.max()))
    unseen = 0.0 if sample.is_whole else possible / count
    from_sample = 0.0 if sample.is_whole else _standard_error(weighed)
    own = guessed[sample.examples]
    fitted = float((sample.weights * (own * own).sum(axis=(1, 2))).sum())
    scale = float((sample.weights * (own * exact).sum(axis=(1, 2))).sum()) / fitted if fitted > 0 else 0.0
    residuals = scale * guessed
    residuals[sample.examples] = exact
    return LeaveOneOutEstimate(
        residuals, float(weighed.mean()), float(np.linalg.norm([from_sample, unseen, from_solves]))
    )


def _standard_error(values: Float[np.ndarray, " s"]) -> float:
    """Standard error of the mean, widened for skewness."""
    deviations = values - values.mean()
    count, variance = len(values), float(values.var(ddof=1))
    if variance == 0.0:
        return 0.0
    skewness = count**2 / ((count - 1) * (count - 2)) * float((deviations**3).mean()) / variance**1.5
    return float(np.sqrt(variance / count)) * (1.0 + 0.75 * abs(skewness) / float(np.sqrt(count)))


def _normalised(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Values over their sum; equal ones if all are 0."""
    total = float(values.sum())
    return values / total if total > 0 else np.full(len(values), 1.0 / len(values))
