"""Kernel ridge regression of a kernel `K = W Wᵀ` from the rows of W, which are read in blocks; exact, never n × n.

A ridge regression with K is one with the columns of W as features.

Axes: n kernel rows, F columns of W, T target columns, t right-hand sides (T, or 1 in form `full`), L ridges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from nntk_dist.analysis.factor_products import column_products, numbered_blocks
from nntk_dist.analysis.kernel_forms import KernelForms, Needs
from nntk_dist.analysis.regression.ridge_problem import (
    RidgeProblem,
    RidgeRegression,
    absolute_ridges,
    check_mean_diagonal,
)
from nntk_dist.analysis.solvers import Cost, RegressionSize
from nntk_dist.analysis.spectra.dense import DENSE_COPIES, EIGH_OPERATIONS
from nntk_dist.analysis.streamed_kernel import StreamedKernel, StreamedRectangle
from nntk_dist.errors import ArgumentError

_BLOCKS_HELD = 6  # three that are read ahead, and their products


@dataclass(frozen=True)
class FactoredRidge:
    """Fit every ridge from the kernel's factor, without the kernel; leave-one-out is exact.

    Equal to `DenseRidge` up to rounding. With `WᵀW = V Λ Vᵀ` the weights are `V (Λ + μ)⁻¹ VᵀWᵀ y`, and the residual of
    an example left out is `(I − H_ii)⁻¹ (y − f)_i`, `H_ii = w_i (WᵀW + μ)⁻¹ w_iᵀ`: a number, or the block of its
    outputs in form `full`.
    Cost: 3·n·F² and about 9·F³ operations for all ridges together; two passes over the train rows, one over the test
    rows; about 4F² float64 numbers.
    """

    needs: ClassVar[Needs] = Needs.FACTOR

    def cost(self, size: RegressionSize) -> Cost:
        """Estimate what a solve takes."""
        kernel = size.kernel
        columns = kernel.factor_columns or 0
        held = 8 * kernel.num_rows * 3 * size.num_ridges * size.num_targets
        return Cost(
            memory_bytes=DENSE_COPIES * 8 * columns**2 + 8 * kernel.factor_block_rows * _BLOCKS_HELD * columns + held,
            operations=4.0 * float(kernel.num_rows) * float(columns) ** 2 + EIGH_OPERATIONS * float(columns) ** 3,
            read_bytes=2.0 * kernel.factor_bytes,
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
            ArgumentError: rows and targets do not fit; a ridge is not positive, or below rounding.
            DataError: rows are not finite, or the trace is not positive.
        """
        rows, test_rows = train.read_factor(), test.read_factor()
        ridges = tuple(float(ridge) for ridge in ridges)
        size = problem.rows_per_example(rows.num_rows)
        wanted = problem.fitted.reshape(rows.num_rows, -1)
        products, projected = column_products(rows, wanted)
        mean_diagonal = float(products.trace()) / rows.num_rows
        check_mean_diagonal(mean_diagonal)
        values, basis = torch.linalg.eigh(products)
        del products
        spare = rows.num_columns - rows.num_rows
        smallest = float(values[spare]) if spare >= 0 else 0.0
        absolute = absolute_ridges(
            ridges, mean_diagonal, smallest=smallest, largest=float(values[-1]), num_rows=rows.num_rows
        )
        inverse = 1.0 / (values.clamp_min(0.0) + torch.tensor(absolute, dtype=torch.float64)[:, None])  # (L, F)
        weights = inverse[:, :, None] * (basis.T @ projected)  # (L, F, T), in the basis V
        stacked = weights.transpose(0, 1).flatten(1)
        shape = (len(ridges), rows.num_rows, wanted.shape[1])
        residuals, loo_residuals = np.empty(shape), np.empty(shape)
        for selection, block in numbered_blocks(rows):
            turned = block @ basis
            fitted = (turned @ stacked).unflatten(1, (len(ridges), -1)).transpose(0, 1)
            missed = torch.from_numpy(wanted[selection]) - fitted
            residuals[:, selection] = missed
            loo_residuals[:, selection] = _left_out(turned, missed, inverse, size)
        outer = basis @ stacked
        scores = torch.cat([block @ outer for _, block in numbered_blocks(test_rows)]).numpy()
        per_ridge = scores.reshape(test_rows.num_rows, len(ridges), -1).transpose(1, 0, 2)
        num_targets = problem.targets.shape[1]
        _check_test_rows(test_rows.num_rows, size, problem)
        all_scores = [problem.with_offset(each.reshape(-1, num_targets)) for each in per_ridge]
        shape = (len(ridges), -1, num_targets)
        return problem.results(ridges, absolute, residuals.reshape(shape), loo_residuals.reshape(shape), all_scores)


def _left_out(
    turned: Float64[Tensor, "n F"],
    residuals: Float64[Tensor, "L n t"],
    inverse: Float64[Tensor, "L F"],
    size: int,
) -> Float64[Tensor, "L n t"]:
    """Leave-one-out residuals, from rows in the basis V; each example has `size` rows."""
    if size == 1:
        leverage = turned.square() @ inverse.T
        return residuals / (1.0 - leverage.T[:, :, None])
    grouped = turned.unflatten(0, (-1, size))
    identity = torch.eye(size, dtype=torch.float64)
    parts = []
    for own, missed in zip(inverse, residuals, strict=True):
        rest = identity - (grouped * own) @ grouped.transpose(1, 2)
        parts.append(torch.linalg.solve(rest, missed.unflatten(0, (-1, size))).flatten(0, 1))
    return torch.stack(parts)


def _check_test_rows(num_rows: int, size: int, problem: RidgeProblem) -> None:
    if num_rows != len(problem.test_targets) * size:
        raise ArgumentError(
            f"the test factor has {num_rows} rows and test_targets {len(problem.test_targets)} examples; it needs "
            f"{size} row(s) for each"
        )
