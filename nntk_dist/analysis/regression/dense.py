"""Kernel ridge regression on a kernel that fits in memory: every ridge and exact leave-one-out from one decomposition.

Everything is float64. A kernel is never repaired: one that is indefinite or singular beyond its ridge is refused,
because clipping or pseudo-inverting it gives plausible numbers that mean nothing.

Axes: n train examples, m test examples, T target columns, C outputs, L ridges. A kernel of form `full` has n·C rows
with index `i·C + c`; every other kernel has n rows, shared by all T columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import scipy.linalg
from jaxtyping import Float

from nntk_dist.analysis.checks import check_finite_entries, check_symmetric
from nntk_dist.analysis.kernel_forms import KernelForms, Needs
from nntk_dist.analysis.regression.ridge_problem import (
    RidgeProblem,
    RidgeRegression,
    absolute_ridges,
    check_mean_diagonal,
    check_rows,
    matrix_like,
    select_ridge,
    target_matrix,
)
from nntk_dist.analysis.regression.rounding import LeftOutSample, examples_for_rounding, rounding_errors, unit_rounding
from nntk_dist.analysis.solvers import Cost, RegressionSize
from nntk_dist.analysis.spectra.dense import DENSE_COPIES, EIGH_OPERATIONS
from nntk_dist.analysis.streamed_kernel import StreamedKernel, StreamedRectangle
from nntk_dist.errors import ArgumentError

_ROWS_AT_ONCE = 1024
_FACTOR_COPIES = DENSE_COPIES - 1  # columns for each row: factor and kernel take no more memory than the decomposition


@dataclass(frozen=True)
class DenseRidge:
    """Decompose the whole kernel in memory and fit every ridge from the decomposition; see `fit_ridge_path`.

    If a factor W of at most 3n columns is stored, the kernel is computed from it again, in float64. Otherwise the
    stored entries are used, and `RidgeRow.rounding_error` says what their rounding does to predictions.

    Equivalent to scikit-learn's `KernelRidge(kernel="precomputed", alpha=μ)` at each ridge.
    Cost: one dense `eigh` (about 9n³ operations, four n × n float64 arrays), then n²·T for each ridge.
    """

    needs: ClassVar[Needs] = Needs.TILES

    def cost(self, size: RegressionSize) -> Cost:
        """Estimate what a solve takes."""
        rows = size.kernel.num_rows
        return Cost(
            DENSE_COPIES * 8 * rows**2, EIGH_OPERATIONS * float(rows) ** 3, float(size.kernel.entry_bytes * rows**2)
        )

    def solve(
        self,
        train: KernelForms[StreamedKernel],
        test: KernelForms[StreamedRectangle],
        problem: RidgeProblem,
        ridges: Sequence[float],
        *,
        seed: int = 0,
    ) -> RidgeRegression:
        """Fit every ridge, select one by leave-one-out error, and predict the test examples.

        Raises:
            ArgumentError: the kernels do not fit the targets, or `fit_ridge_path` refuses the kernel or a ridge.
            DataError: an entry is not finite.
        """
        kernel, test_kernel = _matrices(train, test)
        path = fit_ridge_path(kernel, problem.targets, ridges, offset=problem.offset)
        all_scores = [path.predict(test_kernel, index, problem.test_offset) for index in range(len(path.ridges))]
        if all_scores[0].shape != problem.test_targets.shape:
            raise ArgumentError(
                f"test_targets have shape {problem.test_targets.shape} (examples, columns); the test kernel and the "
                f"train targets call for {all_scores[0].shape}"
            )
        return problem.results(
            path.ridges,
            path.absolute_ridges,
            path.residuals,
            path.loo_residuals,
            all_scores,
            rounding_errors=path.rounding_errors,
        )


def _matrices(
    train: KernelForms[StreamedKernel], test: KernelForms[StreamedRectangle]
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "m n"]]:
    """The kernels as stored, or products of their factor in float64: stored entries may be rounded to float32."""
    if train.factor is None or test.factor is None:
        return train.read_matrix(), test.read_matrix()
    rows, test_rows = train.read_factor(), test.read_factor()
    if rows.num_columns > _FACTOR_COPIES * rows.num_rows:
        return train.read_matrix(), test.read_matrix()
    factor, start = np.empty((rows.num_rows, rows.num_columns)), 0
    for block in rows.blocks():
        factor[start : start + len(block)] = block
        start += len(block)
    return factor @ factor.T, np.concatenate([block @ factor.T for block in test_rows.blocks()])


@dataclass(frozen=True)
class RidgePath:
    """Kernel ridge regression fitted at every ridge: `f_l(x) = k(x, X) a_l + offset(x)`.

    Attributes:
        ridges: relative to the kernel's mean diagonal.
        absolute_ridges: the same in the kernel's unit.
        coefficients: a, for each ridge.
        residuals: `y − f_l` on the train examples.
        loo_residuals: the same with the example itself left out.
        rounding_errors: what rounding of the kernel's entries does to predictions (`rounding`), in the targets' unit.
    """

    ridges: tuple[float, ...]
    absolute_ridges: tuple[float, ...]
    coefficients: Float[np.ndarray, "L rows columns"]
    residuals: Float[np.ndarray, "L n T"]
    loo_residuals: Float[np.ndarray, "L n T"]
    rounding_errors: tuple[float, ...]

    @property
    def selected(self) -> int:
        """Return the index of the ridge with the least leave-one-out error; of equal errors, the largest ridge."""
        return select_ridge(self.ridges, np.square(self.loo_residuals).mean(axis=(1, 2)).tolist())

    def predict(
        self,
        test_kernel: Float[np.ndarray, "test_rows rows"],
        index: int,
        offset: Float[np.ndarray, "m T"] | None = None,
    ) -> Float[np.ndarray, "m T"]:
        """Predict the examples of a test kernel.

        Args:
            test_kernel: m rows, or m·C for a `full` kernel.
            index: number of the ridge.
            offset: added to the predictions.

        Raises:
            ArgumentError: the test kernel or the offset does not fit the fitted kernel.
            DataError: one of them is not finite.
        """
        rows, columns = self.coefficients.shape[1:]
        num_targets = self.residuals.shape[2]
        rows_per_example = num_targets // columns
        test_kernel = np.asarray(test_kernel, dtype=np.float64)
        if test_kernel.ndim != 2 or test_kernel.shape[1] != rows or len(test_kernel) % rows_per_example:
            raise ArgumentError(
                f"the test kernel has shape {test_kernel.shape}; it needs {rows} columns, one for each row of the "
                f"train kernel, and {rows_per_example} row(s) for each test example"
            )
        check_finite_entries(test_kernel, "the test kernel")
        scores = (test_kernel @ self.coefficients[index]).reshape(-1, num_targets)
        return scores if offset is None else scores + matrix_like(offset, scores, "test_offset")


def fit_ridge_path(
    kernel: Float[np.ndarray, "rows rows"],
    targets: Float[np.ndarray, "n T"],
    ridges: Sequence[float],
    *,
    offset: Float[np.ndarray, "n T"] | None = None,
) -> RidgePath:
    """Solve `(K + μ_l I) a_l = y − offset`, `μ_l = ridge_l · tr K / rows`, for all ridges from `K = Q Λ Qᵀ`.

    Leave-one-out is exact and leaves out a whole example: its residual is `[(A⁻¹)_ii]⁻¹ a_i`, `A = K + μI`. Here
    `(A⁻¹)_ii` is a number, or for a full kernel the T×T block of the example (leaving out one output alone would let
    the example's other outputs predict it). The absolute ridge μ stays fixed while the example is out.

    Args:
        kernel: n rows, shared by all T columns, or n·T rows (form `full`: targets are flattened to match `i·T + c`).
        targets: y.
        ridges: relative to the mean diagonal.
        offset: subtracted from the targets.

    Raises:
        ArgumentError: the kernel is not square and symmetric; the targets do not fit; a ridge is not positive; or
            `K + μI` is not safely positive definite: its least eigenvalue must be at least μ/2 (a positive semidefinite
            kernel has μ; noise of the unbiased statistic makes it smaller) and above rounding.
        DataError: an entry is not finite, or the trace is not positive.
    """
    matrix = check_symmetric(kernel)
    targets = target_matrix(np.asarray(targets, dtype=np.float64), None, "targets")
    num_rows, (num_examples, num_targets) = len(matrix), targets.shape
    check_rows(num_rows, num_examples, num_targets)
    mean_diagonal = float(np.trace(matrix)) / num_rows
    check_mean_diagonal(mean_diagonal)
    ridges = tuple(float(ridge) for ridge in ridges)
    eigenvalues, basis = scipy.linalg.eigh(matrix)
    unit = unit_rounding(np.asarray(kernel).dtype)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    absolute = absolute_ridges(ridges, mean_diagonal, smallest=smallest, largest=largest, num_rows=num_rows, unit=unit)
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
    roundings = _rounding_errors(matrix, unit, eigenvalues, basis, absolute, solved, size)
    return RidgePath(ridges, absolute, solved, residuals, np.stack(loo_residuals).reshape(shape), roundings)


def _rounding_errors(
    matrix: Float[np.ndarray, "n n"],
    unit: float,
    eigenvalues: Float[np.ndarray, " n"],
    basis: Float[np.ndarray, "n n"],
    absolute: Sequence[float],
    solved: Float[np.ndarray, "L n t"],
    size: int,
) -> tuple[float, ...]:
    """What rounding does to predictions, at each ridge; see `rounding`."""
    examples = examples_for_rounding(len(matrix) // size, size)
    own = basis.reshape(-1, size, len(matrix))[examples].reshape(-1, len(matrix)).T
    samples = [
        LeftOutSample(basis @ (own / (eigenvalues + ridge)[:, None]), coefficients, examples, np.ones(len(examples)))
        for ridge, coefficients in zip(absolute, solved, strict=True)
    ]
    decomposition = np.finfo(np.float64).eps * float(eigenvalues[-1])
    multiply_squares = partial(_multiply_squares, matrix)
    return tuple(rounding_errors(multiply_squares, samples, unit=unit, decomposition=decomposition))


def _multiply_squares(matrix: Float[np.ndarray, "n n"], vectors: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n v"]:
    """The squares of a matrix's entries times vectors, some rows at a time."""
    starts = range(0, len(matrix), _ROWS_AT_ONCE)
    return np.concatenate([np.square(matrix[start : start + _ROWS_AT_ONCE]) @ vectors for start in starts])
