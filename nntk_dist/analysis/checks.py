"""Checks of matrices before anything is computed from them.

Axes: n and m, rows and columns of any matrix.
"""

import numpy as np
from jaxtyping import Float

from nntk_dist.errors import ArgumentError, DataError

_ASYMMETRY_ALLOWED = 1e-5  # of the largest entry: a few hundred float32 roundings; any real mistake is far above
_ROWS_PER_CHECK = 1024  # rows are checked in stripes, so that temporaries stay small beside the kernel


def check_symmetric(kernel: Float[np.ndarray, "n n"], what: str = "the kernel") -> Float[np.ndarray, "n n"]:
    """Return `kernel` in float64 after checking that it is finite, square, and symmetric up to float32 rounding.

    LAPACK reads one triangle only: without this check, an asymmetric matrix would silently give wrong eigenvalues.

    Args:
        kernel: the matrix.
        what: its name in messages.

    Raises:
        ArgumentError: the matrix is empty, not square or not symmetric; the message says where.
        DataError: it holds NaN or infinity.
    """
    matrix = np.asarray(kernel, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ArgumentError(f"{what} has shape {matrix.shape}; it must be a square matrix with at least one row")
    largest, asymmetry, place = 0.0, 0.0, (0, 0)
    for start in range(0, len(matrix), _ROWS_PER_CHECK):
        rows = matrix[start : start + _ROWS_PER_CHECK]
        check_finite_entries(rows, what, first_row=start)
        difference = np.abs(rows - matrix[:, start : start + _ROWS_PER_CHECK].T)
        row, column = np.unravel_index(difference.argmax(), difference.shape)
        if difference[row, column] > asymmetry:
            asymmetry, place = float(difference[row, column]), (start + int(row), int(column))
        largest = max(largest, float(np.abs(rows).max()))
    if asymmetry > _ASYMMETRY_ALLOWED * largest:
        raise ArgumentError(
            f"{what} is not symmetric: entries {place} and {place[::-1]} differ by {asymmetry:.3g} "
            f"(largest entry {largest:.3g}); pass a train-by-train kernel, computed once for each pair"
        )
    return matrix


def check_finite_entries(matrix: Float[np.ndarray, "n m"], what: str, *, first_row: int = 0) -> None:
    """Check that no entry is NaN or infinite.

    Args:
        matrix: the entries.
        what: their name in messages.
        first_row: added to row numbers in the message, if `matrix` is a stripe of a larger one.

    Raises:
        DataError: some are; the message has their number and the first position.
    """
    bad = ~np.isfinite(matrix)
    if bad.any():
        row, *rest = (int(index) for index in np.argwhere(bad)[0])
        raise DataError(
            f"{what} holds {int(bad.sum())} values that are NaN or infinite, the first at {(first_row + row, *rest)}; "
            "check that the run finished (NaN marks tiles not yet written) and that the model's outputs are finite"
        )
