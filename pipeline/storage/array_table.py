"""The table of all arrays of a run's `kernel.zarr`: path, shape, shards, names of the axes.

The plan sums their bytes, the driver creates them, the workers write their shards, `verify` checks them. This module
opens nothing; which arrays features have, they say themselves (`Job.features`).

Axes: row and col are train examples (row of the test arrays: test examples); row_output and col_output are kernel rows
of a `full` kernel. Feature arrays name their own axes.
"""

import math
from dataclasses import dataclass

import numpy as np

from nntk_dist.products.factor_form import FactorForm
from nntk_dist.products.feature_description import ArraySpec
from nntk_dist.spec import Statistic
from pipeline.job.job import SPLITS, Job


@dataclass(frozen=True)
class StoredArray:
    """One array of the store.

    Attributes:
        path: Path in the store.
        shape: Shape of the whole array.
        shards: Shape of what one task writes at a time.
        axes: Names of the axes.
        dtype: Name of the NumPy dtype.
    """

    path: str
    shape: tuple[int, ...]
    shards: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array before compression."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def statistics_of(job: Job) -> dict[str, str]:
    """Return array suffix -> statistic: `gram` has the requested one (plugin for `both`), `gram_unbiased` the other."""
    if not job.spec.pair_blocks:
        names = {"": "plugin"}
    elif job.spec.statistic == Statistic.BOTH:
        names = {"": "plugin", "_unbiased": "unbiased"}
    else:
        names = {"": job.spec.statistic}
    return names | ({"_stderr": "stderr"} if job.wanted.stderr else {})


def kernel_width(job: Job) -> int:
    """Return the kernel rows of one example: C for a `full` kernel, else 1."""
    return job.sizes.num_kernel_outputs if job.spec.meeting.full else 1


def stored_factor_form(job: Job) -> FactorForm | None:
    """Return the form of the explicit factor of `gram` that the store keeps, or None without one.

    There is none if features are not stored, if they are no factor, or if `gram` holds `unbiased`.
    """
    is_plugin = statistics_of(job)[""] == Statistic.PLUGIN
    stored = job.layout.store_features and is_plugin
    return job.features.factor_form(full=job.spec.meeting.full) if stored else None


def kernel_arrays(job: Job) -> list[StoredArray]:
    """Return the train and test Gram matrices, if tiles are written, and the test diagonal, for each statistic."""
    width, dtype = kernel_width(job), job.layout.dtype
    train, test = job.sizes.num_train * width, job.sizes.num_test * width
    names = ("row_output", "col_output") if job.spec.meeting.full else ("row", "col")
    arrays = []
    for suffix in statistics_of(job):
        edge = min(job.layout.tile, job.sizes.num_train) * width
        height = min(job.layout.tile, job.sizes.num_test) * width
        if job.layout.write_tiles:
            arrays.append(StoredArray(f"train/gram{suffix}", (train, train), (edge, edge), names, dtype))
            arrays.append(StoredArray(f"test/gram{suffix}", (test, train), (height, edge), names, dtype))
        shape: tuple[int, ...] = (job.sizes.num_test,)
        axes: tuple[str, ...] = ("row",)
        if job.spec.meeting.full:
            shape, axes = (*shape, width, width), ("row", "output", "output_col")
        shard = (min(job.layout.tile, job.sizes.num_test), *shape[1:])
        arrays.append(StoredArray(f"test/diagonal{suffix}", shape, shard, axes, dtype))
    return arrays


def feature_arrays(job: Job) -> list[StoredArray]:
    """Return the features of both splits, if they are stored, in shards of (shard_rows, one chunk of draws)."""
    if not job.layout.store_features:
        return []
    arrays = []
    for split in SPLITS:
        rows = job.sizes.rows(split)
        for spec in job.features.arrays:
            shards = (min(job.layout.shard_rows, rows), chunk_length(job, spec), *spec.shape[1:])
            axes = tuple(
                _output_axis(job, length) if axis == "output" else axis
                for axis, length in zip(spec.axes, spec.shape, strict=True)
            )
            path = job.features.path(split, spec)
            arrays.append(StoredArray(path, (rows, *spec.shape), shards, ("row", *axes), job.layout.dtype))
    return arrays


def _output_axis(job: Job, length: int, other: str = "kernel_output") -> str:
    """Return `output`, or `other` for another length: arrays of a group that share an axis name share its length."""
    return "output" if length == job.sizes.num_outputs else other


def chunk_length(job: Job, spec: ArraySpec) -> int:
    """Return how much of a feature array's first axis one chunk of draws fills."""
    return job.layout.chunk_draws * spec.shape[0] // job.sizes.num_draws


def all_arrays(job: Job, targets: dict[str, np.ndarray], ids: dict[str, np.ndarray]) -> list[StoredArray]:
    """Return every array of the store; `targets` and `ids` are by split."""
    arrays = kernel_arrays(job) + feature_arrays(job)
    for split in SPLITS:
        rows = job.sizes.rows(split)
        step = min(job.layout.shard_rows, rows)
        outputs = job.sizes.num_outputs
        arrays.append(
            StoredArray(f"{split}/outputs", (rows, outputs), (step, outputs), ("row", "output"), job.layout.dtype)
        )
        for name, values in (("targets", targets[split]), ("id", ids[split])):
            axes = ("row",) if values.ndim == 1 else ("row", _output_axis(job, values.shape[1], "target"))
            arrays.append(
                StoredArray(f"{split}/{name}", values.shape, (step, *values.shape[1:]), axes, str(values.dtype))
            )
    if job.features.metric is not None:
        metric = job.features.metric
        arrays.append(StoredArray(metric.name, metric.shape, metric.shape, metric.axes, "float64"))
    return arrays
