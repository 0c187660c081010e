"""Search for the number of draws that a requested accuracy needs: look after look on a worker, before the stages.

A look estimates the error at one number of draws. It is a task of the stage `pilot`, with the job that the run would
have with this number. Its result is in the ledger, so an interrupted search continues and ends at the same number.
"""

from torch import nn

from nntk_dist.statistics.required_draws import Look, next_draws
from pipeline.config.schema import Config
from pipeline.data import Dataset
from pipeline.driver.stage_runner import StageRunner
from pipeline.job.job import Job
from pipeline.planning.plan import Plan, make_plan
from pipeline.records.ledger import Ledger
from pipeline.records.manifest import StageRecord
from pipeline.work.stages.pilot import Pilot, look_task


def looks_of(ledger: Ledger) -> list[Look]:
    """Return the looks so far, in ascending order of their number of draws."""
    looks = [Look.from_numbers(row.numbers) for row in ledger.rows(Pilot.name)]
    return sorted(looks, key=lambda look: look.draws)


def draws_to_look_at(job: Job, looks: list[Look]) -> int | None:
    """Return the number of draws of the next look, None if the search has ended; `job` is the first look's."""
    if not looks:
        return job.sizes.num_draws
    spec, unit = job.spec, job.spec.draw_unit(job.sizes.num_draws, job.sizes.num_parameters)
    assert spec.rtol is not None
    return next_draws(looks, rtol=spec.rtol, max_draws=spec.max_draws, unit=unit)


def search_draws(
    config: Config, dataset: Dataset, model: nn.Module, plan: Plan, runner: StageRunner, earlier: StageRecord | None
) -> tuple[Plan, StageRecord]:
    """Return the plan with the number of draws that the accuracy needs, and the record of the pilot stage.

    Nothing is decided again: with the number of draws, only contraction, layout and projection change.

    Args:
        config: the configuration, with a requested accuracy.
        dataset: its data.
        model: its model.
        plan: the plan of the first look.
        runner: executes the looks.
        earlier: the record of an interrupted search.

    Raises:
        ArgumentError: a run with the next number of draws cannot fit into memory or on disk.
    """
    first, record = plan.job, earlier
    while (num_draws := draws_to_look_at(first, looks_of(runner.ledger))) is not None:
        if num_draws != plan.job.sizes.num_draws:
            plan = make_plan(config, dataset, model, job=first, num_draws=num_draws, parts=plan.parts)
        record = runner.carry_out(
            Pilot.name, [look_task(plan.job)], 1, 0, record, title=f"pilot with {num_draws} draws"
        )
    found = looks_of(runner.ledger)[-1].draws
    if found != plan.job.sizes.num_draws:
        plan = make_plan(config, dataset, model, job=first, num_draws=found, parts=plan.parts)
    if record is None:  # stopped between the last look and the manifest
        record = runner.carry_out(Pilot.name, (), 0, 0, None)
    return plan, record
