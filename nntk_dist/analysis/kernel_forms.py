"""One kernel in each form in which it can be read: whole, tile by tile, or as a factor.

Solvers take a `KernelForms` and read the form that they need. Nothing is read before a solver asks.

Axes: n kernel rows, m rows of a test kernel, F columns of a factor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float

from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.analysis.streamed_kernel import StreamedKernel, StreamedRectangle
from nntk_dist.errors import Unavailable

Tiles = TypeVar("Tiles", StreamedKernel, StreamedRectangle)
Form = TypeVar("Form")


class Needs(StrEnum):
    """What a solver reads: the kernel's entries (`TILES`), or a factor W with kernel = W Wᵀ (`FACTOR`)."""

    TILES = "tiles"
    FACTOR = "factor"


@dataclass(frozen=True)
class IndefiniteFactor:
    """`Φ (M ⊗ I) Φᵀ`, a kernel that may be indefinite; columns of Φ are grouped by output, with draws inside."""

    columns: FactorRows
    metric: Float[np.ndarray, "s s"]


@dataclass(frozen=True)
class KernelForms(Generic[Tiles]):
    """Functions that return a kernel in some form; a form that does not exist is None.

    Args:
        matrix: returns all entries.
        tiles: returns a `StreamedKernel` (train by train) or a `StreamedRectangle` (test by train).
        factor: returns rows of W. The train kernel is `W Wᵀ`, a test kernel `W_test Wᵀ`.
        indefinite: returns the factor of a kernel that is not positive semidefinite.

    Example:
        >>> import numpy as np
        >>> KernelForms.of_kernel(np.eye(3)).offers(Needs.TILES)
        True
    """

    matrix: Callable[[], np.ndarray] | None = None
    tiles: Callable[[], Tiles] | None = None
    factor: Callable[[], FactorRows] | None = None
    indefinite: Callable[[], IndefiniteFactor] | None = None

    @staticmethod
    def of_kernel(kernel: Float[np.ndarray, "n n"]) -> "KernelForms[StreamedKernel]":
        """Wrap a symmetric matrix in memory; it is one tile."""
        array = np.asarray(kernel)
        tiles = StreamedKernel(len(array), max(1, len(array)), lambda rows, columns: array[rows, columns])
        return KernelForms(lambda: array, lambda: tiles)

    @staticmethod
    def of_test_kernel(kernel: Float[np.ndarray, "m n"]) -> "KernelForms[StreamedRectangle]":
        """Wrap a rectangular matrix in memory, test rows by train columns; it is one tile."""
        array = np.asarray(kernel)
        shape = (array.shape[0], array.shape[-1])
        edges = (max(1, shape[0]), max(1, shape[1]))
        tiles = StreamedRectangle(shape, edges, lambda rows, columns: array[rows, columns])
        return KernelForms(lambda: array, lambda: tiles)

    def offers(self, needs: Needs) -> bool:
        """Return whether a solver with these needs can read this kernel."""
        if needs is Needs.TILES:
            return self.tiles is not None
        return self.factor is not None or self.indefinite is not None

    def read_matrix(self) -> np.ndarray:
        """Return all entries. Raises `Unavailable` if they do not exist."""
        return _existing(self.matrix, "entries")()

    def stream(self) -> Tiles:
        """Return the kernel as tiles. Raises `Unavailable` if they do not exist."""
        return _existing(self.tiles, "tiles")()

    def read_factor(self) -> FactorRows:
        """Return the rows of W. Raises `Unavailable` if they do not exist."""
        return _existing(self.factor, "factor")()


def _existing(form: Callable[[], Form] | None, what: str) -> Callable[[], Form]:
    if form is None:
        raise Unavailable(f"this kernel has no {what} to read; use a solver that needs another form")
    return form
