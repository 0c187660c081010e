"""Stage `features`: outputs, targets, ids, and the features of one shard of rows under one chunk of draws.

Tile: split/row shard/draw chunk. A task writes whole shards; the first chunk also brings outputs, targets and ids. If
features are recomputed for every tile, there is only the first chunk. If the job has siblings, other groups of
parameters, their features are computed in the same passes.

Axes: n rows, s draws, c outputs.
"""

from collections.abc import Iterator

from pipeline.job.job import SPLITS, Job, Task, intervals
from pipeline.storage.array_table import chunk_length
from pipeline.work.context import Context, Written
from pipeline.work.stage import Stage


class Features(Stage):
    """Outputs, targets, ids and features of all examples."""

    name = "features"

    def tasks(self, job: Job) -> Iterator[Task]:
        """Yield one task for each row shard and draw chunk."""
        chunks = len(intervals(job.sizes.num_draws, job.layout.chunk_draws)) if job.layout.store_features else 1
        for split in SPLITS:
            for shard in range(len(intervals(job.sizes.rows(split), job.layout.shard_rows))):
                for chunk in range(chunks):
                    yield Task(self.name, f"{split}/{shard}/{chunk}")

    def execute(self, context: Context, task: Task) -> Written:
        """Compute and write the shards of one task."""
        job = context.job
        split, shard, chunk = task.tile.split("/")[0], *map(int, task.tile.split("/")[1:])
        start, stop = intervals(job.sizes.rows(split), job.layout.shard_rows)[shard]
        rows = slice(start, stop)
        x = context.inputs(split, rows)
        written = Written(beside={name: Written() for name in context.siblings})
        groups = {job.spec.group or "": (context, written)}
        groups |= {name: (each, written.beside[name]) for name, each in context.siblings.items()}
        if chunk == 0:
            data, outputs = getattr(context.dataset, split), context.outputs(x)
            for each, own in groups.values():
                each.write(own, f"{split}/targets", (start,), data.targets[rows])
                each.write(own, f"{split}/id", (start,), data.ids[rows])
                each.write(own, f"{split}/outputs", (start,), outputs)
        if job.layout.store_features:
            first, last = intervals(job.sizes.num_draws, job.layout.chunk_draws)[chunk]
            features = context.fitting.run(
                lambda batch: context.compute_groups(
                    x, context.keys(split, rows), range(first, last), context.features.columns, batch=batch
                )
            )
            for name, (each, own) in groups.items():
                for spec in each.job.features.arrays:
                    position = (start, chunk * chunk_length(each.job, spec))
                    each.write(own, each.job.features.path(split, spec), position, features[name][spec.name])
        return written
