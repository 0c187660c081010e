"""Matrices that stay in storage and are read one tile at a time: products, diagonal, rows; never n × n in memory.

A product reads each tile on and above the diagonal once, for any number of vectors: ten vectors cost one pass, as one
does. The caller supplies the function that reads a tile. No solver is here.

Tiles are cast to float64, and sums are float64: a solve at a small ridge subtracts numbers 1e5 times larger than its
result, which would be lost in float32.

Axes: n kernel rows, m rows of a test kernel, v vectors, b chosen rows, d rows of one example.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from nntk_dist.runtime.read_ahead import read_ahead

Place = tuple[slice, slice]


@dataclass(frozen=True)
class StreamedKernel:
    """A symmetric matrix that is read tile by tile.

    Args:
        num_rows: rows of the matrix.
        edge: rows of a tile; the last tiles may be smaller.
        read: returns the entries of `(rows, columns)`.

    Example:
        >>> import numpy as np
        >>> matrix = np.eye(5)
        >>> kernel = StreamedKernel(5, 2, lambda rows, columns: matrix[rows, columns])
        >>> kernel.product(np.ones((5, 1))).ravel().tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """

    num_rows: int
    edge: int
    read: Callable[[slice, slice], np.ndarray]

    @property
    def stripes(self) -> list[slice]:
        """Return the rows of each row of tiles."""
        return [slice(start, min(start + self.edge, self.num_rows)) for start in range(0, self.num_rows, self.edge)]

    @property
    def dtype(self) -> np.dtype:
        """Return the type in which entries are stored, from reading one of them."""
        return np.asarray(self.read(slice(0, 1), slice(0, 1))).dtype

    def squared(self) -> "StreamedKernel":
        """Return the matrix of the squares of all entries, in float64."""
        return StreamedKernel(self.num_rows, self.edge, lambda *place: np.square(self._tile(place)))

    def product(self, vectors: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n v"]:
        """Compute `K·vectors` in one pass: n²/2 entries read, 2n² operations for each vector."""
        return self.product_and_norm(vectors, with_norm=False)[0]

    def product_and_norm(
        self, vectors: Float[np.ndarray, "n v"], *, with_norm: bool = True
    ) -> tuple[Float[np.ndarray, "n v"], float]:
        """Compute `K·vectors` and `Σ K_ij²` (0 unless `with_norm`) in the same pass."""
        as_rows = _as_rows(vectors)
        product, squares = np.zeros(as_rows.shape), 0.0
        for (rows, columns), tile in read_ahead(self._upper(), self._tile):
            product[:, rows] += as_rows[:, columns] @ tile.T
            if columns != rows:
                product[:, columns] += as_rows[:, rows] @ tile
            if with_norm:
                squares += (1 if columns == rows else 2) * float(np.vdot(tile, tile))
        return np.ascontiguousarray(product.T), squares

    def diagonal_blocks(self, size: int = 1) -> Float[np.ndarray, "n/d d d"]:
        """Return the blocks of `size` rows on the diagonal; reads the tiles on the diagonal."""
        blocks = []
        for _, tile in read_ahead([(rows, rows) for rows in self.stripes], self._tile):
            count = len(tile) // size
            own = np.arange(count)
            blocks.append(tile.reshape(count, size, count, size)[own, :, own])
        return np.concatenate(blocks)

    def rows(self, stripe: slice, chosen: np.ndarray) -> Float[np.ndarray, "b n"]:
        """Return whole rows of one stripe, numbered within the stripe; reads the stripe's tiles."""
        places = [(stripe, columns) for columns in self.stripes]
        return np.concatenate([tile[chosen] for _, tile in read_ahead(places, self._tile)], axis=1)

    def _upper(self) -> Iterator[Place]:
        stripes = self.stripes
        for i, rows in enumerate(stripes):
            for columns in stripes[i:]:
                yield rows, columns

    def _tile(self, place: Place) -> Float[np.ndarray, "h w"]:
        return np.asarray(self.read(*place), dtype=np.float64)


@dataclass(frozen=True)
class StreamedRectangle:
    """A rectangular matrix, such as a test kernel, that is read tile by tile.

    Args:
        shape: (m, n).
        edges: rows and columns of a tile; the last tiles may be smaller.
        read: returns the entries of `(rows, columns)`.
    """

    shape: tuple[int, int]
    edges: tuple[int, int]
    read: Callable[[slice, slice], np.ndarray]

    def product(self, vectors: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "m v"]:
        """Compute the matrix times the vectors in one pass."""
        as_rows = _as_rows(vectors)
        product = np.zeros((len(as_rows), self.shape[0]))
        rows, columns = (
            [slice(start, min(start + edge, length)) for start in range(0, length, edge)]
            for length, edge in zip(self.shape, self.edges, strict=True)
        )
        places = [(own, other) for own in rows for other in columns]
        for (own, other), tile in read_ahead(places, lambda place: np.asarray(self.read(*place), dtype=np.float64)):
            product[:, own] += as_rows[:, other] @ tile.T
        return np.ascontiguousarray(product.T)


def _as_rows(vectors: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "v n"]:
    """Vectors as rows: BLAS takes half the time to multiply a few rows by a tile (measured: 20 and 84 rows of 4096)."""
    return np.ascontiguousarray(np.asarray(vectors, dtype=np.float64).T)
