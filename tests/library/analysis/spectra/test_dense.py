"""The spectrum against constructed matrices whose eigenvalues are known, and its refusals."""

import numpy as np
import pytest
from scipy.stats import ortho_group

from nntk_dist.analysis import Spectrum
from nntk_dist.analysis.spectra.dense import kernel_spectrum
from nntk_dist.errors import NNTKError


def with_eigenvalues(eigenvalues, seed=0):
    basis = ortho_group.rvs(len(eigenvalues), random_state=seed)
    matrix = (basis * np.asarray(eigenvalues, dtype=float)) @ basis.T
    return (matrix + matrix.T) / 2, basis


def test_known_eigenvalues_and_vectors_come_back_in_descending_order():
    known = np.array([-0.5, 9.0, 0.25, 4.0, 1.0])
    matrix, basis = with_eigenvalues(known)
    spectrum = kernel_spectrum(matrix, top_k=2)
    np.testing.assert_allclose(spectrum.eigenvalues, [9.0, 4.0, 1.0, 0.25, -0.5], atol=1e-13)
    assert spectrum.eigenvectors.shape == (5, 2)
    overlap = np.abs(spectrum.eigenvectors.T @ basis[:, [1, 3]])
    np.testing.assert_allclose(overlap, np.eye(2), atol=1e-12)


def test_signs_of_eigenvectors_are_fixed_by_their_largest_component():
    spectrum = kernel_spectrum(with_eigenvalues([5.0, 3.0, 2.0, 1.0], seed=4)[0], top_k=4)
    peaks = np.abs(spectrum.eigenvectors).argmax(axis=0)
    assert (spectrum.eigenvectors[peaks, range(4)] > 0).all()


@pytest.mark.parametrize(("top_k", "expected"), [(0, 0), (3, 3), (50, 4)])
def test_top_k_limits_the_vectors_only(top_k, expected):
    spectrum = kernel_spectrum(np.diag([4.0, 3.0, 2.0, 1.0]), top_k=top_k)
    assert spectrum.eigenvectors.shape == (4, expected)
    np.testing.assert_allclose(spectrum.eigenvalues, [4.0, 3.0, 2.0, 1.0])


def test_derived_numbers_of_equal_eigenvalues_count_them():
    spectrum = Spectrum(np.array([2.0, 2.0, 2.0, 0.0]), np.empty((4, 0)))
    assert spectrum.trace == 6.0
    assert spectrum.participation_ratio == pytest.approx(3.0)
    assert spectrum.effective_rank == pytest.approx(3.0)
    assert spectrum.condition_number == float("inf")
    assert spectrum.negative_mass == 0.0


def test_derived_numbers_of_an_indefinite_kernel():
    spectrum = Spectrum(np.array([3.0, 1.0, -1.0]), np.empty((3, 0)))
    assert spectrum.negative_mass == pytest.approx(1 / 5)
    assert spectrum.condition_number == pytest.approx(3.0)
    assert spectrum.participation_ratio == pytest.approx(9 / 11)
    shares = np.array([3, 1, 1]) / 5
    assert spectrum.effective_rank == pytest.approx(np.prod(shares**-shares))
    assert spectrum.numbers()["smallest_eigenvalue"] == -1.0


def test_the_zero_kernel_has_rank_zero():
    numbers = kernel_spectrum(np.zeros((3, 3))).numbers()
    assert numbers["participation_ratio"] == numbers["effective_rank"] == numbers["negative_mass"] == 0.0


def test_float32_rounding_is_not_taken_for_asymmetry():
    generator = np.random.default_rng(0)
    features = generator.standard_normal((40, 300)).astype(np.float32)
    matrix = features @ features.T
    matrix[3, 7] *= np.float32(1 + 1e-6)
    expected = np.linalg.svd(features.astype(np.float64), compute_uv=False) ** 2
    np.testing.assert_allclose(kernel_spectrum(matrix).eigenvalues, expected, rtol=1e-4)


def test_refuses_a_kernel_that_is_not_square():
    with pytest.raises(NNTKError, match=r"shape \(2, 3\); it must be a square matrix"):
        kernel_spectrum(np.zeros((2, 3)))
    with pytest.raises(NNTKError, match=r"shape \(0, 0\)"):
        kernel_spectrum(np.zeros((0, 0)))


def test_refuses_nan_and_says_where_even_beyond_the_first_stripe():
    matrix = np.eye(1100)
    matrix[1050, 3] = matrix[1050, 4] = np.nan
    with pytest.raises(NNTKError, match=r"holds 2 values that are NaN or infinite, the first at \(1050, 3\)"):
        kernel_spectrum(matrix)


def test_refuses_an_asymmetric_kernel_and_says_where():
    matrix = np.eye(1100)
    matrix[1050, 2] = 0.5
    with pytest.raises(NNTKError, match=r"not symmetric: entries \(2, 1050\) and \(1050, 2\) differ by 0.5"):
        kernel_spectrum(matrix)


def test_refuses_a_negative_number_of_vectors():
    with pytest.raises(NNTKError, match="top_k is -1; allowed: 0"):
        kernel_spectrum(np.eye(2), top_k=-1)
