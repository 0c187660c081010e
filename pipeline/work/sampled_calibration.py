"""The calibration of an array from a fixed sample of its entries; the stages `calibration` and `pilot` share this.

The sample depends on the seed and the size of the kernel, never on tiles.

Axes: n sampled rows.
"""

from collections.abc import Iterator

import numpy as np
import torch

from nntk_dist.products.block_sums import Meeting
from nntk_dist.products.features import FeatureMap, Rows
from nntk_dist.statistics.standard_errors import SAMPLE_ENTRIES, Calibration, sample_entries, sample_limit
from nntk_dist.statistics.tile_estimates import calibrate_sample
from pipeline.job.job import Job
from pipeline.storage.array_table import kernel_width
from pipeline.work.context import Context

_DIAGONAL_ENTRIES = 256
_SPLITS = {"train": ("train", "train"), "test": ("test", "train"), "diagonal": ("test", "test")}
CALIBRATED = tuple(_SPLITS)


def calibrate_array(
    context: Context, features: FeatureMap, name: str, *, stored: bool = False, entries: int = SAMPLE_ENTRIES
) -> Calibration:
    """Calibrate `train`, `test` or `diagonal` (the diagonal of the test kernel) from up to `entries` entries.

    The features of their rows are read from the store if they are `stored`, and computed otherwise.
    """
    job, splits = context.job, _SPLITS[name]
    rows, columns = _sample(job, name, entries)
    same = splits[0] == splits[1] and torch.equal(rows, columns)

    def parts() -> Iterator[tuple[Rows, Rows]]:
        for part in context.output_parts():
            left = context.sampled_rows(splits[0], np.asarray(rows), part, stored=stored)
            yield left, left if same else context.sampled_rows(splits[1], np.asarray(columns), part, stored=stored)

    return calibrate_sample(features, parts(), Meeting(full=job.spec.meeting.full, paired=name == "diagonal"))


def most_sampled_rows(job: Job) -> int:
    """Return the largest number of rows and columns with features in memory; on the diagonal they are the same."""
    crossings = [sum(map(len, _sample(job, name, SAMPLE_ENTRIES))) for name in ("train", "test")]
    return max(*crossings, len(_sample(job, "diagonal", SAMPLE_ENTRIES)[0]))


def _sample(job: Job, name: str, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the sampled rows and columns."""
    counts = [job.sizes.rows(split) for split in _SPLITS[name]]
    if name == "diagonal":
        rows, _ = sample_entries(job.spec.seed, counts[0], 1, _DIAGONAL_ENTRIES)
        return rows, rows
    return sample_entries(job.spec.seed, counts[0], counts[1], sample_limit(kernel_width(job), entries))
