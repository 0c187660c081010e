"""The stored factor of a run as rows that solvers read: features and metric of `kernel.zarr`, shard by shard.

It reads and reshapes; what the features mean is defined in `nntk_dist.products.factor_form`.

Axes: n examples, F columns of the factor.
"""

import numpy as np

from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.products.factor_form import FactorForm
from pipeline.job.job import intervals
from pipeline.storage.kernel_arrays import KernelArrays


def factor_rows(store: KernelArrays, form: FactorForm, split: str) -> FactorRows:
    """Return the rows of W, `gram = W Wᵀ`, of one split."""
    root = form.root(store.read("metric"))
    return _rows(store, form, split, root, form.num_columns_with(root))


def feature_columns(store: KernelArrays, form: FactorForm, split: str) -> FactorRows:
    """Return the rows of Φ of output differences, draws within outputs, for any metric."""
    return _rows(store, form, split, None, form.num_columns)


def _rows(store: KernelArrays, form: FactorForm, split: str, root: np.ndarray | None, num_columns: int) -> FactorRows:
    array = store.array(f"{split}/features")
    shards = array.shards or array.chunks
    pieces = intervals(array.shape[1], shards[1] if form.is_sketch else array.shape[1])

    def read(interval: tuple[int, int]) -> np.ndarray:
        """Read one row of shards: for sketches a shard at a time, since shards add up."""
        total = None
        for start, stop in pieces:
            values = store.read(f"{split}/features", slice(*interval), slice(start, stop))
            part = form.columns(values) if root is None else form.rows(values, root)
            total = part if total is None else np.add(total, part, out=total)
        assert total is not None
        return total

    num_rows = array.shape[0] * form.rows_per_example
    return FactorRows(num_rows, num_columns, tuple(intervals(array.shape[0], shards[0])), read)
