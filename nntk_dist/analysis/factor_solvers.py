"""Spectrum and kernel ridge regression of a kernel `K = W Wᵀ` from the rows of W, which are read in blocks.

Exact, without K: the non-zero eigenvalues of W Wᵀ are those of the small matrix WᵀW, and a ridge regression with K is
one with the columns of W as features. It reads no store, and takes no approximation.

Everything is float64, also where rows were stored in float32. The small matrix squares what is summed: in float32 its
eigenvalues would err by 1e-7 of the largest one, λ, and a ridge of 1e-4 of the mean diagonal is about 1e-8 λ at 60,000
rows; in float64 they err as a dense decomposition of K does. Memory: 4 F² and a few blocks of rows; never n × n.

Axes: n kernel rows, F columns of W, k leading eigenvectors, T target columns, L ridges.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.analysis.ridge_problem import RidgeProblem, RidgeRegression, absolute_ridges, check_mean_diagonal
from nntk_dist.analysis.spectrum import Spectrum, kernel_spectrum
from nntk_dist.errors import NNTKError


def column_products(
    rows: FactorRows, right: Float[np.ndarray, "n t"] | None = None
) -> tuple[Float64[Tensor, "F F"], Float64[Tensor, "F t"]]:
    """`WᵀW` and `Wᵀ·right` in one pass over the rows; 2·n·F·(F + t) operations.

    Raises:
        NNTKError: the rows are not finite.
    """
    right = np.empty((rows.num_rows, 0)) if right is None else right
    products = torch.zeros(rows.num_columns, rows.num_columns, dtype=torch.float64)
    projected = torch.zeros(rows.num_columns, right.shape[1], dtype=torch.float64)
    for selection, block in _numbered(rows):
        products.addmm_(block.T, block)
        projected.addmm_(block.T, torch.from_numpy(right[selection]))
    if not bool(torch.isfinite(products).all()):
        raise NNTKError(
            "the kernel's factor holds values that are NaN or infinite; check that the run finished and that the "
            "model's outputs are finite"
        )
    return products, projected


def factored_spectrum(rows: FactorRows, *, top_k: int = 50) -> Spectrum:
    """The spectrum of `W Wᵀ`: all eigenvalues that need not be 0, and leading eigenvectors `W v/√λ`.

    As `kernel_spectrum` of W Wᵀ gives them, to rounding; there are no vectors of eigenvalues that are 0 to rounding.
    Cost: n·F² and 8F³/3 multiply-adds, two passes over the rows.

    Raises:
        NNTKError: `top_k` is negative, or the rows are not finite.
    """
    small = kernel_spectrum(column_products(rows)[0].numpy(), top_k=top_k)
    values = small.eigenvalues[: min(rows.num_rows, rows.num_columns)]
    rounding = rows.num_columns * np.finfo(np.float64).eps * max(values[0], 0.0)
    count = min(int(np.count_nonzero(values > rounding)), small.eigenvectors.shape[1])
    inner = torch.from_numpy(small.eigenvectors[:, :count] / np.sqrt(values[:count]))
    vectors = np.empty((rows.num_rows, count))
    for selection, block in _numbered(rows):
        vectors[selection] = block @ inner
    peaks = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None, :], axis=0)
    return Spectrum(values, vectors * np.sign(peaks), num_zeros=rows.num_rows - len(values))


def indefinite_spectrum(columns: FactorRows, metric: Float[np.ndarray, "s s"]) -> Spectrum:
    """Eigenvalues of `Φ (M ⊗ I) Φᵀ` for any symmetric M, from rows of Φ; no vectors.

    With `ΦᵀΦ = RᵀR` they are those of `R (M ⊗ I) Rᵀ`, and zeros. Columns of Φ lie output by output, draws within.
    """
    values, vectors = torch.linalg.eigh(column_products(columns)[0])
    root = values.clamp_min(0.0).sqrt()[:, None] * vectors.T
    num_columns, num_draws = columns.num_columns, len(metric)
    del vectors
    mixed = root.reshape(-1, num_draws) @ torch.from_numpy(metric)
    inner = mixed.reshape(num_columns, num_columns) @ root.T
    del root, mixed
    small = torch.linalg.eigvalsh(inner.add_(inner.T.clone()).mul_(0.5)).flip(0).numpy()
    if num_columns > columns.num_rows:  # the rest are zeros of rounding
        kept = np.sort(np.argsort(-np.abs(small), kind="stable")[: columns.num_rows])
        small = small[kept]
    return Spectrum(small, np.empty((columns.num_rows, 0)), num_zeros=columns.num_rows - len(small))


def factored_regression(
    train: FactorRows, test: FactorRows, problem: RidgeProblem, ridges: Sequence[float]
) -> RidgeRegression:
    """Kernel ridge regression at every ridge with `K = W Wᵀ`, leave-one-out exact: what `ridge_regression` gives, to
    rounding.

    With `WᵀW = V Λ Vᵀ` the weights are `V (Λ + μ)⁻¹ VᵀWᵀ y`, and the residual of an example left out is
    `(I − H_ii)⁻¹ (y − f)_i`, `H_ii = w_i (WᵀW + μ)⁻¹ w_iᵀ`: a number, or the block of its outputs in form `full`.
    Cost: 3·n·F² and about 9·F³ operations for all ridges together; two passes over the train rows, one over the test
    rows.

    Raises:
        NNTKError: rows and targets do not fit; rows are not finite; the trace is not positive; a ridge is not positive,
            or below rounding.
    """
    ridges = tuple(float(ridge) for ridge in ridges)
    size = problem.rows_per_example(train.num_rows)
    wanted = problem.fitted.reshape(train.num_rows, -1)
    products, projected = column_products(train, wanted)
    mean_diagonal = float(products.trace()) / train.num_rows
    check_mean_diagonal(mean_diagonal)
    values, basis = torch.linalg.eigh(products)
    del products
    spare = train.num_columns - train.num_rows
    smallest = float(values[spare]) if spare >= 0 else 0.0
    absolute = absolute_ridges(
        ridges, mean_diagonal, smallest=smallest, largest=float(values[-1]), num_rows=train.num_rows
    )
    inverse = 1.0 / (values.clamp_min(0.0) + torch.tensor(absolute, dtype=torch.float64)[:, None])  # (L, F)
    weights = inverse[:, :, None] * (basis.T @ projected)  # (L, F, T), in the basis V
    stacked = weights.transpose(0, 1).flatten(1)
    shape = (len(ridges), train.num_rows, wanted.shape[1])
    residuals, loo_residuals = np.empty(shape), np.empty(shape)
    for selection, block in _numbered(train):
        turned = block @ basis
        fitted = (turned @ stacked).unflatten(1, (len(ridges), -1)).transpose(0, 1)
        missed = torch.from_numpy(wanted[selection]) - fitted
        residuals[:, selection] = missed
        loo_residuals[:, selection] = _left_out(turned, missed, inverse, size)
    outer = basis @ stacked
    scores = torch.cat([block @ outer for _, block in _numbered(test)]).numpy()
    per_ridge = scores.reshape(test.num_rows, len(ridges), -1).transpose(1, 0, 2)
    num_targets = problem.targets.shape[1]
    _check_test_rows(test.num_rows, size, problem)
    all_scores = [problem.with_offset(each.reshape(-1, num_targets)) for each in per_ridge]
    shape = (len(ridges), -1, num_targets)
    return problem.results(ridges, absolute, residuals.reshape(shape), loo_residuals.reshape(shape), all_scores)


def _left_out(
    turned: Float64[Tensor, "n F"],
    residuals: Float64[Tensor, "L n t"],
    inverse: Float64[Tensor, "L F"],
    size: int,
) -> Float64[Tensor, "L n t"]:
    """Residuals with the example itself left out, of rows in the basis V; `size` rows an example."""
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
        raise NNTKError(
            f"the test factor has {num_rows} rows and test_targets {len(problem.test_targets)} examples; it needs "
            f"{size} row(s) for each"
        )


def _numbered(rows: FactorRows) -> Iterator[tuple[slice, Float64[Tensor, "n F"]]]:
    """Blocks of rows with where they belong."""
    start = 0
    for block in rows.blocks():
        yield slice(start, start + len(block)), torch.from_numpy(block)
        start += len(block)
