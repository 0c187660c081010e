"""The spectrum of a kernel that fits in memory, by LAPACK in float64: every eigenvalue and the leading eigenvectors.

Axes: n rows of the kernel, k leading eigenvectors.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.linalg
from jaxtyping import Float

from nntk_dist.analysis.checks import check_symmetric
from nntk_dist.analysis.kernel_forms import KernelForms, Needs
from nntk_dist.analysis.solvers import Cost, SpectrumSize
from nntk_dist.analysis.spectra.results import Spectrum, with_positive_peaks
from nntk_dist.analysis.streamed_kernel import StreamedKernel
from nntk_dist.errors import ArgumentError

EIGH_OPERATIONS = 9.0  # of a decomposition with all vectors, over n³
DENSE_COPIES = 4  # kernel in float64, its copy in LAPACK, eigenvectors, workspace


@dataclass(frozen=True)
class DenseSpectrum:
    """Decompose the whole kernel in memory.

    Equivalent to `scipy.linalg.eigvalsh` for all eigenvalues and `scipy.linalg.eigh` for the leading vectors.
    Cost: two reductions to tridiagonal form, about 8n³/3 operations, and four n × n float64 arrays.

    Example:
        >>> DenseSpectrum().solve(KernelForms.of_kernel(np.diag([1.0, 3.0])), top_k=1).eigenvalues.tolist()
        [3.0, 1.0]
    """

    needs: ClassVar[Needs] = Needs.TILES

    def cost(self, size: SpectrumSize) -> Cost:
        """Estimate what a solve takes."""
        rows = float(size.kernel.num_rows)
        return Cost(
            memory_bytes=DENSE_COPIES * 8 * size.kernel.num_rows**2,
            operations=2.0 / 3.0 * EIGH_OPERATIONS * rows**3,
            read_bytes=float(size.kernel.entry_bytes * size.kernel.num_rows**2),
        )

    def solve(
        self, kernel: KernelForms[StreamedKernel], *, top_k: int, vectors: bool = True, seed: int = 0
    ) -> Spectrum:
        """Compute all eigenvalues, and the eigenvectors of the `top_k` largest if `vectors`; see `kernel_spectrum`."""
        return kernel_spectrum(kernel.read_matrix(), top_k=top_k if vectors else 0)


def kernel_spectrum(kernel: Float[np.ndarray, "n n"], *, top_k: int = 50) -> Spectrum:
    """Compute all eigenvalues of a symmetric kernel and the eigenvectors of its `top_k` largest (by sign).

    Args:
        kernel: a symmetric matrix, definite or not.
        top_k: eigenvectors to compute; above n means n.

    Raises:
        ArgumentError: `top_k` is negative, or `kernel` is not square and symmetric.
        DataError: `kernel` holds NaN or infinity.
    """
    if top_k < 0:
        raise ArgumentError(f"top_k is {top_k}; allowed: 0 (eigenvalues only) or more")
    matrix = check_symmetric(kernel)
    num_rows = len(matrix)
    eigenvalues = scipy.linalg.eigvalsh(matrix)[::-1].copy()
    num_vectors = min(top_k, num_rows)
    if num_vectors == 0:
        return Spectrum(eigenvalues, np.empty((num_rows, 0)))
    _, vectors = scipy.linalg.eigh(matrix, subset_by_index=(num_rows - num_vectors, num_rows - 1))
    return Spectrum(eigenvalues, with_positive_peaks(vectors[:, ::-1]))
