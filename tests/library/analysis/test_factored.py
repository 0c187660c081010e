"""Spectrum and regression from a kernel's factor against the dense methods on the same kernel, and refusals."""

import numpy as np
import pytest

from nntk_dist.analysis import FactoredRidge, FactoredSpectrum, KernelForms, ridge
from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.analysis.kernel_forms import IndefiniteFactor
from nntk_dist.analysis.spectra.dense import kernel_spectrum
from nntk_dist.errors import NNTKError
from nntk_dist.products.factor_form import FactorForm, unbiased_metric

RIDGES = (1e-6, 1e-3, 0.5)


def in_blocks(matrix, examples, step):
    """A matrix whose rows are read `step` examples at a time."""
    width = len(matrix) // examples
    intervals = tuple((start, min(start + step, examples)) for start in range(0, examples, step))
    return FactorRows(
        len(matrix), matrix.shape[1], intervals, lambda own: matrix[own[0] * width : own[1] * width].copy()
    )


def spectrum(rows, top_k):
    return FactoredSpectrum().solve(KernelForms(factor=lambda: rows), top_k=top_k)


def factored(*arguments, **options):
    return ridge(*arguments, solver=FactoredRidge(), **options)


def factor(num_rows, num_columns, seed=0):
    """Rows whose kernel has eigenvalues that span six decades."""
    generator = np.random.default_rng(seed)
    scales = np.geomspace(1.0, 1e-3, num_columns)
    return generator.standard_normal((num_rows, num_columns)) * scales


@pytest.mark.parametrize("num_columns", [12, 40, 64], ids=["narrow", "square", "wide"])
def test_the_spectrum_is_that_of_the_kernel(num_columns):
    matrix = factor(40, num_columns)
    found = spectrum(in_blocks(matrix, 40, 7), top_k=5)
    expected = kernel_spectrum(matrix @ matrix.T, top_k=5)
    rounding = 64 * np.finfo(np.float64).eps * expected.eigenvalues[0]
    every = np.concatenate([found.eigenvalues, np.zeros(found.num_zeros)])
    np.testing.assert_allclose(every, expected.eigenvalues, rtol=0, atol=rounding)
    np.testing.assert_allclose(found.eigenvectors, expected.eigenvectors, rtol=0, atol=1e-10)
    assert found.num_zeros == max(0, 40 - num_columns)
    assert found.numbers()["trace"] == pytest.approx(np.square(matrix).sum(), rel=1e-12)
    assert found.participation_ratio == pytest.approx(expected.participation_ratio, rel=1e-10)
    if num_columns < 40:
        assert found.condition_number == np.inf
        assert found.numbers()["smallest_eigenvalue"] == 0.0


def test_vectors_of_eigenvalues_that_are_zero_to_rounding_are_left_out():
    matrix = factor(30, 3) @ np.random.default_rng(1).standard_normal((3, 8))
    assert spectrum(in_blocks(matrix, 30, 30), top_k=6).eigenvectors.shape == (30, 3)


@pytest.mark.parametrize("num_columns", [6, 80], ids=["narrow", "wide"])
def test_the_spectrum_of_an_indefinite_metric(num_columns):
    generator = np.random.default_rng(3)
    features, metric = generator.standard_normal((25, num_columns)), generator.standard_normal((2, 2))
    metric = metric + metric.T
    kernel = features @ np.kron(np.eye(num_columns // 2), metric) @ features.T
    forms = KernelForms(indefinite=lambda: IndefiniteFactor(in_blocks(features, 25, 9), metric))
    found = FactoredSpectrum().solve(forms, top_k=5)
    expected = np.linalg.eigvalsh(kernel)[::-1]
    every = np.sort(np.concatenate([found.eigenvalues, np.zeros(found.num_zeros)]))[::-1]
    np.testing.assert_allclose(every, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert found.negative_mass > 0.05


def problem_of(num_train, num_test, kind, seed=5):
    """Labels of three classes, or three float columns with an offset."""
    generator = np.random.default_rng(seed)
    if kind == "labels":
        return {"targets": generator.integers(0, 3, num_train), "test_targets": generator.integers(0, 3, num_test)}
    return {
        "targets": generator.standard_normal((num_train, 3)),
        "test_targets": generator.standard_normal((num_test, 3)),
        "offset": generator.standard_normal((num_train, 3)),
        "test_offset": generator.standard_normal((num_test, 3)),
    }


@pytest.mark.parametrize("kind", ["labels", "floats"])
@pytest.mark.parametrize("num_columns", [12, 200], ids=["narrow", "wide"])
@pytest.mark.parametrize("width", [1, 3], ids=["trace", "full"])
def test_regression_is_that_of_the_kernel(kind, num_columns, width):
    train, test = factor(30 * width, num_columns), factor(11 * width, num_columns, seed=1)
    arguments = problem_of(30, 11, kind)
    targets, test_targets = arguments.pop("targets"), arguments.pop("test_targets")
    options = {"ridges": RIDGES, **arguments}
    found = factored(in_blocks(train, 30, 8), targets, in_blocks(test, 11, 4), test_targets, **options)
    expected = ridge(train @ train.T, targets, test @ train.T, test_targets, **options)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-7, atol=1e-7)
    for row, other in zip(found.rows, expected.rows, strict=True):
        numbers, wanted = row.numbers(), other.numbers()
        assert wanted.pop("rounding_error") < 1e-6
        assert numbers.keys() == wanted.keys()
        for name, value in wanted.items():
            assert numbers[name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
    if kind == "labels":
        np.testing.assert_array_equal(found.labels, expected.labels)


def test_small_ridges_survive_where_float32_would_lose_them():
    """A ridge of 1e-9 times the largest eigenvalue; the rows were stored in float32 and share a large mean."""
    generator = np.random.default_rng(2)
    rows = (1.0 + 0.05 * generator.standard_normal((400, 24))).astype(np.float32).astype(np.float64)
    arguments = problem_of(400, 5, "labels")
    targets, test_targets, ridges = arguments["targets"], arguments["test_targets"], (1e-9 * 400,)
    found = factored(in_blocks(rows, 400, 90), targets, in_blocks(rows[:5], 5, 5), test_targets, ridges=ridges)
    expected = ridge(rows @ rows.T, targets, rows[:5] @ rows.T, test_targets, ridges=ridges)
    assert found.selected.loo_error == pytest.approx(expected.selected.loo_error, rel=1e-6)
    single = rows.astype(np.float32)
    error = np.abs(np.linalg.eigvalsh(single.T @ single) - np.linalg.eigvalsh(rows.T @ rows)).max()
    assert error > 10 * expected.selected.absolute_ridge  # the result of float32 sums


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["differences", "sketch", "shared sketch"])
def test_rows_of_the_factor_make_the_kernel(kind, full):
    """By explicit sums over draws or blocks, and outputs."""
    generator = np.random.default_rng(4)
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    if kind == "differences":
        axes, shape = ("draw", "output"), (6, 3)
        half = generator.standard_normal((6, 4))  # of rank 4
        metric = half @ half.T
    else:
        axes, shape = ("block", "output", "column"), (4, 3, 5)
        metric = np.full((4, 4), 1 / 16)
    if kind == "shared sketch":
        if full:
            pytest.skip("one sketch for all outputs is of the trace")
        axes, shape = ("block", "column"), (4, 5)
    features = generator.standard_normal((7, *shape))
    form = FactorForm(axes, shape, full)
    rows = form.rows(features, form.root(metric))
    with_outputs = features[:, :, None] if kind == "shared sketch" else features
    with_columns = with_outputs[..., None] if kind == "differences" else with_outputs
    entries = np.einsum("isck,st,jtdk->icjd", with_columns, metric, with_columns)
    expected = entries.reshape(21, 21) if full else np.einsum("icjc->ij", entries)
    np.testing.assert_allclose(rows @ rows.T, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    assert len(rows) == 7 * form.rows_per_example
    assert rows.shape[1] == (4 * form.num_columns // 6 if kind == "differences" else form.num_columns)


def test_a_diagonal_metric_has_a_diagonal_root():
    metric = np.diag([4.0, 9.0])
    np.testing.assert_array_equal(FactorForm(("draw", "output"), (2, 1), False).root(metric), np.diag([2.0, 3.0]))


def test_the_unbiased_metric_leaves_out_products_within_a_block():
    generator = np.random.default_rng(6)
    vectors, differences = generator.standard_normal((6, 4)), generator.standard_normal((5, 6))
    blocks = differences.reshape(5, 3, 2)[..., None] * vectors.reshape(3, 2, 4)
    means = blocks.mean(axis=2)  # (5, 3, 4)
    expected = sum(means[:, r] @ means[:, q].T for r in range(3) for q in range(3) if r != q) / 6
    metric = unbiased_metric(vectors @ vectors.T / 36, 3)
    np.testing.assert_allclose(differences @ metric @ differences.T, expected, rtol=1e-12, atol=1e-12)


def call(**changes):
    given = {"train": factor(20, 6), "test": factor(9, 6, seed=1), "ridges": (0.1,)} | changes
    problem, test = problem_of(20, 9, "labels"), given["test"]
    train, test = in_blocks(given["train"], 20, 6), in_blocks(test, len(test), 4)
    return factored(train, problem["targets"], test, problem["test_targets"], ridges=given["ridges"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ridges": ()}, "allowed: one or more positive numbers"),
        ({"ridges": (1e-18,)}, "indefinite or nearly singular at ridge 1e-18"),
        ({"train": np.zeros((20, 6))}, "mean diagonal is 0"),
        ({"train": np.full((20, 6), np.nan)}, "the kernel's factor holds values that are NaN or infinite"),
        ({"train": factor(40, 6)}, "train kernel has 40 rows and the targets 20 examples"),
        ({"test": factor(8, 6)}, "the test factor has 8 rows and test_targets 9 examples; it needs 1 row"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(NNTKError, match=message):
        call(**changes)
