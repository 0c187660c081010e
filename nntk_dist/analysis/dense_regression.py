"""Kernel ridge regression on a kernel that fits in memory: every ridge, and exact leave-one-out, from one `eigh`.

Works on plain arrays in float64. It never repairs a kernel: one that is indefinite or singular beyond its ridge is
refused, because clipping or pseudo-inverting it gives numbers that look fine and mean nothing.

Axes: n train examples, m test examples, T target columns, C outputs, L ridges. A kernel of form `full` has n·C rows
with index `i·C + c`; every other kernel has n rows, shared by all T columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Float

from nntk_dist.analysis.ridge_problem import (
    RidgeRegression,
    RidgeRow,
    absolute_ridges,
    check_mean_diagonal,
    check_rows,
    matrix_like,
    ridge_problem,
    select_ridge,
    target_matrix,
)
from nntk_dist.analysis.spectrum import check_finite, check_symmetric
from nntk_dist.errors import NNTKError, check_choice

__all__ = ["RidgePath", "RidgeRegression", "RidgeRow", "fit_ridge_path", "ridge_regression"]


@dataclass(frozen=True)
class RidgePath:
    """Kernel ridge regression fitted at every ridge: `f_l(x) = k(x, X) a_l + offset(x)`.

    `residuals` are `y − f_l` on the train examples, `loo_residuals` the same with the example itself left out.
    """

    ridges: tuple[float, ...]
    absolute_ridges: tuple[float, ...]
    coefficients: Float[np.ndarray, "L rows columns"]
    residuals: Float[np.ndarray, "L n T"]
    loo_residuals: Float[np.ndarray, "L n T"]

    @property
    def selected(self) -> int:
        """Index of the ridge of least leave-one-out mean squared error; of equals the largest ridge."""
        return select_ridge(self.ridges, np.square(self.loo_residuals).mean(axis=(1, 2)).tolist())

    def predict(
        self,
        test_kernel: Float[np.ndarray, "test_rows rows"],
        index: int,
        offset: Float[np.ndarray, "m T"] | None = None,
    ) -> Float[np.ndarray, "m T"]:
        """Scores of ridge number `index` on the examples of `test_kernel` (m rows, or m·C for a `full` kernel).

        Raises:
            NNTKError: the test kernel or the offset does not fit the fitted kernel, or is not finite.
        """
        rows, columns = self.coefficients.shape[1:]
        num_targets = self.residuals.shape[2]
        rows_per_example = num_targets // columns
        test_kernel = np.asarray(test_kernel, dtype=np.float64)
        if test_kernel.ndim != 2 or test_kernel.shape[1] != rows or len(test_kernel) % rows_per_example:
            raise NNTKError(
                f"the test kernel has shape {test_kernel.shape}; it needs {rows} columns, one for each row of the "
                f"train kernel, and {rows_per_example} row(s) for each test example"
            )
        check_finite(test_kernel, "the test kernel")
        scores = (test_kernel @ self.coefficients[index]).reshape(-1, num_targets)
        return scores if offset is None else scores + matrix_like(offset, scores, "test_offset")


def ridge_regression(
    kernel: Float[np.ndarray, "rows rows"],
    targets: np.ndarray,
    test_kernel: Float[np.ndarray, "test_rows rows"],
    test_targets: np.ndarray,
    *,
    ridges: Sequence[float],
    select: str = "loo",
    num_classes: int | None = None,
    offset: Float[np.ndarray, "n T"] | None = None,
    test_offset: Float[np.ndarray, "m T"] | None = None,
) -> RidgeRegression:
    """Fit every ridge, select one by leave-one-out error, and evaluate all of them on the test examples.

    `targets` are integer labels (n,), made one-hot over `num_classes` (default: the largest label present, plus one),
    or floats (n, T) or (n,). With `offset` `f(X; θ)` the kernel fits `y − offset` and `test_offset` is added back.
    The selection never looks at the test examples. Cost and solution: see `fit_ridge_path`; the rest is m·rows·T·L.

    Raises:
        NNTKError: an argument does not fit the others or is not finite; or what `fit_ridge_path` refuses.
    """
    check_choice("select", select, ("loo",))
    problem = ridge_problem(targets, test_targets, num_classes=num_classes, offset=offset, test_offset=test_offset)
    path = fit_ridge_path(kernel, problem.targets, ridges, offset=problem.offset)
    all_scores = [path.predict(test_kernel, index, problem.test_offset) for index in range(len(path.ridges))]
    if all_scores[0].shape != problem.test_targets.shape:
        raise NNTKError(
            f"test_targets have shape {problem.test_targets.shape} (examples, columns); the test kernel and the train "
            f"targets call for {all_scores[0].shape}"
        )
    return problem.results(path.ridges, path.absolute_ridges, path.residuals, path.loo_residuals, all_scores)


def fit_ridge_path(
    kernel: Float[np.ndarray, "rows rows"],
    targets: Float[np.ndarray, "n T"],
    ridges: Sequence[float],
    *,
    offset: Float[np.ndarray, "n T"] | None = None,
) -> RidgePath:
    """Solve `(K + μ_l I) a_l = y − offset`, `μ_l = ridge_l · tr K / rows`, for all ridges from `K = Q Λ Qᵀ`.

    `K` has n rows (all T columns share it) or n·T rows (form `full`: targets are flattened to match `i·T + c`).
    Leave-one-out is exact and leaves out a whole *example*: its residual is `[(A⁻¹)_ii]⁻¹ a_i`, `A = K + μI`, where
    `(A⁻¹)_ii` is a number, or for a full kernel the T×T block of the example (leaving out one output alone would let
    the others of the same example tell it). The absolute ridge μ is held fixed while the example is out.
    Cost: one dense `eigh` (about 9·rows³ operations, three rows² float64 arrays), then rows²·T a ridge.

    Raises:
        NNTKError: the kernel is not finite, square and symmetric; its trace is not positive; the targets do not fit;
            a ridge is not positive; or `K + μI` is not safely positive definite: its least eigenvalue must be at least
            μ/2 (a positive semidefinite kernel has μ; noise of the unbiased statistic pushes it below) and above
            rounding.
    """
    matrix = check_symmetric(kernel)
    targets = target_matrix(np.asarray(targets, dtype=np.float64), None, "targets")
    num_rows, (num_examples, num_targets) = len(matrix), targets.shape
    check_rows(num_rows, num_examples, num_targets)
    mean_diagonal = float(np.trace(matrix)) / num_rows
    check_mean_diagonal(mean_diagonal)
    ridges = tuple(float(ridge) for ridge in ridges)
    eigenvalues, basis = scipy.linalg.eigh(matrix)
    absolute = absolute_ridges(
        ridges, mean_diagonal, smallest=float(eigenvalues[0]), largest=float(eigenvalues[-1]), num_rows=num_rows
    )
    wanted = targets if offset is None else targets - matrix_like(offset, targets, "offset")
    size = num_rows // num_examples  # kernel rows of one example
    projected = basis.T @ wanted.reshape(num_rows, -1)
    grouped = basis.reshape(num_examples, size, num_rows)
    coefficients, loo_residuals = [], []
    for ridge in absolute:
        inverse = 1 / (eigenvalues + ridge)
        solution = basis @ (inverse[:, None] * projected)
        own_blocks = (grouped * inverse) @ grouped.transpose(0, 2, 1)  # (A⁻¹)_ii, one size×size block per example
        loo_residuals.append(np.linalg.solve(own_blocks, solution.reshape(num_examples, size, -1)))
        coefficients.append(solution)
    shape = (len(absolute), num_examples, num_targets)
    solved = np.stack(coefficients)
    residuals = np.asarray(absolute)[:, None, None] * solved.reshape(shape)  # y − K a = μ a, without cancellation
    return RidgePath(ridges, absolute, solved, residuals, np.stack(loo_residuals).reshape(shape))
