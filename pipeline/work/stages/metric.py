"""Stage `metric`: the matrix M of features that are an explicit factor, `plugin = Φ M Φᵀ`; one task for the whole
kernel.

Axes: s draws, or r blocks.
"""

from collections.abc import Iterator

from nntk_dist.statistics.tile_estimates import scale_factor
from pipeline.job.job import Job, Task
from pipeline.work.context import Context, Written
from pipeline.work.stage import Stage


class Metric(Stage):
    """The metric M of features whose kernel is Φ M Φᵀ."""

    name = "metric"

    def tasks(self, job: Job) -> Iterator[Task]:
        """Yield one task if the store keeps a metric."""
        if job.features.metric is not None:
            yield Task(self.name, "metric")

    def execute(self, context: Context, task: Task) -> Written:
        """Make the metric and write it."""
        metric, spec = context.features.make_metric(), context.job.features.metric
        assert metric is not None
        assert spec is not None
        written = Written()
        factor = scale_factor(context.job.spec.scale, context.job.sizes.num_parameters)
        context.write(written, spec.name, (0, 0), metric * factor)
        return written
