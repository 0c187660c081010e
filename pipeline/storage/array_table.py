"""Which arrays a run's `kernel.zarr` holds, as one table: path, shape, shards, names of the axes.

The plan sums its bytes, the driver creates the arrays, the workers write their shards, `verify` checks them. It opens
nothing.

Axes: row (train), test rows are named test; column is a train example; draw, block, output, unit, parameter of
features.
"""

import math
from dataclasses import dataclass

import numpy as np

from nntk_dist.planning.feature_maps import forms_means
from nntk_dist.products.factor_form import METRIC_DRAWS
from nntk_dist.products.features import ArraySpec
from pipeline.job.job import SPLITS, Job


@dataclass(frozen=True)
class StoredArray:
    """One array of the store; `shards` is what one task writes at a time."""

    path: str
    shape: tuple[int, ...]
    shards: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def statistics_of(job: Job) -> dict[str, str]:
    """Array suffix -> what it holds: `gram` is the asked statistic (plugin for both), `gram_unbiased` the other."""
    if not job.spec.pair_blocks:
        names = {"": "plugin"}
    elif job.spec.statistic == "both":
        names = {"": "plugin", "_unbiased": "unbiased"}
    else:
        names = {"": job.spec.statistic}
    return names | ({"_stderr": "stderr"} if job.layout.stderr == "entry" else {})


def kernel_width(job: Job) -> int:
    """Kernel rows of one example: C for `full`, else 1."""
    return job.sizes.num_kernel_outputs if job.spec.meeting.full else 1


def kernel_arrays(job: Job) -> list[StoredArray]:
    """Train and test Gram matrices, where tiles are written, and the test diagonal, each with its companions."""
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


def holds_differences(job: Job) -> bool:
    """Whether features are output differences Δ, in one array for which Φ M Φᵀ is the kernel."""
    return job.decision.estimator == "weight" and not forms_means(job.spec, job.decision)


def holds_sketch(job: Job) -> bool:
    """Whether features are sketches of block means and nothing else, in one array for which Φ M Φᵀ is the kernel."""
    return job.decision.estimator == "autodiff" and job.decision.num_sketched == job.sizes.num_parameters


def holds_metric(job: Job) -> bool:
    """Whether the store keeps M: always for differences of paired blocks, which need it, else while it is small."""
    if holds_sketch(job):
        return True
    return holds_differences(job) and (job.spec.pair_blocks or job.sizes.num_draws <= METRIC_DRAWS)


def holds_factor(job: Job) -> bool:
    """Whether the store keeps features and M of which `gram` is Φ M Φᵀ: not where `gram` is `unbiased`."""
    is_plugin = not job.spec.pair_blocks or job.spec.statistic != "unbiased"
    return job.layout.store_features and holds_metric(job) and is_plugin


def feature_path(job: Job, split: str, name: str) -> str:
    """Where a feature array lies: differences, or sketches alone, are `features`; others are members of a group."""
    alone = holds_differences(job) or holds_sketch(job)
    return f"{split}/features" if alone else f"{split}/features/{name}"


def feature_arrays(job: Job, specs: tuple[ArraySpec, ...]) -> list[StoredArray]:
    """Features of both splits, in shards of (shard_rows, one chunk of draws)."""
    if not job.layout.store_features:
        return []
    arrays = []
    for split in SPLITS:
        rows = job.sizes.rows(split)
        for spec in specs:
            step = chunk_length(job, spec)
            shards = (min(job.layout.shard_rows, rows), step, *spec.shape[1:])
            path = feature_path(job, split, spec.name)
            axes = tuple(
                _output_axis(job, spec.shape[i]) if axis == "output" else axis for i, axis in enumerate(spec.axes)
            )
            arrays.append(StoredArray(path, (rows, *spec.shape), shards, ("row", *axes), job.layout.dtype))
    return arrays


def _output_axis(job: Job, length: int, other: str = "kernel_output") -> str:
    """`output`, or another name where the length differs: arrays of a group that share a name share its length."""
    return "output" if length == job.sizes.num_outputs else other


def chunk_length(job: Job, spec: ArraySpec) -> int:
    """How much of a feature array's first axis one chunk of draws fills."""
    return job.layout.chunk_draws * spec.shape[0] // job.sizes.num_draws


def all_arrays(
    job: Job, specs: tuple[ArraySpec, ...], targets: dict[str, np.ndarray], ids: dict[str, np.ndarray]
) -> list[StoredArray]:
    """Every array of the store."""
    arrays = kernel_arrays(job) + feature_arrays(job, specs)
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
    if holds_metric(job):
        axis, length = ("block", job.sizes.num_blocks) if holds_sketch(job) else ("draw", job.sizes.num_draws)
        arrays.append(StoredArray("metric", (length, length), (length, length), (axis, f"{axis}_col"), "float64"))
    return arrays
