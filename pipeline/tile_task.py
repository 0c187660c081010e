"""A Gram tile as a task: features of its rows and columns in, arrays out. What the stages `gram` and `test` share.

Axes: rows and columns of one tile, in kernel rows (C for an example of a `full` kernel).
"""

import torch
from torch import Tensor

from nntk_dist.block_sums import Meeting
from nntk_dist.statistics import Calibration
from nntk_dist.tiles import tile_estimates
from pipeline.arrays import kernel_width, statistics_of
from pipeline.context import Context, Written
from pipeline.job import Task

Interval = tuple[str, int, int]


def compute_tile(
    context: Context, task: Task, row: Interval, column: Interval, *, paired: bool = False
) -> dict[str, Tensor]:
    """plugin, unbiased and stderr (those that exist) of the rows and columns in two intervals, float64."""
    job = context.job
    calibration = None
    if job.layout.stderr == "entry":
        calibration = Calibration(level=float(task.arguments["level"]), relative_error=float("nan"), num_entries=0)
    meeting = Meeting(full=job.spec.meeting.full, paired=paired)
    parts = context.feature_parts(row, column)
    return tile_estimates(context.features_with_metric, parts, meeting, calibration, job.spec.scale)


def write_tile(
    context: Context, written: Written, prefix: str, start: tuple[int, ...], values: dict[str, Tensor]
) -> None:
    """Write the arrays of one tile and add up what the driver wants to know of it; `start` counts examples."""
    width = kernel_width(context.job)
    scaled = tuple(position * width for position in start) if len(start) == 2 else start
    for suffix, name in statistics_of(context.job).items():
        context.write(written, f"{prefix}{suffix}", scaled, values[name].to(context.dtype))
    sums: dict[str, Tensor] = {}
    if "unbiased" in values:
        sums["squared_unbiased"] = values["unbiased"].square().sum()
        sums["squared_difference"] = (values["plugin"] - values["unbiased"]).square().sum()
    if "stderr" in values:
        finite = values["stderr"].nan_to_num(0.0)
        sums["squared_stderr"] = finite.square().sum()
        sums["unresolved"] = torch.isnan(values["stderr"]).sum()
    for name, total in sums.items():
        key = f"{prefix}:{name}"
        written.numbers[key] = written.numbers.get(key, 0.0) + float(total)
