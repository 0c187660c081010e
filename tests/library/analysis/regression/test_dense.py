"""Kernel ridge regression against scikit-learn, and leave-one-out against explicit refits; its refusals."""

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from nntk_dist.analysis import ridge as ridge_regression
from nntk_dist.analysis.regression.dense import fit_ridge_path
from nntk_dist.errors import NNTKError

RIDGES = (1e-3, 0.05, 2.0)


@pytest.fixture
def problem():
    """24 train and 9 test points, a linear-plus-RBF kernel, three classes, three float columns, an offset."""
    generator = np.random.default_rng(7)
    points = generator.standard_normal((33, 4))
    squared = np.square(points[:, None] - points[None]).sum(axis=-1)
    kernel = np.exp(-squared / 4) + 0.1 * points @ points.T
    floats = np.tanh(points[:, :3]) + 0.1 * generator.standard_normal((33, 3))
    return {
        "kernel": kernel[:24, :24],
        "test_kernel": kernel[24:, :24],
        "floats": (floats[:24], floats[24:]),
        "labels": (floats[:24].argmax(axis=1), floats[24:].argmax(axis=1)),
        "offset": (0.3 * points[:24, 1:], 0.3 * points[24:, 1:]),
    }


def refit(kernel, targets, absolute_ridge, test_kernel):
    model = KernelRidge(alpha=absolute_ridge, kernel="precomputed").fit(kernel, targets)
    return model.predict(test_kernel)


def test_every_ridge_agrees_with_scikit_learn(problem):
    train, test = problem["floats"]
    result = ridge_regression(problem["kernel"], train, problem["test_kernel"], test, ridges=RIDGES)
    for row in result.rows:
        assert row.absolute_ridge == pytest.approx(row.ridge * np.trace(problem["kernel"]) / 24)
        predicted = refit(problem["kernel"], train, row.absolute_ridge, problem["test_kernel"])
        fitted = refit(problem["kernel"], train, row.absolute_ridge, problem["kernel"])
        assert row.test_error == pytest.approx(np.mean((predicted - test) ** 2), rel=1e-9)
        assert row.train_error == pytest.approx(np.mean((fitted - train) ** 2), rel=1e-9)
        assert row.loo_accuracy is None
        assert row.test_accuracy is None
        if row.selected:
            np.testing.assert_allclose(result.scores, predicted, rtol=1e-9)
    assert result.labels is None


def test_leave_one_out_equals_a_refit_without_each_example(problem):
    kernel, (labels, _) = problem["kernel"], problem["labels"]
    one_hot = np.eye(3)[labels]
    result = ridge_regression(kernel, labels, problem["test_kernel"], problem["labels"][1], ridges=RIDGES)
    for row in result.rows:
        left_out = np.empty((24, 3))
        for i in range(24):
            rest = np.delete(np.arange(24), i)
            left_out[i] = refit(kernel[np.ix_(rest, rest)], one_hot[rest], row.absolute_ridge, kernel[i : i + 1, rest])
        assert row.loo_error == pytest.approx(np.mean((left_out - one_hot) ** 2), rel=1e-8)
        assert row.loo_accuracy == np.mean(left_out.argmax(axis=1) == labels)
    assert 0 < result.selected.loo_accuracy <= 1


def test_selection_takes_the_least_leave_one_out_error(problem):
    result = ridge_regression(
        problem["kernel"], problem["floats"][0], problem["test_kernel"], problem["floats"][1], ridges=RIDGES
    )
    assert result.selected.loo_error == min(row.loo_error for row in result.rows)
    assert [row.selected for row in result.rows].count(True) == 1
    assert [row.ridge for row in result.rows] == list(RIDGES)


def test_equal_errors_select_the_larger_ridge():
    path = fit_ridge_path(np.eye(4), np.zeros((4, 1)), (0.1, 3.0, 1.0))
    assert path.ridges[path.selected] == 3.0


def test_classification_predicts_labels_from_one_hot_targets(problem):
    (labels, test_labels), kernel = problem["labels"], problem["kernel"]
    result = ridge_regression(kernel, labels, problem["test_kernel"], test_labels, ridges=(0.05,), num_classes=5)
    expected = refit(kernel, np.eye(5)[labels], result.selected.absolute_ridge, problem["test_kernel"])
    np.testing.assert_allclose(result.scores, expected, atol=1e-12)
    np.testing.assert_array_equal(result.labels, expected.argmax(axis=1))
    assert result.selected.test_accuracy == np.mean(expected.argmax(axis=1) == test_labels)


def test_offset_is_fitted_around_and_added_back(problem):
    (train, test), (offset, test_offset) = problem["floats"], problem["offset"]
    result = ridge_regression(
        problem["kernel"], train, problem["test_kernel"], test, ridges=(0.05,), offset=offset, test_offset=test_offset
    )
    row = result.selected
    expected = refit(problem["kernel"], train - offset, row.absolute_ridge, problem["test_kernel"]) + test_offset
    np.testing.assert_allclose(result.scores, expected, atol=1e-12)
    fitted = refit(problem["kernel"], train - offset, row.absolute_ridge, problem["kernel"]) + offset
    assert row.train_error == pytest.approx(np.mean((fitted - train) ** 2), rel=1e-9)


def full_problem(problem):
    """A kernel of form full: correlated outputs, row index i·C + c, and targets (n, C)."""
    mixing = np.array([[1.0, 0.6, 0.1], [0.6, 1.5, 0.3], [0.1, 0.3, 0.8]])
    return np.kron(problem["kernel"], mixing), np.kron(problem["test_kernel"], mixing), *problem["floats"]


def test_full_form_flattens_targets_with_the_example_first(problem):
    kernel, test_kernel, train, test = full_problem(problem)
    result = ridge_regression(kernel, train, test_kernel, test, ridges=(0.05,))
    expected = refit(kernel, train.reshape(-1), result.selected.absolute_ridge, test_kernel).reshape(9, 3)
    np.testing.assert_allclose(result.scores, expected, atol=1e-12)


def test_full_form_leaves_out_all_outputs_of_an_example(problem):
    kernel, test_kernel, train, test = full_problem(problem)
    row = ridge_regression(kernel, train, test_kernel, test, ridges=(0.05,)).selected
    left_out = np.empty_like(train)
    for i in range(24):
        own = np.arange(3 * i, 3 * i + 3)
        rest = np.delete(np.arange(72), own)
        flat = train.reshape(-1)[rest]
        left_out[i] = refit(kernel[np.ix_(rest, rest)], flat, row.absolute_ridge, kernel[np.ix_(own, rest)])
    assert row.loo_error == pytest.approx(np.mean((left_out - train) ** 2), rel=1e-8)


def test_an_uncorrelated_full_kernel_gives_the_shared_kernel_result(problem):
    train, test = problem["floats"]
    shared = ridge_regression(problem["kernel"], train, problem["test_kernel"], test, ridges=RIDGES)
    full = ridge_regression(
        np.kron(problem["kernel"], np.eye(3)), train, np.kron(problem["test_kernel"], np.eye(3)), test, ridges=RIDGES
    )
    np.testing.assert_allclose(full.scores, shared.scores, atol=1e-11)
    for row, other in zip(full.rows, shared.rows, strict=True):
        assert row.loo_error == pytest.approx(other.loo_error, rel=1e-9)


def call(problem, **changes):
    arguments = {
        "kernel": problem["kernel"],
        "targets": problem["floats"][0],
        "test_kernel": problem["test_kernel"],
        "test_targets": problem["floats"][1],
        "ridges": RIDGES,
    } | changes
    return ridge_regression(**arguments)


def test_refuses_an_indefinite_kernel_and_the_ridge_it_names_is_accepted(problem):
    kernel = problem["kernel"] - 0.2 * np.eye(24)  # as the noise of the unbiased statistic can do
    with pytest.raises(NNTKError, match=r"indefinite or nearly singular at ridge 0\.05.*'statistic: plugin'") as error:
        call(problem, kernel=kernel)
    needed = float(str(error.value).rsplit(" ", 1)[1])
    assert call(problem, kernel=kernel, ridges=(needed,)).selected.ridge == needed
    with pytest.raises(NNTKError, match="indefinite or nearly singular"):
        call(problem, kernel=kernel, ridges=(0.9 * needed,))


def test_refuses_a_singular_kernel_with_a_ridge_lost_in_rounding(problem):
    features = problem["floats"][0]
    with pytest.raises(NNTKError, match="nearly singular at ridge 1e-16"):
        call(problem, kernel=features @ features.T, ridges=(1e-16, 1e-2))


def test_refuses_a_kernel_without_positive_trace(problem):
    with pytest.raises(NNTKError, match="mean diagonal is 0; a ridge is relative to it"):
        call(problem, kernel=np.zeros((24, 24)))


@pytest.mark.parametrize("ridges", [(), (0.0,), (0.1, -1.0), (float("nan"),)])
def test_refuses_ridges_that_are_not_positive(problem, ridges):
    with pytest.raises(NNTKError, match="allowed: one or more positive numbers, relative to tr K / n"):
        call(problem, ridges=ridges)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": np.zeros((20, 3))}, "train kernel has 24 rows and the targets 20 examples of 3"),
        (
            {"targets": np.zeros((24, 3), int), "test_targets": np.zeros(9, int)},
            r"targets are integers of shape \(24, 3\)",
        ),
        ({"targets": np.full((24, 3), np.nan)}, "targets holds 72 values that are NaN"),
        ({"targets": np.zeros((24, 3, 1))}, r"targets have shape \(24, 3, 1\); allowed"),
        ({"test_targets": np.zeros(9, int)}, "must be of one kind"),
        ({"test_targets": np.zeros((8, 3))}, r"test_targets have shape \(8, 3\).*call for \(9, 3\)"),
        ({"test_kernel": np.zeros((9, 23))}, r"test kernel has shape \(9, 23\); it needs 24 columns"),
        ({"test_kernel": np.full((9, 24), np.inf)}, r"test kernel holds 216 values .* first at \(0, 0\)"),
        ({"offset": np.zeros((24, 3))}, "offset and test_offset must be given together"),
        ({"offset": np.zeros((24, 2)), "test_offset": np.zeros((9, 3))}, r"offset has shape \(24, 2\)"),
        ({"offset": np.zeros((24, 3)), "test_offset": np.zeros((9, 1))}, r"test_offset has shape \(9, 1\)"),
        ({"kernel": np.full((24, 24), np.nan)}, "the kernel holds 576 values that are NaN"),
    ],
)
def test_refuses_arguments_that_do_not_fit(problem, changes, message):
    with pytest.raises(NNTKError, match=message):
        call(problem, **changes)


def test_refuses_labels_outside_the_classes(problem):
    labels, test_labels = problem["labels"]
    with pytest.raises(NNTKError, match="labels outside 0 … num_classes − 1, num_classes = 2"):
        call(problem, targets=labels, test_targets=test_labels, num_classes=2)
    with pytest.raises(NNTKError, match="test_targets hold labels outside"):
        call(problem, targets=labels, test_targets=test_labels - 1)
