"""A run from start to end: plan, lock, stages in their order, report; and its continuation after any kind of stop.

The driver alone writes manifest and ledger. A task counts as done when its row is in the ledger; whatever was in
flight or not yet flushed at a stop is done again, with the same bits.

Units: seconds, bytes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from pipeline.build import build_dataset, build_model, identity
from pipeline.config import Config
from pipeline.continuation import check_kernel, stages_to_rerun, stored_decisions
from pipeline.data import Dataset
from pipeline.executors import Executor
from pipeline.job import Task, as_plain
from pipeline.kernel_store import KernelStore
from pipeline.ledger import Ledger, LedgerRow
from pipeline.lock import RunLock
from pipeline.manifest import Manifest, environment_versions, git_commit, read_manifest, write_manifest
from pipeline.plan import Plan, make_plan, plain_plan, stage_fingerprints
from pipeline.progress import Progress
from pipeline.report_stage import write_report
from pipeline.results import collect_results
from pipeline.stages import ORDER
from pipeline.storage import RunStorage


@dataclass(frozen=True)
class Prepared:
    """A planned run and what its workers are given; `stored` is the manifest of the run that it continues."""

    config: Config
    plan: Plan
    dataset: Dataset
    model: nn.Module
    storage: RunStorage
    stored: Manifest | None
    rerun: tuple[str, ...]

    @property
    def nothing_to_do(self) -> bool:
        """Whether the run directory already holds this run, finished."""
        return self.stored is not None and self.stored.finished and not self.rerun


def prepare(config: Config, *, resume: bool) -> Prepared:
    """Load data and model, compare with what the run directory holds, and plan. Nothing is written."""
    storage = RunStorage(config.run_dir)
    stored = read_manifest(storage)
    dataset = build_dataset(config)
    model = build_model(config, dataset)
    rerun: tuple[str, ...] = ()
    decisions = None
    if stored is not None:
        parts = identity(config, dataset, model)
        check_kernel(stored, config, parts, config.run_dir)
        rerun = stages_to_rerun(stored, config, stage_fingerprints(config, parts), config.run_dir, resume=resume)
        decisions = stored_decisions(stored)
    storage.check_writable()
    return Prepared(config, make_plan(config, dataset, model, decisions), dataset, model, storage, stored, rerun)


def execute(prepared: Prepared, make_executor: Callable[[Prepared], Executor], progress: Progress) -> dict[str, Any]:
    """Carry out what is left of a prepared run and write the report; returns the results by name."""
    storage, plan = prepared.storage, prepared.plan
    with RunLock(storage) as lock:
        storage.remove_partial_files()
        ledger = Ledger(storage)
        manifest = _manifest(prepared)
        for stage in prepared.rerun:
            ledger.forget(stage)
            manifest.stages.pop(stage, None)
        write_manifest(storage, manifest)
        KernelStore(storage).create(plan.arrays, _attributes(plan))
        executor: Executor | None = None
        try:
            for stage in ORDER:
                if not _pending(stage, plan, ledger):
                    _finish(manifest, stage.NAME, ledger, storage)
                    continue
                executor = executor or make_executor(prepared)
                _run_stage(stage, plan, ledger, executor, progress, lock)
                _finish(manifest, stage.NAME, ledger, storage)
        finally:
            ledger.flush()
            if executor is not None:
                executor.close()
        ledger.compact()
        results = collect_results(plan.job, ledger)
        write_report(prepared, manifest, ledger, results)
        manifest.results = results
        manifest.finished = True
        write_manifest(storage, manifest)
    return results


def _manifest(prepared: Prepared) -> Manifest:
    """The manifest of a new run, or the stored one with the sections that may change."""
    config, plan = prepared.config, prepared.plan
    fresh = Manifest(
        config=config.model_dump(mode="json"),
        identity=dict(plan.parts),
        fingerprints=dict(plan.fingerprints),
        seeds={"data": config.data.seed, "model": config.model.seed, "kernel": config.kernel.seed},
        versions=environment_versions(),
        git_commit=git_commit(),
        layout=as_plain(plan.job.layout),
        sizes=as_plain(plan.job.sizes),
        estimator=as_plain(plan.job.resolution),
        projection=plain_plan(plan),
    )
    if prepared.stored is None:
        return fresh
    stored = prepared.stored
    return replace(fresh, created=stored.created, stages=dict(stored.stages), versions=stored.versions | fresh.versions)


def _attributes(plan: Plan) -> dict[str, Any]:
    """What `kernel.zarr` says of itself."""
    spec, job = plan.job.spec, plan.job
    return {
        "schema": "nntk-kernel",
        "version": 1,
        "fingerprint": job.fingerprint,
        "kind": spec.kind,
        "estimator": job.resolution.estimator,
        "statistic": spec.statistic,
        "outputs": spec.outputs,
        "scale": spec.scale,
        "gamma": spec.gamma,
        "distribution": spec.distribution,
        "draws": job.sizes.num_draws,
        "blocks": job.sizes.num_blocks,
        "parameters": job.sizes.num_parameters,
    }


def _pending(stage: ModuleType, plan: Plan, ledger: Ledger) -> int:
    """How many tasks of a stage are left."""
    done = ledger.done(stage.NAME)
    return sum(1 for task in stage.tasks(plan.job) if task.tile not in done)


def _tasks_left(stage: ModuleType, plan: Plan, ledger: Ledger) -> Iterator[Task]:
    """The tasks that are not in the ledger, with the calibration that theirs need."""
    levels = {row.tile: row.numbers["level"] for row in ledger.rows("calibration")}
    done = set(ledger.done(stage.NAME))
    for task in stage.tasks(plan.job):
        if task.tile not in done:
            level = levels.get(task.tile.split("/")[0])
            yield task if level is None else replace(task, arguments={"level": level})


def _run_stage(
    stage: ModuleType, plan: Plan, ledger: Ledger, executor: Executor, progress: Progress, lock: RunLock
) -> None:
    """Carry out a stage's remaining tasks."""
    total = sum(1 for _ in stage.tasks(plan.job))
    done = total - _pending(stage, plan, ledger)
    with progress.stage(stage.NAME, total, done) as bar:
        for outcome in executor.run(_tasks_left(stage, plan, ledger)):
            ledger.tick()
            if outcome is None:
                continue
            ledger.append(
                LedgerRow(
                    stage=outcome.stage,
                    tile=outcome.tile,
                    worker=outcome.worker,
                    started=outcome.started,
                    seconds=outcome.seconds,
                    bytes=outcome.written_bytes,
                    checksum=outcome.checksum,
                    error=outcome.numbers.get("relative_error"),
                    peak_bytes=outcome.peak_bytes,
                    numbers=dict(outcome.numbers),
                )
            )
            done += 1
            bar.advance(1)
            lock.beat(stage.NAME, done, total)
    ledger.flush()


def _finish(manifest: Manifest, name: str, ledger: Ledger, storage: RunStorage) -> None:
    """Note a finished stage in the manifest, once."""
    if name in manifest.stages:
        return
    rows = ledger.rows(name)
    manifest.stages[name] = {
        "finished": time.time(),
        "started": min((row.started for row in rows), default=time.time()),
        "tasks": len(rows),
        "seconds": sum(row.seconds for row in rows),
        "bytes": sum(row.bytes for row in rows),
        "peak_bytes": max((row.peak_bytes for row in rows), default=0),
    }
    write_manifest(storage, manifest)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, as workers are given them."""
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}
