"""Stage `metric`: the matrix M of a kernel Φ M Φᵀ whose features are one array: output differences, or sketches; one
task, since M belongs to no row.

Axes: s draws, or r blocks.
"""

from collections.abc import Iterator

from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.statistics.tile_estimates import scale_factor
from pipeline.job.job import Job, Task
from pipeline.storage.array_table import holds_metric
from pipeline.work.context import Context, Written

NAME = "metric"
USES_ALL_THREADS = False


def tasks(job: Job) -> Iterator[Task]:
    """One task where features are one array and their metric is kept, none elsewhere."""
    if holds_metric(job):
        yield Task(NAME, "metric")


def execute(context: Context, task: Task) -> Written:
    """Make the metric and write it."""
    features = context.features
    assert isinstance(features, DifferenceFeatures | GradientFeatures)
    written = Written()
    factor = scale_factor(context.job.spec.scale, context.job.sizes.num_parameters)
    context.write(written, "metric", (0, 0), features.make_metric() * factor)
    return written
