"""Streamed methods against the whole matrix: products, leading eigenpairs, low-rank part, ridge regression."""

import re
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.stats import ortho_group

from nntk_dist.analysis import BlockKrylov, ConjugateGradients, StreamedKernel, StreamedRectangle, ridge, spectrum
from nntk_dist.analysis.regression.pivoted_cholesky import low_rank_approximation
from nntk_dist.analysis.regression.shifted_systems import solve_shifted_systems
from nntk_dist.analysis.spectra.dense import kernel_spectrum
from nntk_dist.errors import NNTKError

NUM_TRAIN, NUM_TEST = 150, 40


def tiled(matrix, edge=32, reads=None):
    """A matrix read tile by tile; `reads` records which tiles."""

    def read(rows, columns):
        if reads is not None:
            reads.append((rows.start, columns.start))
        return matrix[rows, columns]

    return StreamedKernel(len(matrix), edge, read)


def leading_eigenpairs(kernel, top_k, **options):
    return spectrum(kernel, top_k=top_k, solver=BlockKrylov(**options))


def kernels(width=1, seed=0, dtype=np.float32):
    """A smooth kernel of scattered points with `width` outputs, train by train and test by train."""
    generator = np.random.default_rng(seed)
    points = generator.standard_normal((NUM_TRAIN + NUM_TEST, 3))
    squared = np.square(points[:, None] - points[None]).sum(axis=-1)
    kernel = (np.exp(-squared / 8) + 0.3).astype(dtype)
    if width > 1:
        mixing = generator.standard_normal((width, width)).astype(dtype)
        kernel = np.kron(kernel, mixing @ mixing.T + np.eye(width, dtype=dtype))
    train = NUM_TRAIN * width
    return kernel[:train, :train], kernel[train:, :train], points


def test_a_product_reads_the_upper_tiles_once_and_sums_the_squares():
    matrix = kernels()[0].astype(np.float64)
    reads: list[Any] = []
    vectors = np.random.default_rng(1).standard_normal((NUM_TRAIN, 4))
    kernel = tiled(matrix, 32, reads)
    product, squares = kernel.product_and_norm(vectors)
    np.testing.assert_allclose(product, matrix @ vectors, rtol=1e-12)
    assert squares == pytest.approx(np.square(matrix).sum(), rel=1e-12)
    assert sorted(reads) == [(32 * i, 32 * j) for i in range(5) for j in range(i, 5)]
    np.testing.assert_array_equal(kernel.product(vectors), product)


@pytest.mark.parametrize("size", [1, 3])
def test_diagonal_blocks_and_rows(size):
    matrix = np.arange(36.0**2).reshape(36, 36)
    matrix = matrix + matrix.T
    kernel = tiled(matrix, 15)
    expected = [matrix[i : i + size, i : i + size] for i in range(0, 36, size)]
    np.testing.assert_array_equal(kernel.diagonal_blocks(size), expected)
    np.testing.assert_array_equal(kernel.rows(slice(15, 30), np.array([2, 7])), matrix[[17, 22]])


def test_a_rectangle_times_vectors():
    matrix, vectors = (
        np.random.default_rng(0).standard_normal((23, 31)),
        np.random.default_rng(1).standard_normal((31, 2)),
    )
    rectangle = StreamedRectangle((23, 31), (7, 10), lambda rows, columns: matrix[rows, columns])
    np.testing.assert_allclose(rectangle.product(vectors), matrix @ vectors, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 10])
def test_leading_pairs_are_those_of_the_whole_matrix(top_k):
    matrix = kernels()[0]
    found = leading_eigenpairs(tiled(matrix), top_k=top_k)
    expected = kernel_spectrum(matrix, top_k=top_k)
    assert found.convergence.converged
    assert (found.residuals <= 1e-6 * found.eigenvalues).all()
    errors = np.abs(found.eigenvalues - expected.eigenvalues[:top_k])
    assert (errors <= found.residuals + 1e-13 * expected.eigenvalues[0]).all()
    np.testing.assert_allclose(found.eigenvectors, expected.eigenvectors, atol=1e-5)
    dense = matrix.astype(np.float64)
    true = np.linalg.norm(dense @ found.eigenvectors - found.eigenvectors * found.eigenvalues, axis=0)
    np.testing.assert_allclose(found.residuals, true, atol=1e-12 * expected.eigenvalues[0])
    assert found.numbers()["trace"] == pytest.approx(np.trace(dense), rel=1e-12)
    assert found.numbers()["participation_ratio"] == pytest.approx(expected.participation_ratio, rel=1e-9)


def test_clusters_negative_eigenvalues_and_restarts():
    """Twelve equal eigenvalues, a slow decay that fills the basis, and the largest magnitude negative."""
    known = np.concatenate([np.full(12, 3.0), np.linspace(2.0, 0.01, 237), [-10.0]])
    basis = ortho_group.rvs(250, random_state=0)
    matrix = (basis * known) @ basis.T
    found = leading_eigenpairs(tiled((matrix + matrix.T) / 2, 64), top_k=14)
    assert found.convergence.converged
    np.testing.assert_allclose(found.eigenvalues, known[:14], rtol=1e-9)
    assert found.convergence.passes > 6  # more blocks than the basis holds


def test_a_kernel_of_low_rank_or_of_few_rows_gives_all_that_there_is():
    low = np.random.default_rng(0).standard_normal((60, 4))
    found = leading_eigenpairs(tiled(low @ low.T), top_k=10)
    assert found.convergence.converged
    np.testing.assert_allclose(found.eigenvalues[4:], 0, atol=1e-10)
    few = leading_eigenpairs(tiled(np.diag([3.0, 1.0, 2.0])), top_k=10)
    np.testing.assert_allclose(few.eigenvalues, [3, 2, 1], rtol=1e-12)


def test_too_few_passes_are_said_to_be_too_few():
    found = leading_eigenpairs(tiled(kernels()[0]), top_k=20, max_passes=1)
    assert not found.convergence.converged
    assert found.convergence.passes == 1
    assert re.fullmatch(
        r"not converged: residual \S+ after 1 passes, tolerance 1e-06; allow more passes, .*", found.convergence.text
    )
    assert found.residuals.max() > 1e-6 * found.eigenvalues[0]


def test_refusals_of_leading_pairs():
    with pytest.raises(NNTKError, match="top_k is 0; allowed: 1 or more"):
        leading_eigenpairs(tiled(np.eye(3)), top_k=0)
    with pytest.raises(NNTKError, match=r"a product with the kernel holds .* NaN or infinite"):
        leading_eigenpairs(tiled(np.full((3, 3), np.nan)), top_k=1)


@pytest.mark.parametrize(("rank", "share"), [(40, 0.05), (150, 1e-5)])
def test_the_low_rank_approximation_is_below_the_kernel_and_close_to_it(rank, share):
    matrix = kernels(dtype=np.float64)[0]
    part = low_rank_approximation(tiled(matrix), np.diagonal(matrix).copy(), rank=rank)
    approximation = (part.basis * part.eigenvalues) @ part.basis.T
    assert np.linalg.eigvalsh(matrix - approximation)[0] > -1e-9
    assert part.trace_left < share
    assert part.trace_left == pytest.approx(1 - np.trace(approximation) / np.trace(matrix), abs=1e-12)
    ridge = 0.05
    inverse = np.linalg.inv(approximation + ridge * np.eye(NUM_TRAIN))
    vectors = np.random.default_rng(2).standard_normal((NUM_TRAIN, 3))
    np.testing.assert_allclose(part.solve(vectors, np.full(3, ridge)), inverse @ vectors, rtol=1e-8, atol=1e-8)
    blocks = [inverse[i : i + 3, i : i + 3] for i in range(0, NUM_TRAIN, 3)]
    np.testing.assert_allclose(part.inverse_blocks(ridge, 3), blocks, rtol=1e-8, atol=1e-8)


def test_pivots_are_no_more_than_are_needed():
    matrix = kernels()[0].astype(np.float64)
    part = low_rank_approximation(tiled(matrix), np.diagonal(matrix).copy(), rank=100, least=0.2 * np.trace(matrix))
    assert len(part.eigenvalues) < 50
    low = np.random.default_rng(0).standard_normal((60, 4))
    part = low_rank_approximation(tiled(low @ low.T), np.square(low).sum(axis=1), rank=30)
    assert len(part.eigenvalues) == 4


def arguments(kind, points):
    """Labels of three classes, or three float columns with an offset, both smooth in the points."""
    values = np.tanh(points) + 0.1 * np.random.default_rng(9).standard_normal(points.shape)
    if kind == "labels":
        labels = values.argmax(axis=1)
        return {"targets": labels[:NUM_TRAIN], "test_targets": labels[NUM_TRAIN:]}
    return {
        "targets": values[:NUM_TRAIN],
        "test_targets": values[NUM_TRAIN:],
        "offset": 0.3 * points[:NUM_TRAIN, ::-1],
        "test_offset": 0.3 * points[NUM_TRAIN:, ::-1],
    }


def streamed(width, given, ridges, **options):
    train, test, _ = kernels(width)
    rectangle = StreamedRectangle(test.shape, (32 * width, 32 * width), lambda rows, columns: test[rows, columns])
    return by_iteration(tiled(train, 32 * width), rectangle, given, ridges, **options)


def by_iteration(kernel, rectangle, given, ridges, *, seed=0, **options):
    given = dict(given)
    targets, test_targets = given.pop("targets"), given.pop("test_targets")
    solver = ConjugateGradients(**options)
    return ridge(kernel, targets, rectangle, test_targets, ridges=ridges, solver=solver, seed=seed, **given)


@pytest.mark.parametrize("kind", ["labels", "floats"])
@pytest.mark.parametrize("width", [1, 3], ids=["trace", "full"])
def test_regression_is_that_of_the_kernel(kind, width):
    """Solutions to the tolerance of their residuals; leave-one-out within Student's quantile of 1e-4 over 24 rows."""
    ridges = (1e-3, 1e-2, 0.5)
    train, test, points = kernels(width)
    given = arguments(kind, points)
    found = streamed(width, given, ridges, rank=60 * width, tolerance=1e-6)
    targets, test_targets = given.pop("targets"), given.pop("test_targets")
    expected = ridge(train, targets, test, test_targets, ridges=ridges, **given)
    same = ridge(train, targets, test, test_targets, ridges=(found.selected.ridge,), **given)
    quantile = stats.t.isf(1e-4 / 48, 32 // width - 1)
    assert found.convergence.converged
    exact = {row.ridge: row.loo_error for row in expected.rows}
    assert exact[found.selected.ridge] <= expected.selected.loo_error + quantile * found.selected.loo_stderr
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert row.solve_residual <= 1e-6
        assert row.absolute_ridge == pytest.approx(other.absolute_ridge, rel=1e-6)
        assert row.train_error == pytest.approx(other.train_error, rel=1e-4)
        assert row.test_error == pytest.approx(other.test_error, rel=1e-4)
        assert row.test_accuracy == other.test_accuracy
        assert abs(row.loo_error - other.loo_error) < quantile * row.loo_stderr
        assert row.loo_stderr < 0.6 * other.loo_error
    np.testing.assert_allclose(found.scores, same.scores, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 20, 60, 140])
def test_the_energy_of_a_column_errs_by_the_square_of_its_residual(rank):
    """Also when the low-rank part is nearly the whole kernel and a column converges after a step or two."""
    matrix = kernels()[0].astype(np.float64)
    ridge, units = 0.03, np.eye(NUM_TRAIN)
    part = low_rank_approximation(tiled(matrix), np.diagonal(matrix), rank=rank)
    inverse = np.linalg.inv(matrix + ridge * units)
    found = solve_shifted_systems(
        tiled(matrix).product,
        units,
        np.full(NUM_TRAIN, ridge),
        part,
        tolerances=np.full(NUM_TRAIN, 1e-2),
        max_passes=100,
    )
    assert (found.residuals <= 1e-2).all()
    missed = units - (matrix + ridge * units) @ found.x
    energies = np.einsum("nj,nj->j", missed, inverse @ missed)  # bᵀA⁻¹b − bᵀx, if x is orthogonal to the error
    # to rounding: conjugate gradients lose some orthogonality over many steps
    np.testing.assert_allclose(np.diagonal(inverse) - np.diagonal(found.x), energies, rtol=0.05)
    assert (energies / np.diagonal(inverse)).max() < 1e-3


@pytest.mark.filterwarnings("ignore:the leave-one-out error at ridge")
def test_a_solve_that_is_cut_short_says_so():
    found = streamed(1, arguments("labels", kernels()[2]), (1e-4,), rank=5, max_passes=2)
    assert not found.convergence.converged
    assert "after 2 passes, tolerance 0.0001; use larger ridges" in found.convergence.text
    assert found.selected.solve_residual > 1e-6


@pytest.mark.filterwarnings("ignore:the leave-one-out error at ridge")
def test_a_tolerance_is_met_and_not_worked_beyond():
    given = arguments("labels", kernels()[2])
    loose, tight = (streamed(1, given, (1e-3,), rank=20, tolerance=each) for each in (1e-2, 1e-6))
    assert loose.convergence.converged
    assert tight.convergence.converged
    assert loose.convergence.passes < tight.convergence.passes
    assert 1e-6 < loose.selected.solve_residual <= 1e-2
    assert tight.selected.solve_residual <= 1e-6


def test_the_low_rank_approximation_lies_below_the_kernel_in_orthonormal_directions(monkeypatch):
    """U and Σ by stripes of seven rows; K − U Σ Uᵀ is positive semidefinite, and its trace is the stated remainder."""
    monkeypatch.setattr("nntk_dist.analysis.regression.pivoted_cholesky._ROWS_AT_ONCE", 7)
    kernel = kernels()[0]
    part = low_rank_approximation(tiled(kernel), np.diag(kernel), rank=30)
    np.testing.assert_allclose(part.basis.T @ part.basis, np.eye(30), atol=1e-9)
    low = (part.basis * part.eigenvalues) @ part.basis.T
    assert np.linalg.eigvalsh(kernel - low).min() > -1e-8 * part.eigenvalues[0]  # the kernel is stored in float32
    assert part.trace_left == pytest.approx(np.trace(kernel - low) / np.trace(kernel), rel=1e-6)
    assert 0 < part.trace_left < 0.5
    inverse = np.linalg.inv(low + 0.5 * np.eye(len(kernel)))
    np.testing.assert_allclose(part.inverse_blocks(0.5, 1)[:, 0, 0], np.diag(inverse), rtol=1e-9)


def test_refusals_of_the_regression():
    given = arguments("labels", kernels()[2])
    with pytest.raises(NNTKError, match=r"allowed: one or more positive numbers, relative to tr K / n"):
        streamed(1, given, (0.0,))
    with pytest.raises(NNTKError, match="train kernel has 600 rows and the targets 150 examples of 3"):
        streamed(4, given, (0.1,))
    rectangle = StreamedRectangle(
        (NUM_TEST, NUM_TRAIN), (32, 32), lambda rows, columns: np.zeros((NUM_TEST, NUM_TRAIN))
    )
    matrix = kernels()[0] - 0.4 * np.eye(NUM_TRAIN)
    with pytest.raises(NNTKError, match=r"indefinite at the absolute ridge μ = .*'statistic: plugin'"):
        by_iteration(tiled(matrix), rectangle, given, (1e-3,), rank=20)
    matrix[3, 3] = np.nan
    with pytest.raises(NNTKError, match="the kernel's diagonal holds 1 values that are NaN"):
        by_iteration(tiled(matrix), rectangle, given, (1e-3,), rank=20)
    with pytest.raises(NNTKError, match="mean diagonal is 0"):
        by_iteration(tiled(np.zeros((NUM_TRAIN, NUM_TRAIN))), rectangle, given, (1e-3,))
