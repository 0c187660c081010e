"""Rounding of stored entries: the stated error covers the actual one, and a stored factor removes it."""

import re
import warnings

import numpy as np
import pytest

from nntk_dist import NNTKWarning
from nntk_dist.analysis import ConjugateGradients, DenseRidge, KernelForms, ridge
from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.errors import NNTKError

NUM_TRAIN, NUM_TEST = 151, 100


def problem(kind, seed):
    """A factor W, train then test rows, and targets of three columns."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((NUM_TRAIN + NUM_TEST, 32))
    if kind == "one direction dominates":
        factor[:, 0] = 30.0
    if kind == "rows of many scales":
        factor *= np.exp(0.7 * rng.standard_normal((len(factor), 1)))
    return factor, np.tanh(factor[:, 1:4]) + 0.1 * rng.standard_normal((len(factor), 3))


def given(kernel, targets, width=1):
    """Arguments of `ridge` from a kernel of all rows."""
    train = NUM_TRAIN * width
    return kernel[:train, :train], targets[:NUM_TRAIN], kernel[train:, :train], targets[NUM_TRAIN:]


def relative_rms(values, targets):
    return np.sqrt(np.square(values).mean() / np.square(targets[:NUM_TRAIN]).mean())


@pytest.mark.filterwarnings("ignore:rounding of the kernel", "ignore:the leave-one-out error at ridge")
@pytest.mark.parametrize(
    "solver", [DenseRidge(), ConjugateGradients(tolerance=1e-9, rank=60)], ids=["dense", "iterative"]
)
@pytest.mark.parametrize("kind", ["plain", "one direction dominates", "rows of many scales"])
def test_the_stated_error_covers_the_actual_one(kind, solver):
    """Predictions against a solve of the kernel before it was rounded: within the stated error, and not ten below."""
    for seed, relative in enumerate((1e-3, 1e-4, 1e-5)):
        factor, targets = problem(kind, seed)
        kernel = factor @ factor.T
        exact = ridge(*given(kernel, targets), ridges=[relative])
        found = ridge(*given(kernel.astype(np.float32), targets), ridges=[relative], solver=solver)
        error = relative_rms(found.scores - exact.scores, targets)
        assert 1e-6 < error < found.selected.rounding_error < 10 * error
        assert exact.selected.rounding_error < 1e-3 * error


def test_the_stated_error_of_the_full_form():
    factor, targets = problem("plain", 0)
    mixing = np.random.default_rng(1).standard_normal((3, 3))
    kernel = np.kron(factor @ factor.T, mixing @ mixing.T + np.eye(3))
    exact = ridge(*given(kernel, targets, 3), ridges=[1e-3])
    found = ridge(*given(kernel.astype(np.float32), targets, 3), ridges=[1e-3])
    error = relative_rms(found.scores - exact.scores, targets)
    assert error < found.selected.rounding_error < 10 * error


def rows_of(factor):
    return FactorRows(len(factor), factor.shape[1], ((0, 70), (70, len(factor))), lambda part: factor[slice(*part)])


def forms(kernel, factor):
    return KernelForms(matrix=lambda: kernel.astype(np.float32), factor=lambda: rows_of(factor))


@pytest.mark.parametrize("relative", [1e-3, 1e-4])
def test_a_stored_factor_removes_the_rounding(relative):
    """The oracle solves in the space of the factor's columns, W(WᵀW + μ)⁻¹, without the kernel."""
    factor, targets = (part.astype(np.float32).astype(np.float64) for part in problem("one direction dominates", 0))
    train, test = factor[:NUM_TRAIN], factor[NUM_TRAIN:]
    kernels = forms(train @ train.T, train), forms(test @ train.T, test)
    found = ridge(kernels[0], targets[:NUM_TRAIN], kernels[1], targets[NUM_TRAIN:], ridges=[relative])
    absolute = relative * np.square(train).sum() / NUM_TRAIN
    weights = np.linalg.solve(train.T @ train + absolute * np.eye(32), train.T @ targets[:NUM_TRAIN])
    np.testing.assert_allclose(found.scores, test @ weights, rtol=0, atol=1e-9)
    assert found.selected.rounding_error < 1e-8


def test_a_wide_factor_is_not_multiplied():
    """A factor of more than 3n columns would take more memory than the decomposition; stored entries are used."""
    wide = np.random.default_rng(0).standard_normal((NUM_TRAIN + NUM_TEST, 3 * NUM_TRAIN + 1))
    train, test = (
        forms(wide[:NUM_TRAIN] @ wide[:NUM_TRAIN].T, wide[:NUM_TRAIN]),
        forms(wide[NUM_TRAIN:] @ wide[:NUM_TRAIN].T, wide),
    )
    targets = problem("plain", 0)[1]
    found = ridge(train, targets[:NUM_TRAIN], test, targets[NUM_TRAIN:], ridges=[1.0]).selected
    assert found.rounding_error > 1e-8


def test_notable_rounding_is_warned_of_and_refusals_name_it():
    factor, targets = problem("one direction dominates", 0)
    kernel = (factor @ factor.T).astype(np.float32)
    with pytest.warns(
        NNTKWarning, match=r"moves predictions at ridge 1e-05 by up to about \S+ % .* the factored solver"
    ):
        ridge(*given(kernel, targets), ridges=[1e-5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ridge(*given(kernel, targets), ridges=[1e-1])
    message = "use a kernel in float64 (the entries are rounded) or ridges of at least"
    with pytest.raises(NNTKError, match=re.escape(message)):
        ridge(*given(kernel, targets), ridges=[1e-9])


def test_a_leave_one_out_error_that_is_hardly_known_is_warned_of():
    factor, targets = problem("rows of many scales", 0)
    with pytest.warns(NNTKWarning, match=r"has a standard error of \S+; raise rank or num_sampled"):
        ridge(*given(factor @ factor.T, targets), ridges=[1e-4], solver=ConjugateGradients(rank=2, num_sampled=1))
