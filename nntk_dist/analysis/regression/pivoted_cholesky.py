"""A low-rank approximation of a kernel, `K ≈ U Σ Uᵀ ≤ K`, from some of its columns; it preconditions solvers.

Randomly pivoted Cholesky (Chen, Epperly, Tropp & Webber 2022; as a preconditioner Díaz et al. 2023). Reading a column
means reading all tiles that it crosses, so pivots are drawn stripe by stripe. A stripe is drawn with probability
proportional to what is left of its trace, at most once; within a stripe, a row is drawn with probability proportional
to what is left of its diagonal entry.

Axes: n kernel rows, r pivots (the rank), v vectors, d rows of one example.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float, Int

from nntk_dist.analysis.streamed_kernel import StreamedKernel
from nntk_dist.sampling.philox import uniform
from nntk_dist.sampling.streams import PIVOT_SAMPLE, Stream

_ROWS_AT_ONCE = 4096
_SPENT = 1e-6  # of the largest diagonal entry: less is rounding of entries stored in float32


@dataclass(frozen=True)
class LowRankApproximation:
    """The matrix `U Σ Uᵀ`.

    Attributes:
        basis: U, with orthonormal columns.
        eigenvalues: Σ.
        trace_left: the share of the kernel's trace that is not in it.
        unexplained: what the pivots of other examples leave of each diagonal entry.
    """

    basis: Float[np.ndarray, "n r"]
    eigenvalues: Float[np.ndarray, " r"]
    trace_left: float
    unexplained: Float[np.ndarray, " n"]

    def solve(self, vectors: Float[np.ndarray, "n v"], ridges: Float[np.ndarray, " v"]) -> Float[np.ndarray, "n v"]:
        """Compute `(U Σ Uᵀ + μI)⁻¹·vectors`, each vector with its own ridge; symmetric and positive definite."""
        inner = self.basis.T @ vectors
        gain = 1.0 / (self.eigenvalues[:, None] + ridges) - 1.0 / ridges
        return vectors / ridges + self.basis @ (gain * inner)

    def inverse_blocks(self, ridge: float, size: int) -> Float[np.ndarray, "n/d d d"]:
        """Return the blocks on the diagonal of `(U Σ Uᵀ + μI)⁻¹`, computed some rows at a time."""
        gains = 1.0 / (self.eigenvalues + ridge) - 1.0 / ridge
        blocks = np.empty((len(self.basis) // size, size, size))
        for rows in _stripes(len(blocks)):
            own = self.basis[rows.start * size : rows.stop * size].reshape(rows.stop - rows.start, size, len(gains))
            blocks[rows] = (own * gains) @ own.transpose(0, 2, 1)
        return blocks + np.eye(size) / ridge


def low_rank_approximation(
    kernel: StreamedKernel,
    diagonal: Float[np.ndarray, " n"],
    *,
    rank: int,
    least: float = 0.0,
    size: int = 1,
    seed: int = 0,
) -> LowRankApproximation:
    """Approximate a positive semidefinite kernel; for an indefinite one the result is some low-rank matrix.

    Cost: at most one pass over the whole square (two of the upper triangle), 6·n·r² operations, n·r numbers.

    Args:
        kernel: the kernel.
        diagonal: its diagonal.
        rank: the most pivots.
        least: stop when less of the trace is left.
        size: rows of one example.
        seed: of the pivots.
    """
    num_rows, stripes = kernel.num_rows, kernel.stripes
    rank = min(rank, num_rows)
    share = math.ceil(rank / len(stripes))
    factor = np.empty((num_rows, rank), order="F")
    left, count = np.maximum(diagonal, 0.0), 0
    chosen: list[int] = []
    spent = _SPENT * float(left.max(initial=0.0))
    unread = list(range(len(stripes)))
    chances = uniform(seed, Stream.SAMPLE, torch.tensor([PIVOT_SAMPLE]), len(stripes))[0].numpy()
    for chance in chances:
        if count == rank or left.sum() <= least:
            break
        weights = np.array([left[stripes[index]].sum() for index in unread])
        position = _drawn(weights, float(chance))
        index = unread.pop(position)
        rows, own = stripes[index], slice(count, min(rank, count + share))
        known = factor[:, :count]
        diagonal_tile = np.asarray(kernel.read(rows, rows), dtype=np.float64) - known[rows] @ known[rows].T
        pivots = _pivots(diagonal_tile, own.stop - own.start, spent, seed, index)
        if not len(pivots):
            continue
        columns = kernel.rows(rows, pivots).T - known @ known[rows][pivots].T
        lower = np.linalg.cholesky(columns[rows][pivots])
        chosen.extend((rows.start + pivots).tolist())
        new = slice(count, count + len(pivots))
        factor[:, new] = scipy.linalg.solve_triangular(lower, columns.T, lower=True).T
        left -= np.square(factor[:, new]).sum(axis=1)
        np.maximum(left, 0.0, out=left)
        count = new.stop
    total = float(np.maximum(diagonal, 0.0).sum())
    unexplained = _unexplained(left, factor[:, :count], np.array(chosen, dtype=np.int64), size)
    basis, values = _orthonormal(factor[:, :count])
    return LowRankApproximation(basis, values, float(left.sum()) / total if total > 0 else 0.0, unexplained)


def _unexplained(
    left: Float[np.ndarray, " n"], factor: Float[np.ndarray, "n r"], pivots: Int[np.ndarray, " r"], size: int
) -> Float[np.ndarray, " n"]:
    """What pivots of other examples leave of each diagonal entry, from what all pivots leave and the factor."""
    result = left.copy()
    if not len(pivots):
        return result
    inverse = scipy.linalg.solve_triangular(
        factor[pivots], np.eye(len(pivots)), lower=True
    )  # K_PP⁻¹ = inverseᵀ·inverse
    for example in np.unique(pivots // size):
        own = inverse[:, pivots // size == example]
        part = factor[example * size : (example + 1) * size] @ own  # the example's rows of K_·P K_PP⁻¹
        result[example * size : (example + 1) * size] += np.einsum(
            "dp,pd->d", part, np.linalg.solve(own.T @ own, part.T)
        )
    return result


def _orthonormal(
    factor: Float[np.ndarray, "n r"],
) -> tuple[Float[np.ndarray, "n q"], Float[np.ndarray, " q"]]:
    """U and Σ with `F Fᵀ = U Σ Uᵀ`, in the memory of F, from `Fᵀ F`; directions lost in rounding are dropped.

    Each σ errs by about ε·‖Σ‖/σ, far less than a preconditioner needs.
    """
    values, inner = np.linalg.eigh(factor.T @ factor)
    kept = values > len(values) * np.finfo(np.float64).eps * values.max(initial=0.0)
    values, inner = values[kept][::-1], inner[:, kept][:, ::-1]
    inner = inner / np.sqrt(values)
    for rows in _stripes(len(factor)):
        factor[rows, : len(values)] = factor[rows] @ inner
    return factor[:, : len(values)], values


def _stripes(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, count))


def _drawn(weights: Float[np.ndarray, " s"], chance: float) -> int:
    """The index that a number from (0, 1) selects with these weights; the first if all are 0."""
    sums = np.cumsum(weights)
    return int(min(np.searchsorted(sums, chance * sums[-1]), len(weights) - 1))


def _pivots(left: Float[np.ndarray, "h h"], most: int, spent: float, seed: int, index: int) -> Int[np.ndarray, " b"]:
    """At most `most` rows of a stripe, by random pivoting on the remainder of its diagonal tile (overwritten)."""
    chances = uniform(seed, Stream.SAMPLE, torch.tensor([PIVOT_SAMPLE + 1 + index]), most)[0].numpy()
    chosen: list[int] = []
    diagonal = np.diagonal(left).copy()
    columns = np.empty((len(left), most))
    for position, chance in enumerate(chances):
        weights = np.where(diagonal > spent, diagonal, 0.0)
        if not weights.any():
            break
        pivot = _drawn(weights, float(chance))
        column = left[:, pivot] - columns[:, :position] @ columns[pivot, :position]
        columns[:, position] = column / np.sqrt(column[pivot])
        diagonal -= np.square(columns[:, position])
        diagonal[pivot] = 0.0
        chosen.append(pivot)
    return np.array(chosen, dtype=np.int64)
