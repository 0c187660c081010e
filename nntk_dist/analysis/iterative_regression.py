"""Kernel ridge regression on a kernel that stays in storage: all ridges and targets in the same passes over its tiles.

Conjugate gradients in float64, preconditioned by a low-rank part of the kernel; never n × n in memory. What differs
from the dense form (`nntk_dist.analysis.dense_regression`): solutions are as accurate as their stated residuals, and
leave-one-out, which needs the diagonal of an inverse, is an estimate with a standard error
(`nntk_dist.analysis.leave_one_out`).

Axes: n kernel rows, N train examples of d rows each, m test examples, T target columns, t right-hand sides of a ridge
(T, or 1 in form `full`), L ridges, s sampled examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nntk_dist.analysis.conjugate_gradients import Solution, solve
from nntk_dist.analysis.leave_one_out import estimate_left_out, sampled_examples, unit_vectors
from nntk_dist.analysis.pivoted_cholesky import low_rank_part
from nntk_dist.analysis.ridge_problem import RidgeProblem, RidgeRegression, check_mean_diagonal, check_positive
from nntk_dist.analysis.spectrum import check_finite
from nntk_dist.analysis.streamed_kernel import TiledKernel, TiledRows

TOLERANCE = 1e-4  # what others stop at, and far below what a kernel of draws is known to
NUM_SAMPLED = 32
_LEAST_RANK, _MOST_RANK = 1024, 4096  # the most takes n · 32 KiB
_UNIT_TOLERANCE = 1e-2  # of solves whose energy is asked for, which errs by the square
_MOST_PASSES = 200
_ENOUGH = 0.1  # of the least ridge: with so little trace left, the low-rank part is as good as the kernel


@dataclass(frozen=True)
class StreamedRegression:
    """The results, with what it took: passes over the train kernel, rank of the preconditioner and the share of the
    trace that it leaves out. `converged` where the residual of every ridge is within the tolerance.
    """

    regression: RidgeRegression
    passes: int
    rank: int
    trace_left: float
    converged: bool


def rank_of(num_rows: int) -> int:
    """Pivots of the preconditioner: what they cost is one pass and 6·n·r² operations, what they save about half of the
    passes for every factor of four where eigenvalues decay like k^-1.
    """
    return min(num_rows, _MOST_RANK, max(_LEAST_RANK, num_rows // 16))


def streamed_regression(
    kernel: TiledKernel,
    test: TiledRows,
    problem: RidgeProblem,
    ridges: Sequence[float],
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    rank: int | None = None,
    num_sampled: int = NUM_SAMPLED,
    most_passes: int = _MOST_PASSES,
) -> StreamedRegression:
    """Fit every ridge, select one by estimated leave-one-out error, evaluate all of them on the test examples.

    `(K + μ_l I) a = y` to `‖y − (K + μI) a‖ ≤ tolerance·‖y‖` for every target column. For leave-one-out the columns
    `A⁻¹ e_i` of about `num_sampled/d` examples are solved with them (of at least eight examples; d columns for each).

    Cost: passes of n²/2 entries and 2n²·L·(t + s·d) operations, tens of them where eigenvalues decay; 9·n·L·(t + s·d)
    and n·rank numbers of memory.

    Raises:
        NNTKError: kernel and targets do not fit; an entry is not finite; the trace or a ridge is not positive; `K + μI`
            is seen to be indefinite.
    """
    ridges = tuple(float(ridge) for ridge in ridges)
    size = problem.rows_per_example(kernel.num_rows)
    check_positive(ridges)
    blocks = kernel.diagonal_blocks(size)
    diagonal = np.einsum("nii->ni", blocks).reshape(-1)
    check_finite(diagonal, "the kernel's diagonal")
    check_mean_diagonal(float(diagonal.mean()))
    absolute = np.array(ridges) * float(diagonal.mean())
    rank = rank_of(kernel.num_rows) if rank is None else rank
    part = low_rank_part(kernel, diagonal, rank=rank, least=_ENOUGH * float(absolute.min()), seed=seed)
    wanted = problem.fitted.reshape(kernel.num_rows, -1)
    sampled = sampled_examples(kernel.num_rows // size, num_sampled // size, seed)
    units = unit_vectors(kernel.num_rows, sampled, size)
    count, num_right = len(ridges), wanted.shape[1]
    right = np.tile(np.concatenate([wanted, units], axis=1), (1, count))
    tolerances = np.tile(np.repeat([tolerance, _UNIT_TOLERANCE], [num_right, units.shape[1]]), count)
    per_column = np.repeat(absolute, num_right + units.shape[1])
    solution = solve(kernel.product, right, per_column, part, tolerances=tolerances, most_passes=most_passes)
    solved = solution.x.reshape(kernel.num_rows, count, -1)
    left_out = [
        estimate_left_out(
            solved[:, index, :num_right].reshape(-1, size, num_right),
            solved[:, index, num_right:].reshape(-1, size, len(sampled), size),
            sampled,
            part.inverse_blocks(float(absolute[index]), size),
            blocks - part.blocks(size),
        )
        for index in range(count)
    ]
    coefficients = np.ascontiguousarray(solved[:, :, :num_right].reshape(kernel.num_rows, -1))
    predicted = test.product(coefficients).reshape(test.shape[0], count, num_right)
    check_finite(predicted.reshape(test.shape[0], -1), "a product with the test kernel")
    num_targets = problem.targets.shape[1]
    scores = [problem.with_offset(predicted[:, index].reshape(-1, num_targets)) for index in range(count)]
    shape = (count, -1, num_targets)
    residuals = absolute[:, None, None] * solved[:, :, :num_right].transpose(1, 0, 2)  # y − K a = μ a
    reached = _target_residuals(solution, count, num_right)
    regression = problem.results(
        ridges,
        tuple(absolute.tolist()),
        residuals.reshape(shape),
        np.stack([each.residuals for each in left_out]).reshape(shape),
        scores,
        loo_errors=[each.error for each in left_out],
        loo_stderr=[each.stderr for each in left_out],
        solve_residuals=reached,
    )
    converged = max(reached) <= tolerance
    return StreamedRegression(regression, solution.passes, len(part.eigenvalues), part.trace_left, converged)


def _target_residuals(solution: Solution, count: int, num_right: int) -> list[float]:
    """The largest relative residual of a target column, for every ridge."""
    return [float(value) for value in solution.residuals.reshape(count, -1)[:, :num_right].max(axis=1)]
