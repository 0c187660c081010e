"""A kernel whose tiles are read from storage one at a time: products, diagonal, columns, never n × n.

A product reads the tiles on and above the diagonal once, whatever the number of vectors: ten cost one pass, as one
does. Where tiles come from is the caller's business. No solver is here.

Tiles are cast to float64 and so are sums: a solve at a small ridge subtracts numbers 1e5 times larger than what it is
after, which products in float32 would drown.

Axes: n kernel rows, m rows of a test kernel, v vectors, b chosen columns, d rows of one example.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from nntk_dist.runtime.read_ahead import read_ahead

Place = tuple[slice, slice]


@dataclass(frozen=True)
class TiledKernel:
    """A symmetric matrix of `num_rows` rows in square tiles of `edge`, the last ones smaller; `read` gives one."""

    num_rows: int
    edge: int
    read: Callable[[slice, slice], np.ndarray]

    @property
    def stripes(self) -> list[slice]:
        """The rows of each row of tiles."""
        return [slice(start, min(start + self.edge, self.num_rows)) for start in range(0, self.num_rows, self.edge)]

    def product(self, vectors: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n v"]:
        """`K·vectors` in one pass: n²/2 entries read, 2n² operations a vector."""
        return self.product_and_norm(vectors, with_norm=False)[0]

    def product_and_norm(
        self, vectors: Float[np.ndarray, "n v"], *, with_norm: bool = True
    ) -> tuple[Float[np.ndarray, "n v"], float]:
        """`K·vectors` and, where asked, `Σ K_ij²`, in the same pass."""
        lying = _lying(vectors)
        product, squares = np.zeros(lying.shape), 0.0
        for (rows, columns), tile in read_ahead(self._upper(), self._tile):
            product[:, rows] += lying[:, columns] @ tile.T
            if columns != rows:
                product[:, columns] += lying[:, rows] @ tile
            if with_norm:
                squares += (1 if columns == rows else 2) * float(np.vdot(tile, tile))
        return np.ascontiguousarray(product.T), squares

    def diagonal_blocks(self, size: int = 1) -> Float[np.ndarray, "n/d d d"]:
        """The blocks on the diagonal, of `size` rows each; reads the tiles on the diagonal."""
        blocks = []
        for _, tile in read_ahead([(rows, rows) for rows in self.stripes], self._tile):
            count = len(tile) // size
            own = np.arange(count)
            blocks.append(tile.reshape(count, size, count, size)[own, :, own])
        return np.concatenate(blocks)

    def rows(self, stripe: slice, chosen: np.ndarray) -> Float[np.ndarray, "b n"]:
        """Some rows of one stripe, numbered within it, whole; reads the stripe's tiles."""
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
class TiledRows:
    """A rectangle of `shape` (m, n) in tiles of `edges`, such as a test kernel; `read` gives one."""

    shape: tuple[int, int]
    edges: tuple[int, int]
    read: Callable[[slice, slice], np.ndarray]

    def product(self, vectors: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "m v"]:
        """The rectangle times the vectors, in one pass."""
        lying = _lying(vectors)
        product = np.zeros((len(lying), self.shape[0]))
        rows, columns = (
            [slice(start, min(start + edge, length)) for start in range(0, length, edge)]
            for length, edge in zip(self.shape, self.edges, strict=True)
        )
        places = [(own, other) for own in rows for other in columns]
        for (own, other), tile in read_ahead(places, lambda place: np.asarray(self.read(*place), dtype=np.float64)):
            product[:, own] += lying[:, other] @ tile.T
        return np.ascontiguousarray(product.T)


def _lying(vectors: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "v n"]:
    """Vectors as rows: few of them times a tile take BLAS half as long so (measured, 20 and 84 with tiles of 4096)."""
    return np.ascontiguousarray(np.asarray(vectors, dtype=np.float64).T)
