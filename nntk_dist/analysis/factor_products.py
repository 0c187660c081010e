"""Products of the columns of a factor W whose rows are read in blocks: the small matrix WᵀW of the factored solvers.

Everything is float64, even if rows were stored in float32. WᵀW squares its entries: in float32 its eigenvalues would
err by 1e-7 of the largest one, λ, and a ridge of 1e-4 of the mean diagonal is about 1e-8 λ at 60,000 rows; in float64
they err no more than a dense decomposition of K = W Wᵀ.

Axes: n kernel rows, F columns of W, t further columns.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.errors import DataError


def column_products(
    rows: FactorRows, right: Float[np.ndarray, "n t"] | None = None
) -> tuple[Float64[Tensor, "F F"], Float64[Tensor, "F t"]]:
    """Compute `WᵀW` and `Wᵀ·right` in one pass over the rows; 2·n·F·(F + t) operations.

    Raises:
        DataError: the rows are not finite.
    """
    right = np.empty((rows.num_rows, 0)) if right is None else right
    products = torch.zeros(rows.num_columns, rows.num_columns, dtype=torch.float64)
    projected = torch.zeros(rows.num_columns, right.shape[1], dtype=torch.float64)
    for selection, block in numbered_blocks(rows):
        products.addmm_(block.T, block)
        projected.addmm_(block.T, torch.from_numpy(right[selection]))
    if not bool(torch.isfinite(products).all()):
        raise DataError(
            "the kernel's factor holds values that are NaN or infinite; check that the run finished and that the "
            "model's outputs are finite"
        )
    return products, projected


def numbered_blocks(rows: FactorRows) -> Iterator[tuple[slice, Float64[Tensor, "n F"]]]:
    """Iterate over blocks of rows, each with its row numbers."""
    start = 0
    for block in rows.blocks():
        yield slice(start, start + len(block)), torch.from_numpy(block)
        start += len(block)
