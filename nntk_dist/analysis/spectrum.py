"""The spectrum of a kernel that fits in memory: every eigenvalue, the leading eigenvectors, and what they say.

Works on plain arrays by LAPACK, in float64. It reads no store and takes no approximation: a kernel too large for a
dense decomposition does not belong here.

Axes: n rows of the kernel, k leading eigenvectors. Eigenvalues are in descending order (with their sign) throughout.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Float

from nntk_dist.errors import NNTKError

_ASYMMETRY_ALLOWED = 1e-5  # of the largest entry: a few hundred float32 roundings; any real mistake is far above
_ROWS_PER_CHECK = 1024  # the checks below go by row stripes: their temporaries stay small beside the kernel


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues `λ_1 ≥ … ≥ λ_n` of a symmetric kernel and its leading eigenvectors, in the kernel's own units.

    `num_zeros` further eigenvalues are 0, and not listed: of a kernel that is known to have a lower rank. The derived
    numbers hold for indefinite kernels too (the unbiased statistic is one); each says what it means then.
    """

    eigenvalues: Float[np.ndarray, " n"]
    eigenvectors: Float[np.ndarray, "n k"]
    num_zeros: int = 0

    @property
    def trace(self) -> float:
        """`Σ λ_i`, the sum of the kernel's diagonal."""
        return float(self.eigenvalues.sum())

    @property
    def participation_ratio(self) -> float:
        """`(Σ λ_i)² / Σ λ_i²`: how many equal eigenvalues would spread the trace as widely; 0 for the zero kernel."""
        squares = float(np.square(self.eigenvalues).sum())
        return self.trace**2 / squares if squares > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """`exp(−Σ p_i ln p_i)`, `p_i = |λ_i| / Σ|λ|`, between 1 and n; 0 for the zero kernel (Roy & Vetterli 2007)."""
        magnitudes = np.abs(self.eigenvalues[self.eigenvalues != 0])
        shares = magnitudes / magnitudes.sum()
        return float(np.exp(-(shares * np.log(shares)).sum())) if shares.size else 0.0

    @property
    def condition_number(self) -> float:
        """`max|λ| / min|λ|`, infinite where an eigenvalue is 0; beyond 1e16/n the kernel is singular to rounding."""
        magnitudes = np.abs(self.eigenvalues)
        smallest = 0.0 if self.num_zeros else float(magnitudes.min())
        return float(magnitudes.max()) / smallest if smallest > 0 else float("inf")

    @property
    def negative_mass(self) -> float:
        """`Σ_{λ<0} |λ| / Σ|λ|`, in [0, 1/2] where the trace is positive: rounding for a positive semidefinite kernel,
        noise for the unbiased statistic.
        """
        total = float(np.abs(self.eigenvalues).sum())
        return float(np.abs(self.eigenvalues[self.eigenvalues < 0]).sum()) / total if total > 0 else 0.0

    def numbers(self) -> dict[str, float]:
        """The derived numbers by name, for tables and reports."""
        return {
            "trace": self.trace,
            "largest_eigenvalue": float(self.eigenvalues[0]),
            "smallest_eigenvalue": min(float(self.eigenvalues[-1]), 0.0 if self.num_zeros else np.inf),
            "participation_ratio": self.participation_ratio,
            "effective_rank": self.effective_rank,
            "condition_number": self.condition_number,
            "negative_mass": self.negative_mass,
        }


def kernel_spectrum(kernel: Float[np.ndarray, "n n"], *, top_k: int = 50) -> Spectrum:
    """All eigenvalues of a symmetric kernel and the eigenvectors of its `top_k` largest (by sign, not by magnitude).

    Each eigenvector has unit length and its largest component positive, so that repeated runs give the same signs.
    `top_k` above n means n. Cost: two reductions to tridiagonal form, about 8n³/3 operations, and 2n² float64 values
    beside the input: less than one decomposition with all n eigenvectors.

    Raises:
        NNTKError: `top_k` is negative, or `kernel` is not a finite, square, symmetric matrix.
    """
    if top_k < 0:
        raise NNTKError(f"top_k is {top_k}; allowed: 0 (eigenvalues only) or more")
    matrix = check_symmetric(kernel)
    num_rows = len(matrix)
    eigenvalues = scipy.linalg.eigvalsh(matrix)[::-1].copy()
    num_vectors = min(top_k, num_rows)
    if num_vectors == 0:
        return Spectrum(eigenvalues, np.empty((num_rows, 0)))
    _, vectors = scipy.linalg.eigh(matrix, subset_by_index=(num_rows - num_vectors, num_rows - 1))
    vectors = vectors[:, ::-1]
    peaks = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None, :], axis=0)
    return Spectrum(eigenvalues, vectors * np.sign(peaks))


def check_symmetric(kernel: Float[np.ndarray, "n n"], what: str = "the kernel") -> Float[np.ndarray, "n n"]:
    """`kernel` as float64, after checking that it is a finite, square matrix, symmetric but for float32 rounding.

    LAPACK reads one triangle only: an asymmetric matrix would silently give the spectrum of another one.

    Raises:
        NNTKError: it is not; the message says where.
    """
    matrix = np.asarray(kernel, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise NNTKError(f"{what} has shape {matrix.shape}; it must be a square matrix with at least one row")
    largest, asymmetry, where = 0.0, 0.0, (0, 0)
    for start in range(0, len(matrix), _ROWS_PER_CHECK):
        rows = matrix[start : start + _ROWS_PER_CHECK]
        check_finite(rows, what, first_row=start)
        difference = np.abs(rows - matrix[:, start : start + _ROWS_PER_CHECK].T)
        row, column = np.unravel_index(difference.argmax(), difference.shape)
        if difference[row, column] > asymmetry:
            asymmetry, where = float(difference[row, column]), (start + int(row), int(column))
        largest = max(largest, float(np.abs(rows).max()))
    if asymmetry > _ASYMMETRY_ALLOWED * largest:
        raise NNTKError(
            f"{what} is not symmetric: entries {where} and {where[::-1]} differ by {asymmetry:.3g} "
            f"(largest entry {largest:.3g}); pass a train-by-train kernel, computed once for each pair"
        )
    return matrix


def check_finite(matrix: Float[np.ndarray, "n m"], what: str, *, first_row: int = 0) -> None:
    """Refuse NaN and infinity.

    Raises:
        NNTKError: naming the number of bad entries and the first of them (`first_row` is added to its row).
    """
    bad = ~np.isfinite(matrix)
    if bad.any():
        row, *rest = (int(index) for index in np.argwhere(bad)[0])
        raise NNTKError(
            f"{what} holds {int(bad.sum())} values that are NaN or infinite, the first at {(first_row + row, *rest)}; "
            "check that the run finished (NaN marks tiles not yet written) and that the model's outputs are finite"
        )
