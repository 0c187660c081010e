"""The spectrum of a kernel `K = W Wᵀ` from the rows of W, which are read in blocks; exact, never n × n.

The non-zero eigenvalues of W Wᵀ are those of the small matrix WᵀW.

Axes: n kernel rows, F columns of W, s draws, k leading eigenvectors.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float

from nntk_dist.analysis.factor_products import column_products, numbered_blocks
from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.analysis.kernel_forms import KernelForms, Needs
from nntk_dist.analysis.solvers import Cost, SpectrumSize
from nntk_dist.analysis.spectra.dense import DENSE_COPIES, EIGH_OPERATIONS, kernel_spectrum
from nntk_dist.analysis.spectra.results import Spectrum, with_positive_peaks
from nntk_dist.analysis.streamed_kernel import StreamedKernel

_BLOCKS_HELD = 6  # three that are read ahead, and their products


@dataclass(frozen=True)
class FactoredSpectrum:
    """Find all eigenvalues from the kernel's factor, without the kernel.

    Equal to `DenseSpectrum` up to rounding. Eigenvalues beyond the factor's rank are 0 and not listed.
    Cost: n·F² + 8F³/3 multiply-adds, two passes over the factor, about 4F² float64 numbers.
    """

    needs: ClassVar[Needs] = Needs.FACTOR

    def cost(self, size: SpectrumSize) -> Cost:
        """Estimate what a solve takes."""
        kernel = size.kernel
        columns = kernel.factor_columns or 0
        copies = DENSE_COPIES if size.indefinite else DENSE_COPIES - 1
        held = 8 * kernel.num_rows * size.top_k
        return Cost(
            memory_bytes=copies * 8 * columns**2 + 8 * kernel.factor_block_rows * _BLOCKS_HELD * columns + held,
            operations=2.0 * float(kernel.num_rows) * float(columns) ** 2 + EIGH_OPERATIONS * float(columns) ** 3,
            read_bytes=2.0 * kernel.factor_bytes,
        )

    def solve(
        self, kernel: KernelForms[StreamedKernel], *, top_k: int, vectors: bool = True, seed: int = 0
    ) -> Spectrum:
        """Compute all eigenvalues, and the eigenvectors of the `top_k` largest if `vectors` (none if indefinite)."""
        if kernel.factor is None and kernel.indefinite is not None:
            factor = kernel.indefinite()
            return indefinite_spectrum(factor.columns, factor.metric)
        return factored_spectrum(kernel.read_factor(), top_k=top_k if vectors else 0)


def factored_spectrum(rows: FactorRows, *, top_k: int = 50) -> Spectrum:
    """Compute the spectrum of `W Wᵀ`: all eigenvalues within its rank, and leading eigenvectors `W v/√λ`.

    There are no eigenvectors of eigenvalues that are 0 up to rounding.

    Raises:
        ArgumentError: `top_k` is negative.
        DataError: the rows are not finite.
    """
    small = kernel_spectrum(column_products(rows)[0].numpy(), top_k=top_k)
    values = small.eigenvalues[: min(rows.num_rows, rows.num_columns)]
    rounding = rows.num_columns * np.finfo(np.float64).eps * max(values[0], 0.0)
    count = min(int(np.count_nonzero(values > rounding)), small.eigenvectors.shape[1])
    inner = torch.from_numpy(small.eigenvectors[:, :count] / np.sqrt(values[:count]))
    vectors = np.empty((rows.num_rows, count))
    for selection, block in numbered_blocks(rows):
        vectors[selection] = block @ inner
    return Spectrum(values, with_positive_peaks(vectors), num_zeros=rows.num_rows - len(values))


def indefinite_spectrum(columns: FactorRows, metric: Float[np.ndarray, "s s"]) -> Spectrum:
    """Compute the eigenvalues of `Φ (M ⊗ I) Φᵀ` for any symmetric M from rows of Φ; no vectors.

    With `ΦᵀΦ = RᵀR` they are the eigenvalues of `R (M ⊗ I) Rᵀ`, and zeros.

    Args:
        columns: rows of Φ, whose columns are grouped by output, with draws inside.
        metric: M.
    """
    values, vectors = torch.linalg.eigh(column_products(columns)[0])
    root = values.clamp_min(0.0).sqrt()[:, None] * vectors.T
    num_columns, num_draws = columns.num_columns, len(metric)
    del vectors
    mixed = root.reshape(-1, num_draws) @ torch.from_numpy(metric)
    inner = mixed.reshape(num_columns, num_columns) @ root.T
    del root, mixed
    small = torch.linalg.eigvalsh(inner.add_(inner.T.clone()).mul_(0.5)).flip(0).numpy()
    if num_columns > columns.num_rows:  # the rest are zeros up to rounding
        kept = np.sort(np.argsort(-np.abs(small), kind="stable")[: columns.num_rows])
        small = small[kept]
    return Spectrum(small, np.empty((columns.num_rows, 0)), num_zeros=columns.num_rows - len(small))
