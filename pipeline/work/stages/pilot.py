"""Stage `pilot`: one look at a sample of the train kernel with some number of draws, if an accuracy is requested.

Tile: the number of draws. Each look depends on the last, so there is no fixed list of tasks: the driver asks for one
after the other (`pipeline.driver.draw_search`), each with the job that it would be. Nothing is written but numbers.

Axes: none.
"""

from collections.abc import Iterator
from dataclasses import replace

from nntk_dist.planning.decision import with_draws
from nntk_dist.planning.draw_search import spec_to_look_at
from nntk_dist.statistics.required_draws import Look
from nntk_dist.statistics.standard_errors import PILOT_ENTRIES
from pipeline.job.job import Job, Task
from pipeline.work.context import Context, Written
from pipeline.work.sampled_calibration import calibrate_array
from pipeline.work.stage import Stage


def look_task(job: Job) -> Task:
    """Return the task of a look with as many draws as the job has."""
    return Task(Pilot.name, str(job.sizes.num_draws), {"job": job})


class Pilot(Stage):
    """One look at the accuracy that a number of draws reaches."""

    name = "pilot"

    def tasks(self, job: Job) -> Iterator[Task]:
        """None: each look follows from the ones before."""
        yield from ()

    def execute(self, context: Context, task: Task) -> Written:
        """Calibrate the train kernel with the draws of the task's job, in as many blocks as tell most."""
        job: Job = task.arguments["job"]
        num_draws = job.sizes.num_draws
        spec = spec_to_look_at(job.spec, num_draws, job.sizes.num_parameters)
        decision = with_draws(job.decision, spec, num_draws)
        sizes = replace(job.sizes, num_blocks=spec.blocks)
        job_to_look_at = replace(job, spec=spec, decision=decision, sizes=sizes)
        look_at = Context(job_to_look_at, context.dataset, context.state, built=context.model)
        calibration = calibrate_array(look_at, look_at.features, "train", entries=PILOT_ENTRIES)
        look = Look.of(num_draws, calibration, looked_at=spec.blocks, blocks=job.spec.blocks)
        return Written(numbers=look.numbers)
