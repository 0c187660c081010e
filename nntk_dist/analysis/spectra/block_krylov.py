"""The leading eigenpairs of a kernel that is read in passes, each multiplying a block of vectors.

A block Krylov method. Each step adds the residuals of all pairs that have not converged to an orthonormal basis, at the
cost of one product, and the Rayleigh-Ritz procedure takes the best pairs from the whole basis; a full basis is reduced
to its best vectors. In exact arithmetic the basis spans the same space as block Lanczos (Golub & Underwood 1977), or
after a restart as thick-restart Lanczos (Wu & Simon 2000). The products of the basis are kept beside it, so residuals
are true ones, in float64, and no recurrence loses accuracy. A block as wide as the number of pairs finds clusters of
eigenvalues, which single vectors may miss. `scipy`'s LOBPCG keeps a basis of three blocks instead: it took 60 passes
over a kernel of 3,000 rows, this method 13.

Axes: n kernel rows, k pairs, b vectors of a block, m vectors of the basis.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float

from nntk_dist.analysis.checks import check_finite_entries
from nntk_dist.analysis.convergence import Convergence
from nntk_dist.analysis.kernel_forms import KernelForms, Needs
from nntk_dist.analysis.solvers import Cost, SpectrumSize
from nntk_dist.analysis.spectra.results import LeadingEigenpairs, with_positive_peaks
from nntk_dist.analysis.streamed_kernel import StreamedKernel
from nntk_dist.errors import ArgumentError
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import KRYLOV_SAMPLE, Stream

_BASIS_BLOCKS = 6  # blocks of vectors in a full basis; their products take as much again
_OVERSAMPLING = 8
_DEPENDENT = 1e-10  # of a new vector's length: if less is left beside the basis, it is rounding
# Smaller eigenvalues are only asked to be as accurate as this share of the largest one: rounding allows no more.
_LEAST_SHARE = 1e-6
_TYPICAL_PASSES = 15  # if eigenvalues decay
_BLOCKS_HELD = 2 * _BASIS_BLOCKS + 8  # vectors and products, and temporaries of a step and a pass
_TILES_HELD = 6  # three that are read ahead, and their products


@dataclass(frozen=True)
class BlockKrylov:
    """Find the largest eigenvalues of a kernel that stays in storage.

    Each pair satisfies `‖K u − λ u‖ ≤ tolerance·max(|λ|, 1e-6 λ_1)`. Eigenvalues err by at most that, and usually by
    its square over the gap to the next one.
    Cost: 5 to 20 passes over the kernel if eigenvalues decay, and about 20·(k + k/4) vectors of memory.

    Args:
        tolerance: of the residual, relative to the eigenvalue.
        max_passes: the most passes over the kernel.

    Example:
        >>> pairs = BlockKrylov().solve(KernelForms.of_kernel(np.diag([3.0, 1.0, 2.0])), top_k=2)
        >>> pairs.eigenvalues.round(6).tolist()
        [3.0, 2.0]
    """

    needs: ClassVar[Needs] = Needs.TILES

    tolerance: float = 1e-6
    max_passes: int = 60

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ArgumentError(f"tolerance is {self.tolerance}; allowed: a number above 0")
        if self.max_passes < 1:
            raise ArgumentError(f"max_passes is {self.max_passes}; allowed: 1 or more")

    def cost(self, size: SpectrumSize) -> Cost:
        """Estimate what a solve takes, for a kernel whose eigenvalues decay."""
        kernel = size.kernel
        rows, passes = float(kernel.num_rows), _TYPICAL_PASSES * size.num_kernels
        numbers = _BLOCKS_HELD * (size.top_k + max(_OVERSAMPLING, size.top_k // 4))
        return Cost(
            memory_bytes=8 * (kernel.num_rows * numbers + _TILES_HELD * kernel.tile_rows**2),
            operations=2.0 * rows**2 * passes * 1.25 * size.top_k,
            read_bytes=passes * kernel.entry_bytes * rows**2 / 2,
        )

    def solve(
        self, kernel: KernelForms[StreamedKernel], *, top_k: int, vectors: bool = True, seed: int = 0
    ) -> LeadingEigenpairs:
        """Compute the `top_k` largest eigenvalues (by sign) and their eigenvectors; all, if the kernel has fewer rows.

        Args:
            kernel: a kernel that offers tiles.
            top_k: number of pairs.
            vectors: ignored; the vectors are computed anyway.
            seed: of the random start.

        Raises:
            ArgumentError: `top_k` is below 1.
            DataError: a product is not finite.
        """
        if top_k < 1:
            raise ArgumentError(f"top_k is {top_k}; allowed: 1 or more")
        streamed = kernel.stream()
        num_rows = streamed.num_rows
        wanted = min(top_k, num_rows)
        width = min(num_rows, wanted + max(_OVERSAMPLING, wanted // 4))
        limit = min(num_rows, _BASIS_BLOCKS * width)
        basis = _Basis(np.empty((num_rows, limit), order="F"), np.empty((num_rows, limit), order="F"))
        block = _random_start(num_rows, width, seed)
        passes, squared_norm = 0, 0.0
        while True:
            products, squares = streamed.product_and_norm(block, with_norm=passes == 0)
            squared_norm += squares
            check_finite_entries(products, "a product with the kernel")
            passes += 1
            basis.append(block, products)
            pairs = basis.leading_pairs(width, self.tolerance)
            converged = not pairs.is_open[:wanted].any()
            if converged or passes == self.max_passes:
                break
            block = _next_block(basis, pairs, limit, width)
            if not block.shape[1]:  # the space holds its own products: it is invariant, and its pairs are exact
                converged = True
                break
        relative = pairs.residuals[:wanted] / np.where(pairs.scales[:wanted] > 0, pairs.scales[:wanted], 1.0)
        remedy = "allow more passes, ask for fewer eigenpairs, or raise the tolerance"
        return LeadingEigenpairs(
            pairs.values[:wanted].copy(),
            with_positive_peaks(pairs.vectors)[:, :wanted],
            pairs.residuals[:wanted],
            float(streamed.diagonal_blocks().sum()),
            squared_norm,
            Convergence(passes, self.max_passes, float(relative.max()), self.tolerance, remedy, bool(converged)),
        )


@dataclass(frozen=True)
class _Pairs:
    """Ritz pairs with residuals `K u − λ u`; `scales` are the magnitudes that residuals are compared with."""

    values: Float[np.ndarray, " b"]
    vectors: Float[np.ndarray, "n b"]
    missed: Float[np.ndarray, "n b"]
    residuals: Float[np.ndarray, " b"]
    scales: Float[np.ndarray, " b"]
    is_open: np.ndarray


@dataclass
class _Basis:
    """Orthonormal vectors and their products with the kernel, in arrays that are filled from the left."""

    vectors: Float[np.ndarray, "n m"]
    products: Float[np.ndarray, "n m"]
    count: int = 0

    def append(self, vectors: np.ndarray, products: np.ndarray) -> None:
        own = slice(self.count, self.count + vectors.shape[1])
        self.vectors[:, own], self.products[:, own] = vectors, products
        self.count = own.stop

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values in descending order and the coefficients of their vectors."""
        inner = self.vectors[:, : self.count].T @ self.products[:, : self.count]
        values, coefficients = np.linalg.eigh(0.5 * (inner + inner.T))
        return values[::-1], coefficients[:, ::-1]

    def leading_pairs(self, width: int, tolerance: float) -> _Pairs:
        values, coefficients = self.ritz()
        values, coefficients = values[:width], coefficients[:, :width]
        vectors, products = self.combined(coefficients)
        missed = products - vectors * values
        residuals = np.linalg.norm(missed, axis=0)
        scales = np.maximum(np.abs(values), _LEAST_SHARE * np.abs(values).max())
        return _Pairs(values, vectors, missed, residuals, scales, residuals > tolerance * scales)

    def combined(self, coefficients: Float[np.ndarray, "m k"]) -> tuple[np.ndarray, np.ndarray]:
        """Combinations of the vectors, and their products."""
        return self.vectors[:, : self.count] @ coefficients, self.products[:, : self.count] @ coefficients

    def shrink(self, coefficients: Float[np.ndarray, "m k"]) -> None:
        """Keep only these combinations."""
        vectors, products = self.combined(coefficients)
        self.count = 0
        self.append(vectors, products)


def _random_start(num_rows: int, width: int, seed: int) -> Float[np.ndarray, "n b"]:
    numbers = normal(seed, Stream.SAMPLE, torch.arange(KRYLOV_SAMPLE, KRYLOV_SAMPLE + width), 0, num_rows)
    return np.linalg.qr(numbers.numpy().T)[0]


def _next_block(basis: _Basis, pairs: _Pairs, limit: int, width: int) -> Float[np.ndarray, "n b"]:
    """New directions: the residuals of the open pairs. Shrinks a basis that has no space left for them."""
    space = limit - basis.count
    if space < pairs.is_open.sum() and limit < len(basis.vectors):
        basis.shrink(basis.ritz()[1][:, : 2 * width])
        space = limit - basis.count
    return _orthonormal_beside(basis, pairs.missed[:, pairs.is_open][:, :space])


def _orthonormal_beside(basis: _Basis, vectors: Float[np.ndarray, "n b"]) -> Float[np.ndarray, "n b2"]:
    """An orthonormal basis of the vectors' components outside the basis; computed twice to remove rounding."""
    lengths = np.linalg.norm(vectors, axis=0)
    vectors = vectors[:, lengths > 0] / lengths[lengths > 0]
    own = basis.vectors[:, : basis.count]
    for _ in range(2):
        vectors = vectors - own @ (own.T @ vectors)
        vectors, triangle = np.linalg.qr(vectors)
        kept = np.abs(np.diagonal(triangle)) > _DEPENDENT
        vectors = vectors[:, kept]
    return vectors
