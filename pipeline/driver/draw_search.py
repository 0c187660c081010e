"""The search for the draws of a run with an asked accuracy: looks on a worker, one after the other, before the stages.

Every look is a task of the stage `pilot`, with the job that the run would have with so many draws; what it found is in
the ledger, so a search that was stopped goes on where it was, to the same end.
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
from pipeline.work.stages import pilot


def looks_of(ledger: Ledger) -> list[Look]:
    """The looks so far, in their order."""
    looks = [Look.from_numbers(row.numbers) for row in ledger.rows(pilot.NAME)]
    return sorted(looks, key=lambda look: look.draws)


def draws_to_look_at(job: Job, looks: list[Look]) -> int | None:
    """How many draws are to be looked at next, None where the search has ended; `job` is the first look's."""
    if not looks:
        return job.sizes.num_draws
    spec, unit = job.spec, job.spec.draw_unit(job.sizes.num_draws, job.sizes.num_parameters)
    assert spec.rtol is not None
    return next_draws(looks, rtol=spec.rtol, max_draws=spec.max_draws, unit=unit)


def search_draws(
    config: Config, dataset: Dataset, model: nn.Module, plan: Plan, runner: StageRunner, earlier: StageRecord | None
) -> tuple[Plan, StageRecord]:
    """The plan with as many draws as the accuracy takes, from the plan of the first look, and the pilot's record.

    Raises: NNTKError where a run with as many draws as are to be looked at cannot fit into memory or on disk.
    """
    first, record = plan.job, earlier
    decisions = first.layout, first.decision
    while (num_draws := draws_to_look_at(first, looks_of(runner.ledger))) is not None:
        if num_draws != plan.job.sizes.num_draws:
            plan = make_plan(config, dataset, model, decisions, num_draws)
        record = runner.carry_out(
            pilot.NAME, [pilot.look_task(plan.job)], 1, 0, record, title=f"pilot with {num_draws} draws"
        )
    found = looks_of(runner.ledger)[-1].draws
    if found != plan.job.sizes.num_draws:
        plan = make_plan(config, dataset, model, decisions, found)
    if record is None:  # stopped between the last look and the manifest
        record = runner.carry_out(pilot.NAME, (), 0, 0, None)
    return plan, record
