"""Solve `(K + μ_j I) x_j = b_j` for many right-hand sides, each with its own ridge, in common passes over K.

Preconditioned conjugate gradients, column by column, with one product of K with all open columns in each step; a
low-rank approximation of K preconditions (`pivoted_cholesky`). The recurrence is checked: at its end the residuals are
computed again, in float64, and columns that are not within their tolerance continue from there. K is only used through
products.

Axes: n kernel rows, j right-hand sides.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from nntk_dist.analysis.checks import check_finite_entries
from nntk_dist.analysis.regression.pivoted_cholesky import LowRankApproximation
from nntk_dist.errors import ArgumentError

Product = Callable[[Float[np.ndarray, "n j"]], Float[np.ndarray, "n j"]]

_PROGRESS = 0.5  # a restart must halve some residual; otherwise only rounding is left


@dataclass(frozen=True)
class ShiftedSolution:
    """The solution of the systems.

    Attributes:
        x: one column for each right-hand side.
        residuals: true relative residuals `‖b − (K + μI) x‖ / ‖b‖`, in float64.
        passes: passes over K.
        missed: `b − (K + μI) x`.
    """

    x: Float[np.ndarray, "n j"]
    residuals: Float[np.ndarray, " j"]
    passes: int
    missed: Float[np.ndarray, "n j"]

    def part(self, columns: slice) -> "ShiftedSolution":
        """Return the solution of some of the systems."""
        return ShiftedSolution(self.x[:, columns], self.residuals[columns], self.passes, self.missed[:, columns])


def solve_shifted_systems(
    product: Product,
    right: Float[np.ndarray, "n j"],
    ridges: Float[np.ndarray, " j"],
    preconditioner: LowRankApproximation,
    *,
    tolerances: Float[np.ndarray, " j"],
    max_passes: int,
) -> ShiftedSolution:
    """Solve until every true relative residual is within its tolerance, or until `max_passes`.

    The caller decides what to do with residuals above their tolerance. The iteration starts from `x = 0`: only then is
    the solution orthogonal to its error, so that the energy `b_jᵀ x_j` errs by the square of the residual.
    Memory: 9·n·j float64 values, including the values of a pass.

    Args:
        product: multiplies vectors by K.
        right: b.
        ridges: μ.
        preconditioner: an approximation of K.
        tolerances: of the relative residuals.
        max_passes: the most products.

    Raises:
        ArgumentError: `K + μI` turns out not to be positive definite.
        DataError: a product is not finite.
    """
    lengths = np.linalg.norm(right, axis=0)
    allowed = tolerances * lengths
    x, missed = np.zeros_like(right), right
    passes, before = 0, np.full(len(ridges), np.inf)
    while True:
        found = np.linalg.norm(missed, axis=0)
        open_columns = found > allowed
        gained = (found <= _PROGRESS * before)[open_columns].any()
        if not open_columns.any() or passes >= max_passes or not gained:
            safe = np.where(lengths > 0, lengths, 1.0)
            return ShiftedSolution(x, found / safe, passes, missed)
        before = found
        passes += _descend(
            product, x, missed, ridges, preconditioner, allowed, open_columns, max_passes=max_passes - passes - 1
        )
        missed = right - _regularised(product, x, ridges)
        passes += 1


def _descend(
    product: Product,
    x: Float[np.ndarray, "n j"],
    missed: Float[np.ndarray, "n j"],
    ridges: Float[np.ndarray, " j"],
    preconditioner: LowRankApproximation,
    allowed: Float[np.ndarray, " j"],
    open_columns: Bool[np.ndarray, " j"],
    *,
    max_passes: int,
) -> int:
    """Improve the open columns of x in place until the recurrence's residuals are small; return the passes."""
    own = np.flatnonzero(open_columns)
    residual, mu = missed[:, own], ridges[own]
    turned = preconditioner.solve(residual, mu)
    direction = turned.copy()
    energy = np.einsum("nj,nj->j", residual, turned)
    passes = 0
    while len(own) and passes < max_passes:
        image = _regularised(product, direction, mu)
        passes += 1
        curvature = np.einsum("nj,nj->j", direction, image)
        _check_definite(curvature, mu)
        step = energy / curvature
        x[:, own] += step * direction
        residual -= step * image
        still = np.linalg.norm(residual, axis=0) > allowed[own]
        own, mu, residual, direction, energy = (
            own[still],
            mu[still],
            residual[:, still],
            direction[:, still],
            energy[still],
        )
        turned = preconditioner.solve(residual, mu)
        after = np.einsum("nj,nj->j", residual, turned)
        direction = turned + (after / energy) * direction
        energy = after
    return passes


def _regularised(
    product: Product, vectors: Float[np.ndarray, "n j"], ridges: Float[np.ndarray, " j"]
) -> Float[np.ndarray, "n j"]:
    result = product(vectors)
    check_finite_entries(result, "a product with the kernel")
    result += ridges * vectors
    return result


def _check_definite(curvature: Float[np.ndarray, " j"], ridges: Float[np.ndarray, " j"]) -> None:
    if (curvature > 0).all():
        return
    worst = float(ridges[curvature <= 0].max())
    raise ArgumentError(
        f"K + μI is indefinite at the absolute ridge μ = {worst:.3g}: a vector with negative energy was met; use "
        "'statistic: plugin' (positive semidefinite) or larger ridges"
    )
