"""The stages of a run, one a file; none imports another. The table below names them in the order in which they run.

The pilot is in the table but not in the order: it runs before the stages, once for each look at the accuracy.
"""

from collections.abc import Iterable, Sequence
from functools import cache

from nntk_dist.errors import ArgumentError
from nntk_dist.registration.registry import Registry
from pipeline.job.job import Job
from pipeline.work.stage import Stage

STAGES: Registry[type[Stage]] = Registry(
    "stage",
    "nntk_dist.stages",
    {
        "pilot": "pipeline.work.stages.pilot:Pilot",
        "features": "pipeline.work.stages.features:Features",
        "metric": "pipeline.work.stages.metric:Metric",
        "calibration": "pipeline.work.stages.calibration:Calibration",
        "gram": "pipeline.work.stages.gram:Gram",
        "test": "pipeline.work.stages.test:Test",
        "spectrum": "pipeline.work.stages.spectrum:Spectrum",
        "regression": "pipeline.work.stages.regression:Regression",
    },
)
PILOT = "pilot"


@cache
def stages_of(added: tuple[str, ...] = ()) -> tuple[Stage, ...]:
    """Return the stages of a run in order: the project's own, then those that the configuration adds.

    Args:
        added: names of registered stages, or `python:module:Name`.

    Raises:
        ArgumentError: a stage does not exist, is no `Stage`, has the name of another one, or reads what no stage before
            it writes.
    """
    own = [name for name in STAGES.locations if name != PILOT]
    stages = tuple(_make(location) for location in (*own, *added))
    known: set[str] = {PILOT}
    for stage in stages:
        if stage.name in known:
            raise ArgumentError(f"stages has two stages called '{stage.name}'; give one of them another name")
        missing = [name for name in stage.reads if name not in known]
        if missing:
            raise ArgumentError(
                f"stage '{stage.name}' reads '{missing[0]}', and no stage before it has that name; before it: "
                f"{', '.join(sorted(known - {PILOT}))}"
            )
        known.add(stage.name)
    return stages


def stage_named(name: str, job: Job) -> Stage:
    """Return the stage of a job called `name`."""
    if name == PILOT:
        return _make(PILOT)
    return next(stage for stage in stages_of(job.config.stages) if stage.name == name)


def with_readers(names: Iterable[str], stages: Sequence[Stage]) -> set[str]:
    """Return the names, and the names of all stages that read their results, directly or through others."""
    found = set(names)
    for stage in stages:  # stages come after what they read
        if found.intersection(stage.reads):
            found.add(stage.name)
    return found


@cache
def _make(location: str) -> Stage:
    made = STAGES.get(location)()
    if not isinstance(made, Stage):
        raise ArgumentError(f"stage '{location}' is no pipeline.work.stage.Stage; make it a subclass")
    return made
