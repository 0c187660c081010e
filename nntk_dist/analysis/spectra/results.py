"""What spectrum solvers return: all eigenvalues, or the leading ones with residuals; and numbers derived from them.

Axes: n kernel rows, k leading eigenvectors. Eigenvalues are in descending order (with their sign) throughout.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from nntk_dist.analysis.convergence import Convergence


@dataclass(frozen=True)
class Spectrum:
    """All eigenvalues `λ_1 ≥ … ≥ λ_n` of a symmetric kernel and its leading eigenvectors, in the kernel's own units.

    The derived numbers also exist for indefinite kernels, such as the unbiased statistic; each says what it means then.

    Attributes:
        eigenvalues: in descending order.
        eigenvectors: unit vectors of the leading eigenvalues, as columns; the largest component is positive.
        num_zeros: further eigenvalues that are 0 and not listed, for a kernel of known lower rank.

    Example:
        >>> spectrum = Spectrum(np.array([3.0, 1.0]), np.eye(2))
        >>> spectrum.trace, spectrum.participation_ratio
        (4.0, 1.6)
    """

    eigenvalues: Float[np.ndarray, " n"]
    eigenvectors: Float[np.ndarray, "n k"]
    num_zeros: int = 0
    residuals: ClassVar[None] = None  # exact up to rounding

    @property
    def trace(self) -> float:
        """Return `Σ λ_i`, the sum of the kernel's diagonal."""
        return float(self.eigenvalues.sum())

    @property
    def participation_ratio(self) -> float:
        """Return `(Σ λ_i)² / Σ λ_i²`, the number of equal eigenvalues that would spread the trace as widely; 0 for the
        zero kernel.
        """
        squares = float(np.square(self.eigenvalues).sum())
        return self.trace**2 / squares if squares > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """Return `exp(−Σ p_i ln p_i)` with `p_i = |λ_i| / Σ|λ|`, between 1 and n; 0 for the zero kernel.

        Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality.
        """
        magnitudes = np.abs(self.eigenvalues[self.eigenvalues != 0])
        shares = magnitudes / magnitudes.sum()
        return float(np.exp(-(shares * np.log(shares)).sum())) if shares.size else 0.0

    @property
    def condition_number(self) -> float:
        """Return `max|λ| / min|λ|`, infinite if an eigenvalue is 0; above 1e16/n, K is singular to rounding."""
        magnitudes = np.abs(self.eigenvalues)
        smallest = 0.0 if self.num_zeros else float(magnitudes.min())
        return float(magnitudes.max()) / smallest if smallest > 0 else float("inf")

    @property
    def negative_mass(self) -> float:
        """Return `Σ_{λ<0} |λ| / Σ|λ|`, in [0, 1/2] if the trace is positive: rounding for a positive semidefinite
        kernel, noise for the unbiased statistic.
        """
        total = float(np.abs(self.eigenvalues).sum())
        return float(np.abs(self.eigenvalues[self.eigenvalues < 0]).sum()) / total if total > 0 else 0.0

    def numbers(self) -> dict[str, float]:
        """Return the derived numbers by name, for tables and reports."""
        return {
            "trace": self.trace,
            "largest_eigenvalue": float(self.eigenvalues[0]),
            "smallest_eigenvalue": min(float(self.eigenvalues[-1]), 0.0 if self.num_zeros else np.inf),
            "participation_ratio": self.participation_ratio,
            "effective_rank": self.effective_rank,
            "condition_number": self.condition_number,
            "negative_mass": self.negative_mass,
        }


@dataclass(frozen=True)
class LeadingEigenpairs:
    """The k largest eigenvalues (by sign), in descending order, with unit eigenvectors.

    Attributes:
        eigenvalues: in descending order.
        eigenvectors: as columns; the largest component is positive.
        residuals: `‖K u − λ u‖` of each pair. Some eigenvalue lies within it of λ, usually within its square over the
            gap to the next eigenvalue.
        trace: sum of the kernel's diagonal.
        squared_norm: `Σ K_ij²`.
        convergence: passes over the kernel, and whether every residual is within the tolerance.
    """

    eigenvalues: Float[np.ndarray, " k"]
    eigenvectors: Float[np.ndarray, "n k"]
    residuals: Float[np.ndarray, " k"]
    trace: float
    squared_norm: float
    convergence: Convergence

    def numbers(self) -> dict[str, float]:
        """Return the numbers that are known without the other eigenvalues, by name, for tables and reports."""
        return {
            "trace": self.trace,
            "largest_eigenvalue": float(self.eigenvalues[0]),
            "participation_ratio": self.trace**2 / self.squared_norm if self.squared_norm > 0 else 0.0,
            "passes": float(self.convergence.passes),
            "converged": float(self.convergence.converged),
            "largest_residual": float(self.residuals.max()),
        }


def with_positive_peaks(vectors: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """Return the vectors with signs such that each one's largest component is positive: equal in repeated runs."""
    peaks = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None, :], axis=0)
    return vectors * np.sign(peaks)
