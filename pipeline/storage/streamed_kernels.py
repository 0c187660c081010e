"""Stored Gram matrices as kernels that the solvers read tile by tile.

Axes: n train rows, m test rows.
"""

import numpy as np

from nntk_dist.analysis.streamed_kernel import TiledKernel, TiledRows
from pipeline.storage.kernel_arrays import KernelArrays


def stored_tiles(store: KernelArrays, path: str) -> TiledKernel:
    """A square array in tiles that are its shards."""
    array = store.array(path)
    return TiledKernel(
        array.shape[0],
        max(array.shards or array.chunks),
        lambda rows, columns: store.read(path, rows, columns, dtype=np.float64),
    )


def stored_rectangle(store: KernelArrays, path: str) -> TiledRows:
    """Any array of two axes in tiles that are its shards."""
    array = store.array(path)
    height, width = array.shards or array.chunks
    shape = (array.shape[0], array.shape[1])
    return TiledRows(shape, (height, width), lambda rows, columns: store.read(path, rows, columns, dtype=np.float64))
