"""Kernel ridge regression on a kernel that stays in storage: all ridges and targets in the same passes over its tiles.

Differences from `DenseRidge`: solutions are as accurate as their stated residuals, and leave-one-out, which needs the
diagonal of an inverse, is an estimate with a standard error (`leave_one_out`).

Axes: n kernel rows, N train examples of d rows each, m test examples, T target columns, t right-hand sides of a ridge
(T, or 1 in form `full`), L ridges, s sampled examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from nntk_dist.analysis.checks import check_finite_entries
from nntk_dist.analysis.convergence import Convergence
from nntk_dist.analysis.kernel_forms import KernelForms, Needs
from nntk_dist.analysis.regression.leave_one_out import (
    LeaveOneOutEstimate,
    estimate_leave_one_out,
    num_sampled_examples,
    sampled_examples,
    unit_vectors,
)
from nntk_dist.analysis.regression.pivoted_cholesky import LowRankApproximation, low_rank_approximation
from nntk_dist.analysis.regression.ridge_problem import (
    RidgeProblem,
    RidgeRegression,
    check_mean_diagonal,
    check_positive,
)
from nntk_dist.analysis.regression.rounding import LeftOutSample, rounding_errors, unit_rounding
from nntk_dist.analysis.regression.shifted_systems import ShiftedSolution, solve_shifted_systems
from nntk_dist.analysis.solvers import Cost, RegressionSize
from nntk_dist.analysis.streamed_kernel import StreamedKernel, StreamedRectangle
from nntk_dist.errors import ArgumentError

_LEAST_RANK, _MOST_RANK = 1024, 4096  # the most takes n · 32 KiB
_UNIT_ACCURACY = 0.01  # of (A⁻¹)_ii, relative, for an example that the others hardly explain
_ENOUGH = 0.1  # of the least ridge: with this little trace left, the approximation is as good as the kernel
_TYPICAL_PASSES = 45  # if eigenvalues decay
_TILES_HELD = 6  # three that are read ahead, and their products


def default_rank(num_rows: int) -> int:
    """Return how many pivots the preconditioner has by default.

    They cost one pass and 6·n·r² operations. If eigenvalues decay like 1/k, each factor of four in the rank saves about
    half of the passes.
    """
    return min(num_rows, _MOST_RANK, max(_LEAST_RANK, num_rows // 16))


@dataclass(frozen=True)
class _LeftOut:
    """Leave-one-out estimates and rounding errors of each ridge, and the passes that the estimates took."""

    estimates: list[LeaveOneOutEstimate]
    rounding_errors: list[float]
    passes: int


@dataclass(frozen=True)
class ConjugateGradients:
    """Fit every ridge by preconditioned conjugate gradients, in float64.

    Solves `(K + μ_l I) a = y` until `‖y − (K + μI) a‖ ≤ tolerance·‖y‖` for every target column, and then, for
    leave-one-out, the columns `A⁻¹ e_i` of a few examples (`leave_one_out`). At 32 sampled examples the
    stated standard error is some 4 to 10 % of the leave-one-out error, and falls like `1/√num_sampled`.
    Cost: passes of n²/2 entries, 2n²·L·t operations each for targets and 2n²·L·s·d for leave-one-out, tens of passes
    of each kind if eigenvalues decay; 9·n·L·s·d and n·rank numbers of memory.
    Reference: Díaz et al. 2023, Robust, randomized preconditioning for kernel ridge regression.

    Args:
        tolerance: of the relative residual; the default is far below the error of a kernel estimated from draws.
        rank: pivots of the preconditioner; None for `default_rank`.
        num_sampled: kernel rows of examples that are solved exactly for leave-one-out (at least eight examples).
        max_passes: the most passes over the kernel.

    Example:
        >>> ConjugateGradients(tolerance=1e-6).needs
        <Needs.TILES: 'tiles'>
    """

    needs: ClassVar[Needs] = Needs.TILES

    tolerance: float = 1e-4
    rank: int | None = None
    num_sampled: int = 32
    max_passes: int = 200

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ArgumentError(f"tolerance is {self.tolerance}; allowed: a number above 0")
        for name, least in (("rank", 0), ("num_sampled", 1), ("max_passes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"{name} is {value}; allowed: {least} or more")

    def cost(self, size: RegressionSize) -> Cost:
        """Estimate what a solve takes, for a kernel whose eigenvalues decay."""
        kernel = size.kernel
        rows, rank = float(kernel.num_rows), self.rank_for(kernel.num_rows)
        width = size.num_ridges * (size.num_targets + self.num_unit_columns(kernel.num_rows, kernel.rows_per_example))
        return Cost(
            memory_bytes=8 * (kernel.num_rows * (9 * width + rank) + _TILES_HELD * kernel.tile_rows**2),
            operations=2.0 * rows**2 * _TYPICAL_PASSES / 2 * width + 6.0 * rows * rank**2,
            read_bytes=_TYPICAL_PASSES * kernel.entry_bytes * rows**2,  # targets, then unit vectors: n²/2 entries each
        )

    def rank_for(self, num_rows: int) -> int:
        """Return the pivots for a kernel of this size."""
        return default_rank(num_rows) if self.rank is None else self.rank

    def num_unit_columns(self, num_rows: int, rows_per_example: int) -> int:
        """Return how many columns of the inverse leave-one-out takes for one ridge."""
        num_examples = num_rows // rows_per_example
        return num_sampled_examples(num_examples, self.num_sampled // rows_per_example) * rows_per_example

    def solve(
        self,
        train: KernelForms[StreamedKernel],
        test: KernelForms[StreamedRectangle],
        problem: RidgeProblem,
        ridges: Sequence[float],
        *,
        seed: int = 0,
    ) -> RidgeRegression:
        """Fit every ridge, select one by estimated leave-one-out error, and predict the test examples.

        Raises:
            ArgumentError: kernel and targets do not fit; a ridge is not positive; or `K + μI` turns out to be
                indefinite.
            DataError: an entry is not finite, or the trace is not positive.
        """
        kernel = train.stream()
        ridges = tuple(float(ridge) for ridge in ridges)
        size = problem.rows_per_example(kernel.num_rows)
        check_positive(ridges)
        diagonal = kernel.diagonal_blocks().reshape(-1)
        check_finite_entries(diagonal, "the kernel's diagonal")
        mean_diagonal = float(diagonal.mean())
        check_mean_diagonal(mean_diagonal)
        absolute = np.array(ridges) * mean_diagonal
        rank, least = self.rank_for(kernel.num_rows), _ENOUGH * float(absolute.min())
        approximation = low_rank_approximation(kernel, diagonal, rank=rank, least=least, size=size, seed=seed)
        wanted = problem.fitted.reshape(kernel.num_rows, -1)
        num_right = wanted.shape[1]
        solution = self._solved(kernel, [wanted] * len(ridges), absolute, approximation, [self.tolerance] * len(ridges))
        targets = _by_ridge(solution, len(ridges))
        left_out = self._left_out(kernel, targets, absolute, mean_diagonal, approximation, size, seed)
        solved = solution.x.reshape(kernel.num_rows, len(ridges), num_right)
        residuals = absolute[:, None, None] * solved.transpose(1, 0, 2)  # y − K a = μ a
        shape = (len(ridges), -1, problem.targets.shape[1])
        reached = [float(each.residuals.max()) for each in targets]
        return problem.results(
            ridges,
            tuple(absolute.tolist()),
            residuals.reshape(shape),
            np.stack([each.residuals for each in left_out.estimates]).reshape(shape),
            _scores(test.stream(), solved, problem),
            loo_errors=[each.error for each in left_out.estimates],
            loo_stderr=[each.stderr for each in left_out.estimates],
            solve_residuals=reached,
            rounding_errors=left_out.rounding_errors,
            convergence=self._convergence(solution.passes, max(reached)),
            solver_numbers={
                "rank": float(len(approximation.eigenvalues)),
                "trace_left": approximation.trace_left,
                "leave_one_out_passes": float(left_out.passes),
            },
        )

    def _left_out(
        self,
        kernel: StreamedKernel,
        targets: Sequence[ShiftedSolution],
        absolute: Float[np.ndarray, " L"],
        mean_diagonal: float,
        approximation: LowRankApproximation,
        size: int,
        seed: int,
    ) -> "_LeftOut":
        """Leave-one-out estimates and rounding errors for each ridge."""
        guesses, bounds, unexplained = [], [], approximation.unexplained.reshape(-1, size)
        for ridge, own in zip(absolute.tolist(), targets, strict=True):
            coefficients = own.x.reshape(kernel.num_rows // size, size, -1)
            least, most = (
                np.linalg.inv(approximation.inverse_blocks(each, size))
                for each in (ridge, ridge + approximation.trace_left * mean_diagonal * kernel.num_rows)
            )
            gaps = np.minimum(unexplained, np.einsum("ndd->nd", most - least)).clip(min=0.0)[:, :, None]
            guesses.append(least @ coefficients + 0.5 * gaps * coefficients)
            bounds.append(least @ coefficients + gaps * coefficients)
        samples = [sampled_examples(each, self.num_sampled // size, seed) for each in guesses]
        units = [unit_vectors(kernel.num_rows, sample.examples, size) for sample in samples]
        # (A⁻¹)_ii errs by tolerance²/μ at most, and is at least 1/(k_ii + μ).
        tolerances = np.sqrt(_UNIT_ACCURACY * absolute / (mean_diagonal + absolute)).tolist()
        solution = self._solved(kernel, units, absolute, approximation, tolerances)
        solved = _by_ridge(solution, len(absolute))
        parts = zip(guesses, bounds, targets, solved, samples, absolute.tolist(), strict=True)
        left_out = [
            LeftOutSample(columns.x, own.x, sample.examples, sample.weights)
            for columns, own, sample in zip(solved, targets, samples, strict=True)
        ]
        roundings = rounding_errors(kernel.squared().product, left_out, unit=unit_rounding(kernel.dtype))
        return _LeftOut([estimate_leave_one_out(*part) for part in parts], roundings, solution.passes)

    def _solved(
        self,
        kernel: StreamedKernel,
        right: Sequence[Float[np.ndarray, "n j"]],
        absolute: Float[np.ndarray, " L"],
        approximation: LowRankApproximation,
        tolerances: Sequence[float],
    ) -> ShiftedSolution:
        """Solve for the right-hand sides of every ridge; columns are grouped by ridge."""
        width = right[0].shape[1]
        return solve_shifted_systems(
            kernel.product,
            np.concatenate(right, axis=1),
            np.repeat(absolute, width),
            approximation,
            tolerances=np.repeat(tolerances, width),
            max_passes=self.max_passes,
        )

    def _convergence(self, passes: int, residual: float) -> Convergence:
        remedy = "use larger ridges, allow more passes, raise the rank, or raise the tolerance"
        converged = residual <= self.tolerance
        return Convergence(passes, self.max_passes, residual, self.tolerance, remedy, converged)


def _by_ridge(solution: ShiftedSolution, count: int) -> list[ShiftedSolution]:
    """The solutions of each ridge; all have equally many columns."""
    width = solution.x.shape[1] // count
    return [solution.part(slice(index * width, (index + 1) * width)) for index in range(count)]


def _scores(
    test: StreamedRectangle, solved: Float[np.ndarray, "n L t"], problem: RidgeProblem
) -> list[Float[np.ndarray, "m T"]]:
    """Predictions for the test examples, for each ridge."""
    num_rows, count, num_right = solved.shape
    coefficients = np.ascontiguousarray(solved.reshape(num_rows, -1))
    predicted = test.product(coefficients).reshape(test.shape[0], count, num_right)
    check_finite_entries(predicted.reshape(test.shape[0], -1), "a product with the test kernel")
    num_targets = problem.targets.shape[1]
    return [problem.with_offset(predicted[:, index].reshape(-1, num_targets)) for index in range(count)]
