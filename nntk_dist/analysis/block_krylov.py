"""The leading eigenpairs of a symmetric kernel whose tiles are read in passes, each with a block of vectors.

A block Krylov method: the basis grows by the residuals of all pairs that are not there yet, one product a step, and
Rayleigh and Ritz pick the pairs from all of it; a full basis shrinks to its best vectors. In exact arithmetic its space
is that of block Lanczos (Golub & Underwood 1977), or after a restart of Wu and Simon's thick restart (2000); since the
products of the basis are kept beside it, residuals are true ones, in float64, and nothing rests on a recurrence. A
block as wide as the pairs asked for sees clusters of eigenvalues, where single vectors miss some. `scipy`'s LOBPCG
keeps three blocks of space instead, and took 60 passes over a kernel of 3,000 rows where this takes 13.

Axes: n kernel rows, k pairs, b vectors of a block, m vectors of the basis.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from nntk_dist.analysis.spectrum import check_finite
from nntk_dist.analysis.streamed_kernel import TiledKernel
from nntk_dist.errors import NNTKError
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import KRYLOV_SAMPLE, Stream

TOLERANCE = 1e-6
_MOST_PASSES = 60
_BLOCKS_HELD = 6  # of the basis, and as many of its products
_OVERSAMPLED = 8
_DEPENDENT = 1e-10  # of a new vector's length: what is left of it beside the basis is rounding
# Eigenvalues below this share of the largest one are asked to be as accurate as one of that share: rounding allows no
# more.
_LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class LeadingPairs:
    """The k largest eigenvalues (by sign), descending, with unit vectors.

    `residuals` are `‖K u − λ u‖`: some eigenvalue lies within that of λ, and usually within its square over the gap.
    `squared_norm` is `Σ K_ij²`, which the first pass sees. `converged` where every residual is within the tolerance.
    """

    eigenvalues: Float[np.ndarray, " k"]
    eigenvectors: Float[np.ndarray, "n k"]
    residuals: Float[np.ndarray, " k"]
    trace: float
    squared_norm: float
    passes: int
    converged: bool

    def numbers(self) -> dict[str, float]:
        """What is known without the other eigenvalues, by name, for tables and reports."""
        return {
            "trace": self.trace,
            "largest_eigenvalue": float(self.eigenvalues[0]),
            "participation_ratio": self.trace**2 / self.squared_norm if self.squared_norm > 0 else 0.0,
            "passes": float(self.passes),
            "converged": float(self.converged),
            "largest_residual": float(self.residuals.max()),
        }


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
        """Ritz values, descending, and the coefficients of their vectors."""
        inner = self.vectors[:, : self.count].T @ self.products[:, : self.count]
        values, coefficients = np.linalg.eigh(0.5 * (inner + inner.T))
        return values[::-1], coefficients[:, ::-1]

    def combined(self, coefficients: Float[np.ndarray, "m k"]) -> tuple[np.ndarray, np.ndarray]:
        """Combinations of the vectors, and their products."""
        return self.vectors[:, : self.count] @ coefficients, self.products[:, : self.count] @ coefficients

    def shrink(self, coefficients: Float[np.ndarray, "m k"]) -> None:
        """Keep these combinations alone."""
        vectors, products = self.combined(coefficients)
        self.count = 0
        self.append(vectors, products)


def leading_eigenpairs(
    kernel: TiledKernel,
    *,
    top_k: int = 50,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    most_passes: int = _MOST_PASSES,
) -> LeadingPairs:
    """The `top_k` largest eigenvalues, each with `‖K u − λ u‖ ≤ tolerance·max(|λ|, 1e-6 λ_1)`, and their vectors.

    A kernel with fewer rows than that gives all its pairs. Signs of vectors are as in `kernel_spectrum`.
    Cost: 5 to 20 passes over the kernel where eigenvalues decay, and 20·(k + k/4) vectors of memory.

    Raises:
        NNTKError: `top_k` is below 1, or a product is not finite.
    """
    if top_k < 1:
        raise NNTKError(f"top_k is {top_k}; allowed: 1 or more")
    num_rows = kernel.num_rows
    wanted = min(top_k, num_rows)
    width = min(num_rows, wanted + max(_OVERSAMPLED, wanted // 4))
    limit = min(num_rows, _BLOCKS_HELD * width)
    basis = _Basis(np.empty((num_rows, limit), order="F"), np.empty((num_rows, limit), order="F"))
    fresh = np.linalg.qr(
        normal(seed, Stream.SAMPLE, torch.arange(KRYLOV_SAMPLE, KRYLOV_SAMPLE + width), 0, num_rows).numpy().T
    )[0]
    passes, squared_norm = 0, 0.0
    while True:
        products, squares = kernel.product_and_norm(fresh, with_norm=passes == 0)
        squared_norm += squares
        check_finite(products, "a product with the kernel")
        passes += 1
        basis.append(fresh, products)
        values, coefficients = basis.ritz()
        values, coefficients = values[:width], coefficients[:, :width]
        vectors, products = basis.combined(coefficients)
        missed = products - vectors * values
        residuals = np.linalg.norm(missed, axis=0)
        allowed = tolerance * np.maximum(np.abs(values), _LEAST_SHARE * np.abs(values).max())
        open_pairs = residuals > allowed
        converged = not open_pairs[:wanted].any()
        if converged or passes == most_passes:
            break
        room = limit - basis.count
        if room < open_pairs.sum() and limit < num_rows:
            basis.shrink(basis.ritz()[1][:, : 2 * width])
            room = limit - basis.count
        fresh = _beside(basis, missed[:, open_pairs][:, :room])
        if not fresh.shape[1]:  # the space holds its own products: nothing is left to be found
            converged = True
            break
    peaks = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None, :], axis=0)
    signed = (vectors * np.sign(peaks))[:, :wanted]
    trace = float(kernel.diagonal_blocks().sum())
    return LeadingPairs(
        values[:wanted].copy(), signed, residuals[:wanted], trace, squared_norm, passes, bool(converged)
    )


def _beside(basis: _Basis, vectors: Float[np.ndarray, "n b"]) -> Float[np.ndarray, "n b2"]:
    """An orthonormal basis of what the vectors add to the basis; twice, since once leaves rounding of the first."""
    lengths = np.linalg.norm(vectors, axis=0)
    vectors = vectors[:, lengths > 0] / lengths[lengths > 0]
    own = basis.vectors[:, : basis.count]
    for _ in range(2):
        vectors = vectors - own @ (own.T @ vectors)
        vectors, triangle = np.linalg.qr(vectors)
        kept = np.abs(np.diagonal(triangle)) > _DEPENDENT
        vectors = vectors[:, kept]
    return vectors
