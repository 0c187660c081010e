"""Stage `gram`: the train kernel, tile by tile; tile train/i/j with i ≤ j is computed once and written twice.

The mirror image makes the stored matrix bitwise symmetric. Tiles run row by row, so that a worker's row features are
reused.

Axes: i, j tile rows and columns.
"""

from collections.abc import Iterator

from pipeline.context import Context, Written
from pipeline.job import Job, Task, intervals
from pipeline.tile_task import compute_tile, write_tile

NAME = "gram"
USES_ALL_THREADS = False


def tasks(job: Job) -> Iterator[Task]:
    """The upper triangle of tiles."""
    count = len(intervals(job.sizes.num_train, job.layout.tile))
    for i in range(count):
        for j in range(i, count):
            yield Task(NAME, f"train/{i}/{j}")


def execute(context: Context, task: Task) -> Written:
    """Compute one tile; write it and its mirror image."""
    i, j = map(int, task.tile.split("/")[1:])
    bounds = intervals(context.job.sizes.num_train, context.job.layout.tile)
    values = compute_tile(context, task, ("train", *bounds[i]), ("train", *bounds[j]))
    written = Written()
    write_tile(context, written, "train/gram", (bounds[i][0], bounds[j][0]), values)
    if i != j:
        mirrored = {name: tile.T for name, tile in values.items()}
        write_tile(context, written, "train/gram", (bounds[j][0], bounds[i][0]), mirrored)
    return written
