"""Leave-one-out of iterative solves against exact leave-one-out: error bars that cover, at few pivots too."""

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

from nntk_dist.analysis import ConjugateGradients, ridge
from nntk_dist.analysis.regression.leave_one_out import estimate_leave_one_out, sampled_examples, unit_vectors
from nntk_dist.analysis.regression.pivoted_cholesky import low_rank_approximation
from nntk_dist.analysis.regression.shifted_systems import ShiftedSolution
from tests.library.analysis.test_streamed import NUM_TRAIN, arguments, kernels, streamed, tiled

pytestmark = pytest.mark.filterwarnings("ignore:rounding of the kernel", "ignore:the leave-one-out error at ridge")


def smooth():
    """A smooth kernel of 150 rows and labels of three classes."""
    return kernels()[0], arguments("labels", kernels()[2])["targets"]


def outliers():
    """300 rows; some inputs and targets are far out, and a few examples hold most of the leave-one-out error."""
    rng = np.random.default_rng(3)
    points = rng.standard_normal((300, 3))
    points[::50] *= 3.0
    kernel = (1.0 + points @ points.T) ** 2 + 20.0 * np.exp(-0.5 * np.square(points[:, None] - points).sum(2))
    return kernel, np.sin(points.sum(1)) + rng.standard_t(2, 300) * 0.2


def digits():
    pixels, labels = (part[:200] for part in load_digits(return_X_y=True))
    return np.exp(-np.square(pixels[:, None] - pixels).sum(2) / 2000), labels


@pytest.mark.parametrize(
    ("problem", "relative", "rank"),
    [
        pytest.param(smooth, 1e-4, 30, marks=pytest.mark.statistical),
        pytest.param(smooth, 1e-4, 60, marks=pytest.mark.statistical),
        (smooth, 1e-4, 140),
        pytest.param(smooth, 0.1, 60, marks=pytest.mark.statistical),
        pytest.param(digits, 1e-4, 60, marks=pytest.mark.statistical),
        pytest.param(outliers, 1e-3, 40, marks=pytest.mark.statistical),
        pytest.param(outliers, 1e-2, 0, marks=pytest.mark.statistical),
    ],
)
def test_the_error_bars_cover(problem, relative, rank):
    """24 samples: at most five 95 % intervals miss (1e-3 if 5 % do), and the mean is right."""
    kernel, targets = problem()
    given = (kernel, targets, kernel[:1], targets[:1])
    exact = ridge(*given, ridges=[relative], num_classes=10).selected.loo_error
    solver = ConjugateGradients(rank=rank)
    rows = [ridge(*given, ridges=[relative], num_classes=10, solver=solver, seed=seed).selected for seed in range(24)]
    errors, stderr = np.array([[row.loo_error, row.loo_stderr] for row in rows]).T
    assert (np.abs(errors - exact) > stats.t.isf(0.025, 31) * stderr).sum() <= 5
    assert abs(errors.mean() - exact) < 4 * errors.std(ddof=1) / np.sqrt(24)
    if rank >= 60 and problem is smooth:
        assert errors.std(ddof=1) < 0.15 * exact
        assert np.median(stderr) < 0.15 * exact


@pytest.mark.parametrize("width", [1, 3], ids=["trace", "full"])
def test_leave_one_out_is_exact_where_every_example_is_sampled(width):
    train, test, points = kernels(width)
    given = arguments("labels", points)
    found = streamed(width, given, (1e-2,), num_sampled=NUM_TRAIN * width, rank=60).selected
    expected = ridge(train, given["targets"], test, given["test_targets"], ridges=(1e-2,)).selected
    assert found.loo_error == pytest.approx(expected.loo_error, rel=2e-3)
    assert found.loo_accuracy == expected.loo_accuracy
    assert abs(found.loo_error - expected.loo_error) <= found.loo_stderr  # only the solves err, by a bound
    assert found.loo_stderr < 0.05 * expected.loo_error


def test_solves_that_are_cut_short_widen_the_error_bar_of_leave_one_out():
    train, test, points = kernels()
    given = arguments("labels", points)
    truth = ridge(train, given["targets"], test, given["test_targets"], ridges=(1e-4,)).selected.loo_error
    found = streamed(1, given, (1e-4,), rank=20, num_sampled=NUM_TRAIN, tolerance=1e-2, max_passes=12).selected
    assert 0 < abs(found.loo_error - truth) <= found.loo_stderr


@pytest.mark.parametrize("size", [1, 3])
def test_what_the_pivots_of_other_examples_leave_unexplained(size):
    """Against conditional variances by brute force; the pivots are the rows that are explained wholly."""
    matrix = kernels(size, dtype=np.float64)[0][:90, :90]
    part = low_rank_approximation(tiled(matrix, 30), np.diagonal(matrix).copy(), rank=20, size=size)
    low = (part.basis * part.eigenvalues) @ part.basis.T
    pivots = np.flatnonzero(np.diagonal(matrix - low) < 1e-9)
    assert len(pivots) == 20
    for row in range(90):
        others = pivots[pivots // size != row // size]
        explained = matrix[row, others] @ np.linalg.solve(matrix[np.ix_(others, others)], matrix[others, row])
        assert part.unexplained[row] == pytest.approx(matrix[row, row] - explained, rel=1e-6, abs=1e-9)


def test_a_wrong_guess_costs_accuracy_and_no_bias():
    """A diagonal kernel: residuals are known. The guess is opposite to them, and the mean over 100 samples is right."""
    ridge, diagonal = 0.5, np.linspace(1.0, 2.0, 40)
    solved = np.linspace(0.1, 1.0, 40)[:, None]
    shape, ones = (40, 1, 1), np.ones((40, 1))
    targets = ShiftedSolution(solved, np.zeros(1), 1, 0.0 * ones)
    guessed = solved[::-1].reshape(shape)
    errors = []
    for seed in range(100):
        sample = sampled_examples(guessed, 8, seed)
        units = unit_vectors(40, sample.examples, 1) / (diagonal + ridge)[:, None]
        exact = ShiftedSolution(units, np.zeros(8), 1, 0.0 * units)
        found = estimate_leave_one_out(guessed, guessed, targets, exact, sample, ridge)
        own = sample.examples
        np.testing.assert_allclose(found.residuals[own, 0, 0], solved[own, 0] * (diagonal[own] + ridge), rtol=1e-12)
        errors.append(found.error)
    truth = np.square(solved[:, 0] * (diagonal + ridge)).mean()
    assert abs(np.mean(errors) - truth) < 4 * np.std(errors) / 10
