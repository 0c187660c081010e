"""Stored Gram matrices in the forms that solvers read: whole, tile by tile, or as the stored factor.

Axes: n train rows, m test rows.
"""

import numpy as np

from nntk_dist.analysis.kernel_forms import IndefiniteFactor, KernelForms
from nntk_dist.analysis.streamed_kernel import StreamedKernel, StreamedRectangle
from nntk_dist.products.factor_form import FactorForm, unbiased_metric
from pipeline.job.job import Job
from pipeline.storage.array_table import stored_factor_form
from pipeline.storage.factor import factor_rows, feature_columns
from pipeline.storage.kernel_arrays import KernelArrays


def train_forms(store: KernelArrays, job: Job, suffix: str = "") -> KernelForms[StreamedKernel]:
    """Return the forms of the train kernel; `suffix` is empty or `_unbiased`."""
    path, factor = f"train/gram{suffix}", stored_factor_form(job)
    tiles = job.layout.write_tiles
    return KernelForms(
        matrix=(lambda: store.read(path)) if tiles else None,
        tiles=(lambda: streamed_kernel(store, path)) if tiles else None,
        factor=None if suffix or factor is None else lambda: factor_rows(store, factor, "train"),
        indefinite=None if not suffix or factor is None or factor.is_sketch else lambda: _unbiased(store, job, factor),
    )


def test_forms(store: KernelArrays, job: Job) -> KernelForms[StreamedRectangle]:
    """Return the forms of the test kernel, test rows by train columns."""
    factor, tiles = stored_factor_form(job), job.layout.write_tiles
    return KernelForms(
        matrix=(lambda: store.read("test/gram")) if tiles else None,
        tiles=(lambda: streamed_rectangle(store, "test/gram")) if tiles else None,
        factor=None if factor is None else lambda: factor_rows(store, factor, "test"),
    )


def streamed_kernel(store: KernelArrays, path: str) -> StreamedKernel:
    """Return a square array in tiles that are its shards."""
    array = store.array(path)
    edge = max(array.shards or array.chunks)
    return StreamedKernel(array.shape[0], edge, lambda rows, columns: store.read(path, rows, columns))


def streamed_rectangle(store: KernelArrays, path: str) -> StreamedRectangle:
    """Return an array of two axes in tiles that are its shards."""
    array = store.array(path)
    height, width = array.shards or array.chunks
    shape = (array.shape[0], array.shape[1])
    return StreamedRectangle(
        shape, (height, width), lambda rows, columns: store.read(path, rows, columns, dtype=np.float64)
    )


def _unbiased(store: KernelArrays, job: Job, factor: FactorForm) -> IndefiniteFactor:
    """The unbiased statistic from output differences with another metric; sketches would need every block's columns."""
    metric = unbiased_metric(store.read("metric"), job.sizes.num_blocks)
    return IndefiniteFactor(feature_columns(store, factor, "train"), metric)
