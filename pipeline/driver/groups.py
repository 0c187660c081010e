"""A run of several groups of parameters: one run for each group in `run_dir/NAME`, whose features share their passes.

The file `groups.json` names the groups. Each group's folder is a run of its own: `status`, `verify`, `report` and a
continuation work on it as on any other. The decision is made once, for all groups together.

Units: seconds.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from nntk_dist.errors import StoreError
from pipeline.config.schema import Config
from pipeline.decisions.build import build_dataset, build_model, build_spec
from pipeline.driver.progress import Progress
from pipeline.driver.run import (
    Loaded,
    Prepared,
    attributes_of,
    execute,
    make_executor,
    manifest_of,
    prepare,
    with_fitting_batch,
)
from pipeline.driver.stage_runner import is_finished
from pipeline.job.job import Task
from pipeline.job.task import split_by_group
from pipeline.planning.plan import decide_groups
from pipeline.records.ledger import Ledger
from pipeline.records.lock import RunLock
from pipeline.records.manifest import Manifest, StageRecord, read_manifest, write_manifest
from pipeline.storage.kernel_arrays import KernelArrays
from pipeline.storage.run_storage import RunStorage
from pipeline.work.stages.features import Features

GROUPS_PATH = "groups.json"


def has_groups(config: Config) -> bool:
    """Return whether a configuration describes a kernel for each of several groups of parameters."""
    return bool(build_spec(config.kernel).groups)


def prepare_groups(config: Config, *, resume: bool) -> dict[str, Prepared]:
    """Load data and model once, compare them with the run directories of the groups, and plan. Nothing is written.

    Raises:
        NNTKError: as `prepare`, for any of the groups; or the run directory holds a run of one kernel.
    """
    if read_manifest(RunStorage(config.run_dir)) is not None:
        raise StoreError(
            f"{config.run_dir} holds a run of one kernel, and kernel.parameters is a mapping of groups; choose another "
            "run_dir"
        )
    dataset = build_dataset(config)
    model = build_model(config, dataset)
    configs = {name: _config_of(config, name) for name in build_spec(config.kernel).groups}
    stored = [read_manifest(RunStorage(own.run_dir)) for own in configs.values()]
    loaded = Loaded(dataset, model)
    if not all(stored):  # what is new goes by one decision, and by the batch of what is there
        decision, batch = decide_groups(config, dataset, model)
        loaded = replace(loaded, decided=(decision, next((each.layout["batch"] for each in stored if each), batch)))
    return {name: prepare(own, resume=resume, loaded=loaded) for name, own in configs.items()}


def execute_groups(
    groups: Mapping[str, Prepared], config: Config, *, address: str | None, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Compute the features of all groups, then carry out the other stages of each; return their results by group.

    Args:
        groups: what `prepare_groups` returned.
        config: the configuration.
        address: the Ray cluster; None starts Ray on this machine.
        progress: the display.

    Raises:
        NNTKError: as `execute`.
    """
    storage = RunStorage(config.run_dir)
    results: dict[str, dict[str, Any]] = {}
    with RunLock(storage) as lock:
        storage.write_bytes(GROUPS_PATH, json.dumps({"groups": list(groups)}).encode() + b"\n")
        ready = _with_features(groups, address, progress, lock)
        for name, each in ready.items():
            if each.nothing_to_do:
                assert each.stored is not None
                results[name] = each.stored.results
            else:
                results[name] = execute(each, address=address, progress=progress)
    return results


def stored_groups(storage: RunStorage) -> dict[str, tuple[RunStorage, Manifest]]:
    """Return the runs of the groups in a run directory, as far as they have begun; none if it is not one of groups.

    Raises:
        StoreError: `groups.json` is broken.
    """
    content = storage.read_bytes(GROUPS_PATH)
    if content is None:
        return {}
    try:
        names = list(json.loads(content)["groups"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{GROUPS_PATH} in run_dir '{storage.url}' is broken ({error}); restore it") from error
    places = {name: RunStorage(f"{storage.url}/{name}") for name in names}
    return {name: (place, found) for name, place in places.items() if (found := read_manifest(place)) is not None}


def _config_of(config: Config, name: str) -> Config:
    """The configuration of one group's run."""
    kernel = config.kernel.model_copy(update={"group": name})
    return config.model_copy(update={"kernel": kernel, "run_dir": f"{str(config.run_dir).rstrip('/')}/{name}"})


def _with_features(
    groups: Mapping[str, Prepared], address: str | None, progress: Progress, lock: RunLock
) -> dict[str, Prepared]:
    """The runs of all groups with their features computed, in the same passes."""
    stage = Features()
    ledgers = {name: Ledger(each.storage) for name, each in groups.items()}
    if all(is_finished(stage, each.plan.job, ledgers[name]) for name, each in groups.items()):
        return dict(groups)
    started, clock = datetime.now(UTC), time.perf_counter()
    first, *others = groups
    leading = with_fitting_batch(groups[first], ledgers[first])
    job = replace(leading.plan.job, siblings={name: groups[name].plan.job for name in others})
    leading = replace(leading, plan=replace(leading.plan, job=job))
    with ExitStack() as resources:
        for each in groups.values():
            resources.enter_context(RunLock(each.storage))
            each.storage.remove_partial_files()
            write_manifest(each.storage, manifest_of(each))
            KernelArrays(each.storage).create(each.plan.arrays, attributes_of(each.plan))
        executor = make_executor(leading, address)
        resources.callback(executor.close)
        for ledger in ledgers.values():
            resources.callback(ledger.flush)
        total = sum(1 for _ in stage.tasks(job))
        left = list(_tasks_left(stage, leading, ledgers))
        with progress.stage("features of all groups", total, total - len(left)) as bar:
            done = total - len(left)
            for outcomes in executor.run(left):
                for outcome in outcomes:
                    for name, own in split_by_group(outcome, first, others).items():
                        ledgers[name].append(own)
                for ledger in ledgers.values():
                    ledger.tick()
                done += len(outcomes)
                bar.advance(len(outcomes))
                lock.update(stage.name, done, total)
    seconds = (time.perf_counter() - clock) / len(groups)
    for name, each in groups.items():
        totals = asdict(ledgers[name].totals()[stage.name])
        record = StageRecord(started=started, finished=datetime.now(UTC), seconds=seconds, results=totals)
        write_manifest(each.storage, manifest_of(each).with_stage(stage.name, record))
    return {name: replace(each, stored=read_manifest(each.storage)) for name, each in groups.items()}


def _tasks_left(stage: Features, leading: Prepared, ledgers: Mapping[str, Ledger]) -> Iterator[Task]:
    """The tasks that are missing in the ledger of any group: they are repeated for all, with the same bits."""
    done = [ledger.done(stage.name) for ledger in ledgers.values()]
    for task in stage.tasks(leading.plan.job):
        if not all(task.tile in each for each in done):
            yield task
