"""Stage `gram`: the train kernel, tile by tile; tile train/i/j with i ≤ j is computed once and written twice.

The mirror image makes the stored matrix bitwise symmetric. Tiles run in groups of columns whose features a worker
keeps.

Axes: i, j tile rows and columns.
"""

from collections.abc import Iterator

from pipeline.job.job import Job, Task, intervals
from pipeline.work.context import Context, Written
from pipeline.work.gram_tiles import compute_tile, tile_order, write_tile
from pipeline.work.stage import Stage


class Gram(Stage):
    """The train kernel."""

    name = "gram"
    reads = ("features", "metric", "calibration")

    def tasks(self, job: Job) -> Iterator[Task]:
        """Yield the upper triangle of tiles, if tiles are written."""
        if not job.layout.write_tiles:
            return
        count = len(intervals(job.sizes.num_train, job.layout.tile))
        for i, j in tile_order(count, count, job.layout.tile_group, upper=True):
            yield Task(self.name, f"train/{i}/{j}")

    def execute(self, context: Context, task: Task) -> Written:
        """Compute one tile; write it and its mirror image."""
        i, j = map(int, task.tile.split("/")[1:])
        bounds = intervals(context.job.sizes.num_train, context.job.layout.tile)
        values = compute_tile(context, task, ("train", *bounds[i]), ("train", *bounds[j]))
        written = Written()
        write_tile(context, written, "train/gram", (bounds[i][0], bounds[j][0]), values, mirrored=i != j)
        return written
