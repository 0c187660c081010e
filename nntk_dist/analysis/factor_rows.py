"""The rows of an explicit factor, read an interval of examples at a time: what factored solvers work on.

Axes: n kernel rows, F columns of the factor, v vectors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from nntk_dist.runtime.read_ahead import read_ahead


@dataclass(frozen=True)
class FactorRows:
    """Rows of W, `gram = W Wᵀ`, or of Φ.

    Attributes:
        num_rows: n.
        num_columns: F.
        intervals: Intervals of examples that cover all of them in order.
        read: Reads the rows of one interval.
    """

    num_rows: int
    num_columns: int
    intervals: tuple[tuple[int, int], ...]
    read: Callable[[tuple[int, int]], Float[np.ndarray, "rows F"]]

    def blocks(self) -> Iterator[Float[np.ndarray, "rows F"]]:
        """Yield all rows, one interval at a time; the next one is read meanwhile."""
        for _, block in read_ahead(self.intervals, self.read):
            yield block

    def product(self, vectors: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n v"]:
        """Return `W Wᵀ·vectors`: two passes over the rows, 4·n·F operations a vector."""
        vectors = np.asarray(vectors, dtype=np.float64)
        inner, start = np.zeros((self.num_columns, vectors.shape[1])), 0
        for block in self.blocks():
            inner += block.T @ vectors[start : start + len(block)]
            start += len(block)
        return np.concatenate([block @ inner for block in self.blocks()])
