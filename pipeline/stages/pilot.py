"""Stage `pilot`: one look at a sample of the train kernel with some number of draws, where an accuracy is asked for.

Tile: the number of draws. Looks follow from each other, so they are no list known beforehand: the driver asks for one
after the other (`pipeline.search`), each with the job that it would be. Nothing is written but numbers.

Axes: none.
"""

from collections.abc import Iterator

from nntk_dist.accuracy import Look
from pipeline.calibrating import calibrate_array
from pipeline.context import Context, Written
from pipeline.job import Job, Task

NAME = "pilot"
USES_ALL_THREADS = False


def look_task(job: Job) -> Task:
    """The look with as many draws as a job has."""
    return Task(NAME, str(job.sizes.num_draws), {"job": job})


def tasks(job: Job) -> Iterator[Task]:
    """None that could be told before the looks themselves."""
    yield from ()


def execute(context: Context, task: Task) -> Written:
    """Calibrate the train kernel with the draws of the task's job."""
    job: Job = task.arguments["job"]
    with_draws = Context(job, context.dataset, context.state)
    return Written(
        numbers=Look.of(job.sizes.num_draws, calibrate_array(with_draws, with_draws.features, "train")).numbers
    )
