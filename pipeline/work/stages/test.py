"""Stage `test`: the kernel of test rows with train columns, and of every test row with itself.

Tiles test/i/j, if tiles are written, and diagonal/i; each is written once.

Axes: i tile rows (test), j tile columns (train).
"""

from collections.abc import Iterator

from pipeline.job.job import Job, Task, intervals
from pipeline.work.context import Context, Written
from pipeline.work.gram_tiles import compute_tile, tile_order, write_tile
from pipeline.work.stage import Stage


class Test(Stage):
    """The kernel of test rows with train columns, and its diagonal."""

    name = "test"
    reads = ("features", "metric", "calibration")

    def tasks(self, job: Job) -> Iterator[Task]:
        """Yield all tiles of the rectangle, if tiles are written, then the pieces of the diagonal."""
        rows = len(intervals(job.sizes.num_test, job.layout.tile))
        columns = len(intervals(job.sizes.num_train, job.layout.tile))
        for i, j in tile_order(rows, columns, job.layout.tile_group) if job.layout.write_tiles else ():
            yield Task(self.name, f"test/{i}/{j}")
        for i in range(rows):
            yield Task(self.name, f"diagonal/{i}")

    def execute(self, context: Context, task: Task) -> Written:
        """Compute and write one tile or one piece of the diagonal."""
        kind, *numbers = task.tile.split("/")
        tile = context.job.layout.tile
        rows = ("test", *intervals(context.job.sizes.num_test, tile)[int(numbers[0])])
        written = Written()
        if kind == "diagonal":
            values = compute_tile(context, task, rows, rows, paired=True)
            write_tile(context, written, "test/diagonal", (rows[1],), values)
        else:
            columns = ("train", *intervals(context.job.sizes.num_train, tile)[int(numbers[1])])
            values = compute_tile(context, task, rows, columns)
            write_tile(context, written, "test/gram", (rows[1], columns[1]), values)
        return written
