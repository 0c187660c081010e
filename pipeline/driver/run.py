"""A run from start to end: plan, lock, stages in order, report; and its continuation after any kind of stop.

Only the driver writes manifest and ledger. A task is done when its row is in the ledger. Tasks that were running, or
not yet flushed, at a stop are repeated and give the same bits.

Units: seconds, bytes.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from torch import Tensor, nn

from nntk_dist.errors import StoreError
from nntk_dist.planning.decision import Decision
from nntk_dist.planning.plain import to_plain
from nntk_dist.sampling.laws import law_options
from pipeline.config.choices import ExecutorChoice
from pipeline.config.schema import Config
from pipeline.data import Dataset
from pipeline.decisions.build import build_dataset, build_model, identity
from pipeline.decisions.layout import overlaps_writing
from pipeline.decisions.stored_run import check_kernel, stages_to_rerun, stored_job
from pipeline.decisions.weighting_reference import weighting_attributes
from pipeline.driver.draw_search import search_draws
from pipeline.driver.progress import Progress
from pipeline.driver.report_inputs import plot_names, write_report
from pipeline.driver.results import collect_results
from pipeline.driver.stage_runner import StageRunner, is_finished
from pipeline.executors import Executor
from pipeline.executors.serial import SerialExecutor
from pipeline.planning.plan import Plan, make_plan, stage_fingerprints
from pipeline.records.ledger import FOLDER, Ledger
from pipeline.records.lock import RunLock
from pipeline.records.manifest import (
    Manifest,
    StageRecord,
    environment_versions,
    git_commit,
    read_manifest,
    write_manifest,
)
from pipeline.runtime.allocator import give_back_freed_memory
from pipeline.runtime.fitting_batch import BATCHED, remembered_batch
from pipeline.storage.kernel_arrays import KernelArrays
from pipeline.storage.run_storage import KERNEL_STORE, RunStorage
from pipeline.work.stages import PILOT, stages_of, with_readers
from pipeline.work.worker import Worker


@dataclass(frozen=True)
class Prepared:
    """A planned run.

    Attributes:
        config: the configuration.
        plan: the plan.
        dataset: the data, for the workers.
        model: the model, for the workers.
        storage: the run directory.
        stored: the manifest of the run that it continues; None for a new run.
        rerun: the names of the finished stages that must run again.
    """

    config: Config
    plan: Plan
    dataset: Dataset
    model: nn.Module
    storage: RunStorage
    stored: Manifest | None
    rerun: tuple[str, ...]

    @property
    def searching(self) -> bool:
        """Whether an accuracy is requested and the search for the number of draws has not finished."""
        found = self.stored is not None and self.stored.finished(PILOT) is not None
        return self.config.kernel.rtol is not None and not found

    @property
    def nothing_to_do(self) -> bool:
        """Whether the run directory already holds this run, finished."""
        return self.stored is not None and self.stored.completed is not None and not self.rerun


@dataclass(frozen=True)
class Loaded:
    """What several runs share: data and model, and the decision for all groups of parameters, with its batch."""

    dataset: Dataset
    model: nn.Module
    decided: tuple[Decision, int] | None = None


def prepare(config: Config, *, resume: bool, loaded: Loaded | None = None) -> Prepared:
    """Load data and model, compare them with the run directory, and plan. Nothing is written.

    Args:
        config: the configuration, of one kernel.
        resume: whether to continue a stopped run, or to redo stages whose settings changed.
        loaded: data, model and decision, if they are known.

    Raises:
        NNTKError: data, model or options are not allowed, the run directory holds another run, or nothing fits into
            memory or on disk.
    """
    plot_names(config.report.plots)  # an unknown plot should fail now, not after the work
    storage = RunStorage(config.run_dir)
    stored = read_manifest(storage)
    dataset = build_dataset(config) if loaded is None else loaded.dataset
    model = build_model(config, dataset) if loaded is None else loaded.model
    rerun: tuple[str, ...] = ()
    job, parts = None, identity(config, dataset, model)
    if stored is not None:
        job = stored_job(stored, config)
        parts = check_kernel(stored, config, parts, config.run_dir)
        rerun = stages_to_rerun(stored, config, stage_fingerprints(config, parts), config.run_dir, resume=resume)
        rerun = tuple(with_readers(rerun, stages_of(config.stages)))
    elif storage.list(FOLDER) or storage.read_bytes(f"{KERNEL_STORE}/zarr.json") is not None:
        raise StoreError(
            f"{config.run_dir} holds results, but no manifest.json that describes them; restore it, or choose another "
            "run_dir"
        )
    storage.check_writable()
    plan = make_plan(config, dataset, model, job=job, parts=parts, decided=None if loaded is None else loaded.decided)
    give_back_freed_memory()  # of the copies of the model that were tried, before workers start
    return Prepared(config, plan, dataset, model, storage, stored, rerun)


def execute(prepared: Prepared, *, address: str | None, progress: Progress) -> dict[str, Any]:
    """Carry out the remaining stages of a prepared run, write the report, and return the results by name.

    Args:
        prepared: the run.
        address: the Ray cluster; None starts Ray on this machine.
        progress: the display.

    Raises:
        NNTKError: another driver holds the run, a task fails, or storage is out of reach.
    """
    storage = prepared.storage
    with RunLock(storage) as lock, ExitStack() as resources:
        if read_manifest(storage) != prepared.stored:
            raise StoreError(f"{prepared.config.run_dir} was written by another driver just now; run the command again")
        storage.remove_partial_files()
        ledger = Ledger(storage)
        prepared = with_fitting_batch(prepared, ledger)
        prepared, searched = _with_enough_draws(prepared, ledger, address, progress, lock, resources)
        plan = prepared.plan
        stages = stages_of(plan.job.config.stages)
        left = [each for each in stages if each.name in prepared.rerun or not is_finished(each, plan.job, ledger)]
        executor = make_executor(prepared, address) if left else None
        if executor is not None:
            resources.callback(executor.close)
        resources.callback(ledger.flush)  # called first: a user who stops a run may not wait until Ray ends
        for name in prepared.rerun:
            ledger.forget(name)
        manifest = manifest_of(prepared)
        if searched is not None:
            manifest = manifest.with_stage(PILOT, searched)
        write_manifest(storage, manifest)
        KernelArrays(storage).create(plan.arrays, attributes_of(plan))
        if executor is not None:
            runner = StageRunner(ledger, executor, progress, lock)
            for stage in left:
                record = runner.run(stage, plan.job, manifest.stages.get(stage.name))
                manifest = manifest.with_stage(stage.name, record)
                write_manifest(storage, manifest)
        ledger.compact()
        results = collect_results(plan.job, ledger)
        manifest = manifest.model_copy(update={"results": results, "completed": datetime.now(UTC)})
        write_report(storage, manifest)
        write_manifest(storage, manifest)
    return results


def with_fitting_batch(prepared: Prepared, ledger: Ledger) -> Prepared:
    """The run with the smallest batch of its finished tasks, which halve it when memory runs out."""
    if prepared.stored is None:
        return prepared
    job = prepared.plan.job
    rows = chain.from_iterable(ledger.rows(stage) for stage in BATCHED)
    layout = replace(job.layout, batch=remembered_batch(rows, job.layout.batch))
    return replace(prepared, plan=replace(prepared.plan, job=replace(job, layout=layout)))


def _with_enough_draws(
    prepared: Prepared,
    ledger: Ledger,
    address: str | None,
    progress: Progress,
    lock: RunLock,
    resources: ExitStack,
) -> tuple[Prepared, StageRecord | None]:
    """The run with the draws that its accuracy needs, and the pilot's record; unchanged if no accuracy is requested."""
    if not prepared.searching:
        return prepared, None
    executor = make_executor(prepared, address)
    resources.callback(executor.close)
    resources.callback(ledger.flush)
    manifest = manifest_of(prepared)
    write_manifest(prepared.storage, manifest)
    plan, record = search_draws(
        prepared.config,
        prepared.dataset,
        prepared.model,
        prepared.plan,
        StageRunner(ledger, executor, progress, lock),
        manifest.stages.get(PILOT),
    )
    executor.stop_workers()
    return replace(prepared, plan=plan), record


def make_executor(prepared: Prepared, address: str | None) -> Executor:
    """The executor that the configuration names."""
    job, state = prepared.plan.job, state_of(prepared.model)
    if prepared.config.compute.executor == ExecutorChoice.SERIAL:
        return SerialExecutor(job, prepared.dataset, state)
    from pipeline.executors.on_ray import RayExecutor  # seconds of imports that a serial run does without

    compute = prepared.config.compute
    return RayExecutor(
        Worker,
        job,
        prepared.dataset,
        state,
        num_workers=prepared.plan.num_workers,
        num_cpus=job.layout.threads,
        workers_per_gpu=compute.workers_per_gpu if job.layout.device.startswith("cuda") else 0,
        calls_at_once=2 if overlaps_writing(job) else 1,
        grow=compute.workers == "auto",
        address=address,
    )


def manifest_of(prepared: Prepared) -> Manifest:
    """The manifest; a continued run keeps its valid stages, its date and the versions that it began with."""
    config, plan = prepared.config, prepared.plan
    stored = prepared.stored
    stages = {} if stored is None else {k: v for k, v in stored.stages.items() if k not in prepared.rerun}
    return Manifest(
        created=datetime.now(UTC) if stored is None else stored.created,
        config=config.model_dump(mode="json"),
        identity=json.loads(json.dumps(plan.parts)),
        fingerprints=dict(plan.fingerprints),
        seeds={"data": config.data.seed, "model": config.model.seed, "kernel": config.kernel.seed},
        versions=environment_versions() if stored is None else stored.versions,
        git_commit=git_commit() if stored is None else stored.git_commit,
        layout=to_plain(plan.job.layout),
        sizes=to_plain(plan.job.sizes),
        decision=to_plain(plan.job.decision),
        features=to_plain(plan.job.features),
        solvers={stage: to_plain(choice) for stage, choice in plan.job.solvers.items()},
        projection=to_plain(plan.projection),
        stages=stages,
    )


def attributes_of(plan: Plan) -> dict[str, Any]:
    """The attributes of `kernel.zarr`."""
    spec, job = plan.job.spec, plan.job
    return {
        "fingerprint": job.fingerprint,
        "kind": spec.kind,
        "estimator": job.decision.estimator,
        "statistic": spec.statistic,
        "outputs": spec.outputs,
        "scale": spec.scale,
        "gamma": spec.distribution.gamma,
        "gamma_scale": spec.gamma_scale,
        "distribution": spec.distribution.name,
        **law_options(spec.distribution),
        **weighting_attributes(spec, job.sizes.num_train),
        "draws": job.sizes.num_draws,
        "blocks": job.sizes.num_blocks,
        "parameters": job.sizes.num_parameters,
        **({} if job.layout.write_tiles else {"tiles": False}),
    }


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return the model's parameters and buffers on the CPU, and what else its modules keep, as workers receive them."""
    state = model.state_dict()
    return {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
