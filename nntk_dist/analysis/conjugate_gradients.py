"""Solves `(K + μ_j I) x_j = b_j` for many right-hand sides, each with a ridge of its own, in common passes over K.

Preconditioned conjugate gradients, column by column, with one product of K with all open columns a step; a low-rank
part of K preconditions (`nntk_dist.analysis.pivoted_cholesky`). What the recurrence believes is checked: at its end
residuals are made anew, in float64, and columns that fall short go on from there. It reads K by its products alone.

Axes: n kernel rows, j right-hand sides.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from nntk_dist.analysis.pivoted_cholesky import LowRankPart
from nntk_dist.analysis.spectrum import check_finite
from nntk_dist.errors import NNTKError

Product = Callable[[Float[np.ndarray, "n j"]], Float[np.ndarray, "n j"]]

_PROGRESS = 0.5  # a restart has to halve some residual, or rounding is all that is left of it


@dataclass(frozen=True)
class Solution:
    """`x`, the true relative residuals `‖b − (K + μI) x‖ / ‖b‖` in float64, and the passes over K that it took."""

    x: Float[np.ndarray, "n j"]
    residuals: Float[np.ndarray, " j"]
    passes: int


def solve(
    product: Product,
    right: Float[np.ndarray, "n j"],
    ridges: Float[np.ndarray, " j"],
    preconditioner: LowRankPart,
    *,
    tolerances: Float[np.ndarray, " j"],
    most_passes: int,
) -> Solution:
    """Solve until every true relative residual is within its tolerance, or after so many passes.

    Whether that was reached is for the caller to say: `residuals` are what they are. From `x = 0`: only so is what is
    found orthogonal to what is missed, and the energy `b_jᵀ x_j` off by the square of the residual alone.
    Memory: 9·n·j float64 values, those of a pass among them.

    Raises:
        NNTKError: a product is not finite, or `K + μI` is seen not to be positive definite.
    """
    lengths = np.linalg.norm(right, axis=0)
    allowed = tolerances * lengths
    x, missed = np.zeros_like(right), right
    passes, before = 0, np.full(len(ridges), np.inf)
    while True:
        found = np.linalg.norm(missed, axis=0)
        open_columns = found > allowed
        gained = (found <= _PROGRESS * before)[open_columns].any()
        if not open_columns.any() or passes >= most_passes or not gained:
            safe = np.where(lengths > 0, lengths, 1.0)
            return Solution(x, found / safe, passes)
        before = found
        passes += _descend(
            product, x, missed, ridges, preconditioner, allowed, open_columns, most_passes=most_passes - passes - 1
        )
        missed = right - _regularised(product, x, ridges)
        passes += 1


def _descend(
    product: Product,
    x: Float[np.ndarray, "n j"],
    missed: Float[np.ndarray, "n j"],
    ridges: Float[np.ndarray, " j"],
    preconditioner: LowRankPart,
    allowed: Float[np.ndarray, " j"],
    open_columns: Bool[np.ndarray, " j"],
    *,
    most_passes: int,
) -> int:
    """Improve the open columns of x in place until the recurrence is content with them; how many passes it took."""
    own = np.flatnonzero(open_columns)
    residual, mu = missed[:, own], ridges[own]
    turned = preconditioner.solve(residual, mu)
    direction = turned.copy()
    energy = np.einsum("nj,nj->j", residual, turned)
    passes = 0
    while len(own) and passes < most_passes:
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
    check_finite(result, "a product with the kernel")
    result += ridges * vectors
    return result


def _check_definite(curvature: Float[np.ndarray, " j"], ridges: Float[np.ndarray, " j"]) -> None:
    if (curvature > 0).all():
        return
    worst = float(ridges[curvature <= 0].max())
    raise NNTKError(
        f"K + μI is indefinite at the absolute ridge μ = {worst:.3g}: a vector with negative energy was met; use "
        "'statistic: plugin' (positive semidefinite) or larger ridges"
    )
