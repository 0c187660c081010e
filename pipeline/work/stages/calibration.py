"""Stage `calibration`: the level of the standard errors and the relative error, from a fixed sample of entries.

One task for each array that has standard errors: tile train, test or diagonal. It writes nothing; it returns numbers.

Axes: none.
"""

from collections.abc import Iterator

from nntk_dist.spec import Statistic
from pipeline.config.choices import StandardErrorChoice
from pipeline.job.job import Job, Task
from pipeline.work.context import Context, Written
from pipeline.work.sampled_calibration import CALIBRATED, calibrate_array
from pipeline.work.stage import Stage


class Calibration(Stage):
    """The level of the standard errors and the relative error, from a sample of entries."""

    name = "calibration"
    reads = ("features", "metric")

    def tasks(self, job: Job) -> Iterator[Task]:
        """Yield three tasks if standard errors or a relative error are wanted."""
        if job.layout.stderr != StandardErrorChoice.NONE:
            for tile in CALIBRATED:
                yield Task(self.name, tile)

    def execute(self, context: Context, task: Task) -> Written:
        """Calibrate one array."""
        stored = context.job.layout.store_features
        result = calibrate_array(context, context.features_with_metric, task.tile, stored=stored)
        numbers = {
            "level": result.level,
            "relative_error": result.relative_error,
            "bound": result.bound,
            "num_entries": float(result.num_entries),
            "unresolved_share": 1.0 - result.resolved_share,
        }
        if not context.job.layout.write_tiles and context.job.spec.statistic == Statistic.BOTH:
            numbers["bias"] = result.bias  # if there are tiles, it is taken from all of their entries
        return Written(numbers=numbers)
