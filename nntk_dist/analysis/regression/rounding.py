"""Rounding errors of predictions: what the stored precision of a kernel's entries does to a solve.

Let E be the roundings of K, independent and of relative size u: half the spacing of the stored type at 1. The
prediction of an example that is left out is `Σ_j K_ij b_j`, b the coefficients of the others. To first order E moves it
by `wᵀ E b`, with w the column i of `A⁻¹` over its own entry, `A = K + μI`. Since E is symmetric, the variance is at
most `2 u² Σ_jk w_j² K_jk² b_k²`. Actual roundings are about 0.4 u, so the stated error is some three times the actual
one. It stands for predictions of all unseen examples. Decompositions in float64 err on their own, by at most about
`ε λ_max |w| |b|`, ε the precision of float64.

Axes: n kernel rows, s examples of d rows each, t target columns, v vectors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_SAMPLED_ROWS = 64


def unit_rounding(dtype: np.dtype) -> float:
    """Return the largest relative rounding of a stored value; 0 for integers."""
    return float(np.finfo(dtype).eps) / 2 if np.issubdtype(dtype, np.floating) else 0.0


def examples_for_rounding(num_examples: int, size: int) -> Int[np.ndarray, " s"]:
    """Return examples, evenly spread, that stand for all: about 64 kernel rows, and eight examples or more."""
    count = min(num_examples, max(8, _SAMPLED_ROWS // size))
    return np.linspace(0, num_examples - 1, count).astype(np.int64)


@dataclass(frozen=True)
class LeftOutSample:
    """Solutions that tell how examples are predicted from the others, at one ridge.

    Attributes:
        columns: `A⁻¹ e_i` for the kernel rows of the examples.
        coefficients: a.
        examples: their numbers.
        weights: what each counts for in a mean over all examples.
    """

    columns: Float[np.ndarray, "n s_d"]
    coefficients: Float[np.ndarray, "n t"]
    examples: Int[np.ndarray, " s"]
    weights: Float[np.ndarray, " s"]

    @property
    def size(self) -> int:
        """Return d."""
        return self.columns.shape[1] // len(self.examples)

    @property
    def rows(self) -> Int[np.ndarray, "s d"]:
        """Return the kernel rows of the examples."""
        return self.examples[:, None] * self.size + np.arange(self.size)

    @property
    def complements(self) -> Float[np.ndarray, "s d d"]:
        """Return `[(A⁻¹)_ii]⁻¹`."""
        grouped = self.columns[self.rows].reshape(len(self.rows), self.size, len(self.rows), self.size)
        return np.linalg.inv(grouped[np.arange(len(self.rows)), :, np.arange(len(self.rows))])

    @property
    def adjoint(self) -> Float[np.ndarray, "n s_d"]:
        """Return w for every kernel row of the examples."""
        grouped = self.columns.reshape(len(self.columns), -1, self.size)
        return np.einsum("nsd,sde->nse", grouped, self.complements).reshape(self.columns.shape)


def rounding_errors(
    multiply_squares: Callable[[Float[np.ndarray, "n v"]], Float[np.ndarray, "n v"]],
    samples: Sequence[LeftOutSample],
    *,
    unit: float,
    decomposition: float = 0.0,
) -> list[float]:
    """Return the root mean square rounding error of leave-one-out predictions of each sample, in the targets' unit.

    Cost: one product with all columns.

    Args:
        multiply_squares: multiplies vectors by the squares of the kernel's entries.
        samples: one for each ridge.
        unit: u.
        decomposition: `ε λ_max`, if the kernel was decomposed.
    """
    squares = [np.square(sample.adjoint) for sample in samples]
    spreads = np.split(multiply_squares(np.concatenate(squares, axis=1)), len(samples), axis=1)
    errors = []
    for sample, square, spread in zip(samples, squares, spreads, strict=True):
        total = 0.0
        variances = 2 * unit**2 * spread + decomposition**2 * square.sum(axis=0)
        for index, (own, complement) in enumerate(zip(sample.rows, sample.complements, strict=True)):
            part = slice(index * sample.size, (index + 1) * sample.size)
            others = sample.coefficients - sample.columns[:, part] @ (complement @ sample.coefficients[own])
            total += sample.weights[index] * float((variances[:, part].T @ np.square(others)).mean())
        errors.append(float(np.sqrt(total / len(sample.examples))))
    return errors
