"""Stage `calibration`: the level of the standard errors and the relative error, from a fixed sample of entries.

One task for each array that carries standard errors: tile train, test or diagonal. The sample depends on the seed and
the size of the kernel, never on tiles; its features are computed afresh from the model. Nothing is written but numbers.

Axes: n sampled rows, r blocks.
"""

from collections.abc import Iterator

import numpy as np
import torch

from nntk_dist.block_sums import Meeting
from nntk_dist.statistics import calibrate, sample_entries, sample_limit
from nntk_dist.tiles import group_sums
from pipeline.arrays import kernel_width
from pipeline.context import Context, Written
from pipeline.job import Job, Task

NAME = "calibration"
USES_ALL_THREADS = False
_DIAGONAL_ENTRIES = 256


def tasks(job: Job) -> Iterator[Task]:
    """Three tasks where there are standard errors or a relative error to state."""
    if job.layout.stderr != "none":
        for tile in ("train", "test", "diagonal"):
            yield Task(NAME, tile)


def execute(context: Context, task: Task) -> Written:
    """Calibrate one array."""
    job = context.job
    splits = {"train": ("train", "train"), "test": ("test", "train"), "diagonal": ("test", "test")}[task.tile]
    counts = [job.sizes.rows(split) for split in splits]
    if task.tile == "diagonal":
        rows, _ = sample_entries(job.spec.seed, counts[0], 1, _DIAGONAL_ENTRIES)
        columns = rows
    else:
        rows, columns = sample_entries(job.spec.seed, counts[0], counts[1], sample_limit(kernel_width(job)))
    meeting = Meeting(full=job.spec.meeting.full, paired=task.tile == "diagonal")
    features = context.features_with_metric
    products: torch.Tensor | None = None
    by_group: torch.Tensor | None = None
    for part in context.output_parts():
        left = context.compute(splits[0], np.asarray(rows), part)
        same = splits[0] == splits[1] and torch.equal(rows, columns)
        right = left if same else context.compute(splits[1], np.asarray(columns), part)
        product = features.block_products(left, right, meeting)
        products = product if products is None else products + product
        grouped = group_sums(features, left, right, meeting)
        by_group = grouped if by_group is None or grouped is None else by_group + grouped
    assert products is not None
    result = calibrate(products, pair_blocks=features.pair_blocks, by_group=by_group)
    numbers = {"level": result.level, "relative_error": result.relative_error, "num_entries": float(result.num_entries)}
    return Written(numbers=numbers)
