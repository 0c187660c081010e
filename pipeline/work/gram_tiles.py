"""Gram tiles as tasks: features of rows and columns in, arrays out. The stages `gram` and `test` share this.

Axes: rows and columns of one tile, in kernel rows (C for each example of a `full` kernel).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nntk_dist.products.block_sums import Meeting
from nntk_dist.runtime.precision import multiplying
from nntk_dist.statistics.overflow import check_no_overflow
from nntk_dist.statistics.standard_errors import Calibration
from nntk_dist.statistics.tile_estimates import tile_estimates
from pipeline.job.job import Task
from pipeline.storage.array_table import kernel_width, statistics_of
from pipeline.work.context import Context, FeatureParts, Interval, Written

# Float64 entries of a stripe: two arrays of them fit into the second cache. A GPU needs fewer calls.
_STRIPE_ENTRIES, _GPU_STRIPE_ENTRIES = 1 << 16, 1 << 22


def compute_tile(
    context: Context, task: Task, row: Interval, column: Interval, *, paired: bool = False
) -> dict[str, Tensor]:
    """Compute the statistics of the rows and columns in two intervals, in the stored dtype."""
    job = context.job
    calibration = None
    if job.wanted.stderr:
        calibration = Calibration(level=float(task.arguments["level"]), relative_error=float("nan"), num_entries=0)
    meeting = Meeting(full=job.spec.meeting.full, paired=paired)
    parts = FeatureParts(context, row, column)
    features, dtype = context.features_with_metric, context.dtype
    with multiplying(job.layout.matmul_precision):
        values = tile_estimates(
            features, parts, meeting, calibration, job.spec.scale, dtype=dtype, empty=context.results.empty
        )
    check_no_overflow(values["plugin"], row[:2], column[:2], kernel_width(job))
    return values


def tile_order(num_rows: int, num_columns: int, group: int, *, upper: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the tiles (i, j) of a matrix in an order that needs few features at a time.

    Columns form groups. A worker can keep the features of one group and of two rows, since the oldest row set is
    dropped only after all columns were used. Within a group the order is row by row, so a row set is needed once for
    each group, and a column set once in all.

    Args:
        num_rows: Rows of tiles.
        num_columns: Columns of tiles.
        group: Columns of a group.
        upper: Yield only the upper triangle, i ≤ j.
    """
    for first in range(0, num_columns, group):
        columns = range(first, min(first + group, num_columns))
        for i in range(min(num_rows, columns.stop) if upper else num_rows):
            for j in columns:
                if not upper or i <= j:
                    yield i, j


def write_tile(
    context: Context,
    written: Written,
    prefix: str,
    start: tuple[int, ...],
    values: dict[str, Tensor],
    *,
    mirrored: bool = False,
) -> None:
    """Leave the arrays of one tile for the context to write, and add up the numbers that the driver needs.

    Args:
        context: The worker's context.
        written: Takes the pieces and the numbers.
        prefix: Path of the array without its suffix.
        start: Place of the tile, in examples.
        values: The statistics.
        mirrored: Whether to write the transposed tile too.
    """
    width = kernel_width(context.job)
    totals = tile_totals(values)
    written.results.extend(values.values())
    values = {name: each.to("cpu") for name, each in values.items()}  # once, also if it is written twice
    place = tuple(position * width for position in start) if len(start) == 2 else start
    statistics = statistics_of(context.job)
    for suffix, name in statistics.items() if mirrored else ():  # first, since these take the longest
        context.write_later(written, f"{prefix}{suffix}", place[::-1], values[name].T)
    for suffix, name in statistics.items():
        context.write_later(written, f"{prefix}{suffix}", place, values[name])
    for name, total in totals.items():
        key = f"{prefix}:{name}"
        written.numbers[key] = written.numbers.get(key, 0.0) + total * (2 if mirrored else 1)


def tile_totals(values: dict[str, Tensor]) -> dict[str, float]:
    """Return the sums over one tile that the driver adds up, in float64, a stripe at a time in the same memory."""
    sums: dict[str, Tensor] = {}
    entries = _GPU_STRIPE_ENTRIES if any(tile.is_cuda for tile in values.values()) else _STRIPE_ENTRIES
    buffers = {name: tile.new_empty(min(entries, tile.numel()), dtype=torch.float64) for name, tile in values.items()}

    def add(name: str, total: Tensor) -> None:
        sums[name] = sums[name] + total if name in sums else total

    for parts in zip(*(tile.flatten().split(entries) for tile in values.values()), strict=True):
        stripe = {name: buffers[name][: len(part)].copy_(part) for name, part in zip(values, parts, strict=True)}
        if "unbiased" in stripe:
            add("squared_unbiased", stripe["unbiased"] @ stripe["unbiased"])
            difference = stripe["plugin"].sub_(stripe["unbiased"])
            add("squared_difference", difference @ difference)
        if "stderr" in stripe:
            add("unresolved", torch.isnan(stripe["stderr"]).sum())
            known = stripe["stderr"].nan_to_num_(0.0)
            add("squared_stderr", known @ known)
    return {name: float(total) for name, total in sums.items()}  # read once: a GPU is waited for
