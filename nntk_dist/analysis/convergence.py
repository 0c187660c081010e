"""How an iteration ended, as a value: whether it converged, how far it came, and what would help.

Axes: none.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Convergence:
    """The end of an iterative solve.

    Attributes:
        passes: passes over the kernel.
        max_passes: the most that were allowed.
        residual: the largest residual, relative to what the solver says.
        tolerance: what the residual was to be below.
        remedy: what to change if it did not converge.
        converged: whether it did.

    Example:
        >>> Convergence(60, 60, 1e-3, 1e-6, "allow more passes", converged=False).text
        'not converged: residual 0.001 after 60 passes, tolerance 1e-06; allow more passes'
    """

    passes: int
    max_passes: int
    residual: float
    tolerance: float
    remedy: str
    converged: bool

    @property
    def text(self) -> str:
        """Return the end in one line: the cause, and the remedy if there is need of one."""
        if self.converged:
            return f"converged in {self.passes} passes to {self.residual:.2g}, tolerance {self.tolerance:.2g}"
        limit = "" if self.passes >= self.max_passes else " (rounding allows no more)"
        return (
            f"not converged: residual {self.residual:.2g} after {self.passes} passes{limit}, tolerance "
            f"{self.tolerance:.2g}; {self.remedy}"
        )
