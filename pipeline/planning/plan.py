"""The plan of a run: everything that is decided before it starts, and the refusal of what cannot fit.

From a configuration, the data and the model it makes the job (what workers need), the fingerprints (what is compared on
resume) and the projection (what it will take). It writes nothing and starts nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from nntk_dist.analysis.solvers import REGRESSION_SOLVERS, SPECTRUM_SOLVERS
from nntk_dist.errors import ArgumentError, DataError
from nntk_dist.planning.decision import Decision, decide, of_group, with_draws
from nntk_dist.planning.feature_maps import FeatureGroups, make_feature_map
from nntk_dist.planning.pilot import with_automatic_draws
from nntk_dist.planning.plain import from_plain
from nntk_dist.products.factor_form import WITH_FACTOR
from nntk_dist.products.feature_description import FeatureCosts
from nntk_dist.products.features import FeatureMap
from nntk_dist.registration.registry import PYTHON, Registry
from nntk_dist.runtime.precision import full_precision
from nntk_dist.spec import KernelSpec, Outputs
from nntk_dist.weighting.options import Reference
from pipeline.config.choices import ExecutorChoice, StandardErrorChoice
from pipeline.config.schema import ComputeConfig, Config
from pipeline.data import Dataset
from pipeline.decisions.build import DTYPES, build_prepared, build_spec, identity, resolve_device
from pipeline.decisions.code_digest import code_digest
from pipeline.decisions.layout import choose_batch, make_layout, pass_operations, threads_of
from pipeline.decisions.solver_choice import choose_solvers
from pipeline.decisions.weighting_reference import reference_batch
from pipeline.job.function_values import FunctionValues
from pipeline.job.job import SPLITS, Job, Layout, Sizes
from pipeline.planning.projection import BASE_BYTES, Projection, feature_costs, project
from pipeline.records.manifest import fingerprint
from pipeline.runtime.cpus import available_cpus
from pipeline.runtime.fitting_batch import FittingBatch
from pipeline.storage.array_table import StoredArray, all_arrays, stored_factor_form
from pipeline.storage.run_storage import RunStorage
from pipeline.work.stages import stages_of

_PROBE_EXAMPLES = 32
_USABLE_SHARE = 0.9  # of the memory that is free now


@dataclass(frozen=True, repr=False)
class Plan:
    """What would run. `parts` are the nameable inputs of the kernel's fingerprint."""

    job: Job
    arrays: tuple[StoredArray, ...]
    parts: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    projection: Projection
    num_workers: int
    memory_per_worker: int

    def __repr__(self) -> str:
        job, projection = self.job, self.projection
        return (
            f"Plan({job.config.name!r}, {job.spec.kind} kernel by {job.decision.estimator}, "
            f"{job.sizes.num_train} train and {job.sizes.num_test} test rows, {job.sizes.num_draws} draws, "
            f"{sum(projection.tasks.values())} tasks, about {sum(projection.seconds.values()):.0f} s, "
            f"{_gib(projection.total_disk_bytes)} on disk, {_gib(projection.worker_bytes)} a worker)"
        )


@full_precision()
def make_plan(
    config: Config,
    dataset: Dataset,
    model: nn.Module,
    *,
    job: Job | None = None,
    num_draws: int | None = None,
    parts: Mapping[str, Any] | None = None,
    decided: tuple[Decision, int] | None = None,
) -> Plan:
    """Plan a run: a new one, the continuation of a stored one, or one with another number of draws.

    Only a new run tries the model and decides. With a `job`, its decision stands; with `num_draws` too, the contraction
    and the layout follow from that number.

    Args:
        config: the configuration.
        dataset: its data.
        model: its model, as built or loaded.
        job: the job of the run that is continued, restored from its manifest.
        num_draws: another number of draws for that job.
        parts: the identity of the kernel, if it is known.
        decided: the decision for all groups of parameters and the batch, if they are known.

    Raises:
        NNTKError: this model has no such kernel, or the run cannot fit into memory or on disk.
    """
    device, dtype = resolve_device(config) if job is None else job.layout.device, DTYPES[config.compute.dtype]
    check_device(device, config.compute, continued=job is not None)
    prepared = build_prepared(config, dataset, model, device)
    x = _probe_inputs(dataset, device, dtype)
    parts = identity(config, dataset, model) if parts is None else parts
    prints = stage_fingerprints(config, parts)
    spec = build_spec(config.kernel)
    reference = reference_batch(spec, dataset, dtype, device)
    if job is None:
        decision, batch = decided or _decide(config, dataset, prepared, x, spec, reference)
    else:
        batch = job.layout.batch
        decision = job.decision if num_draws is None else with_draws(job.decision, spec, num_draws)
    decision, features, together = _features(prepared, x, spec, decision, reference)
    kept = job if num_draws is None else None
    sizes = _sizes(dataset, decision, features) if kept is None else kept.sizes
    _check_sizes(config, dataset, sizes)
    if kept is None:
        one_pass = pass_operations(prepared, x)
        layout = make_layout(config, spec, together, sizes, batch=batch, device=device, one_pass=one_pass)
        url, function = RunStorage(config.run_dir).url, from_plain(FunctionValues, parts["function"])
        planned = Job(url, prints["kernel"], config, spec, decision, layout, sizes, features.storage, function)
        planned, arrays = _with_or_without_tiles(planned, dataset)
    else:
        planned, arrays = kept, describe_arrays(kept, dataset)
    planned = replace(planned, solvers=choose_solvers(planned))
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what was tried here, for the workers that may share the GPU
    plan = _fit(config, planned, features, together, arrays, prepared, x, parts, prints)
    if device.startswith("cuda") and num_draws is None:  # later the run itself is on it
        check_gpu_memory(plan.projection.worker_bytes - BASE_BYTES, planned.layout, config.compute.workers_per_gpu)
    if kept is None:
        check_disk(RunStorage(config.run_dir), plan.projection.total_disk_bytes)
    return plan


def decide_groups(config: Config, dataset: Dataset, model: nn.Module) -> tuple[Decision, int]:
    """Return the decision for all groups of parameters together, and the batch, which their plans share."""
    device, dtype = resolve_device(config), DTYPES[config.compute.dtype]
    check_device(device, config.compute, continued=False)
    prepared, spec = build_prepared(config, dataset, model, device), build_spec(config.kernel)
    x = _probe_inputs(dataset, device, dtype)
    return _decide(config, dataset, prepared, x, spec, reference_batch(spec, dataset, dtype, device))


def _probe_inputs(dataset: Dataset, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the first examples: a model may write to its input, and the dataset is yet to be fingerprinted."""
    x = torch.from_numpy(dataset.train.inputs[:_PROBE_EXAMPLES])
    return x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True)


def _features(
    model: nn.Module, x: torch.Tensor, spec: KernelSpec, decision: Decision, reference: Reference | None
) -> tuple[Decision, FeatureMap, FeatureMap | FeatureGroups]:
    """The decision and the features of the kernel itself, and the features of all groups, which share passes."""
    if spec.group is None or decision.group:
        features = make_feature_map(model, x, spec, decision, reference=reference)
        return decision, features, features
    each = {name: of_group(decision, spec, name) for name in spec.group_names}
    maps = {name: make_feature_map(model, x, spec, own, reference=reference) for name, own in each.items()}
    return each[spec.group], maps[spec.group], FeatureGroups(decision.estimator, maps)


def _decide(
    config: Config, dataset: Dataset, model: nn.Module, x: torch.Tensor, spec: KernelSpec, reference: Reference | None
) -> tuple[Decision, int]:
    """The decision for a prepared model, and the batch with which it was found to fit into memory."""
    fitting = FittingBatch(choose_batch(config, model, x, len(dataset.train.ids)))
    threads = threads_of(config.compute)
    decision = fitting.run(lambda batch: decide(model, x, spec, batch=batch, threads=threads, reference=reference))
    decision = with_automatic_draws(model, x, spec, decision, batch=fitting.size)
    return decision, fitting.size


def _sizes(dataset: Dataset, decision: Decision, features: FeatureMap) -> Sizes:
    return Sizes(
        num_train=len(dataset.train.ids),
        num_test=len(dataset.test.ids),
        num_outputs=decision.num_outputs,
        num_kernel_outputs=len(features.columns),
        num_parameters=decision.num_parameters,
        num_draws=features.num_draws,
        num_blocks=features.num_blocks,
        num_classes=dataset.num_classes,
    )


def _check_sizes(config: Config, dataset: Dataset, sizes: Sizes) -> None:
    """What neither the data nor the model alone can know."""
    if sizes.num_test == 0:
        raise DataError("data.train leaves no test examples; make it smaller, or give data.test at least 1")
    expected = dataset.num_outputs
    needs_match = config.regression.center_outputs or config.kernel.outputs == Outputs.FULL
    if needs_match and sizes.num_outputs != expected:
        raise ArgumentError(
            f"the model has {sizes.num_outputs} outputs and the data {expected} targets; regression with "
            "kernel.outputs 'full' or regression.center_outputs needs as many outputs as targets"
        )


def _with_or_without_tiles(job: Job, dataset: Dataset) -> tuple[Job, tuple[StoredArray, ...]]:
    """The job and its arrays, without tiles if they do not fit on the disk and a factor says the same.

    Raises:
        ArgumentError: tiles are not to be written, but there is no factor.
    """
    asked, factor, arrays = job.config.compute.write_tiles, stored_factor_form(job), describe_arrays(job, dataset)
    if asked is False and factor is None:
        raise ArgumentError(
            f"compute.write_tiles is false, but this kernel has no factor to use instead; {WITH_FACTOR}, unless "
            "statistic is unbiased; set compute.write_tiles to auto or true"
        )
    free = free_disk(RunStorage(job.run_dir))
    wanted = sum(array.num_bytes for array in arrays)
    if asked != "auto" or factor is None or free is None or wanted <= free[0]:
        return job, arrays
    job = replace(job, layout=replace(job.layout, write_tiles=False))
    return job, describe_arrays(job, dataset)


def describe_arrays(job: Job, dataset: Dataset) -> tuple[StoredArray, ...]:
    """All arrays of the store for this job and data."""
    targets = {split: getattr(dataset, split).targets for split in SPLITS}
    ids = {split: getattr(dataset, split).ids for split in SPLITS}
    return tuple(all_arrays(job, targets, ids))


def stage_fingerprints(config: Config, parts: Mapping[str, Any]) -> dict[str, str]:
    """One hash for the kernel and one for each later stage, which adds its own section and a user's code."""
    kernel = fingerprint(parts)
    added = stages_of(config.stages)[len(stages_of()) :]
    spectrum, regression = config.spectrum.model_dump(mode="json"), config.regression.model_dump(mode="json")
    spectrum_code = _code(config.spectrum.method, SPECTRUM_SOLVERS)
    regression_code = _code(config.regression.method, REGRESSION_SOLVERS)
    return {
        "kernel": kernel,
        "spectrum": fingerprint({"kernel": kernel, "spectrum": spectrum} | spectrum_code),
        "regression": fingerprint({"kernel": kernel, "regression": regression} | regression_code),
        **{
            stage.name: fingerprint({"kernel": kernel, "stage": location, "code": code_digest(type(stage))})
            for location, stage in zip(config.stages, added, strict=True)
        },
    }


def _code(name: str, table: Registry[Any]) -> dict[str, str]:
    """The digest of a user's own solver; nothing for others."""
    return {"code": code_digest(table.get(name))} if name.startswith(PYTHON) else {}


def _fit(
    config: Config,
    job: Job,
    features: FeatureMap,
    together: FeatureMap | FeatureGroups,
    arrays: tuple[StoredArray, ...],
    model: nn.Module,
    x: torch.Tensor,
    parts: Mapping[str, Any],
    prints: Mapping[str, str],
) -> Plan:
    """The plan with the number of workers that fit; refused if none does."""
    wanted = wanted_workers(config, job.layout)
    cpus = available_cpus()
    projecting = partial(project, job, features, list(arrays), model, x, num_cpus=cpus, together=together)
    projection = projecting(num_workers=wanted)
    usable = int(_USABLE_SHARE * available_memory())
    workers = wanted
    if config.compute.memory_per_worker == "auto":
        fitting = usable // projection.worker_bytes
        workers = min(wanted, fitting) if config.compute.workers == "auto" else wanted
        each = usable // max(1, workers)
    else:
        each = int(config.compute.memory_per_worker)
        if config.compute.workers == "auto":  # one at least: the driver of a cluster may have less than its workers
            workers = min(wanted, max(1, usable // each))
    if workers < 1 or projection.worker_bytes > each:
        raise ArgumentError(
            f"a worker needs {_gib(projection.worker_bytes)} at its peak and may take {_gib(each)} "
            f"({_gib(usable)} usable for {max(1, workers)} worker(s)); {_smaller_tiles(job.layout)}use fewer "
            f"compute.workers or raise compute.memory_per_worker{_other_contraction(feature_costs(job, features))}"
        )
    if projection.solve_bytes > usable:
        raise ArgumentError(
            f"spectrum and regression of {job.sizes.num_train} train rows need {_gib(projection.solve_bytes)} in one "
            f"process, {_gib(usable)} are usable; set their method to factored or iterative if it is dense, make "
            "data.train smaller or take a machine with more memory"
        )
    if workers != wanted:
        projection = projecting(num_workers=workers)
    return Plan(job, arrays, parts, prints, projection, workers, each)


def check_gpu_memory(wanted: int, layout: Layout, workers_per_gpu: int) -> None:
    """Check that the workers of a GPU, each taking `wanted` bytes of it, fit beside what is there."""
    usable = int(_USABLE_SHARE * torch.cuda.mem_get_info(layout.device)[0])
    if wanted * workers_per_gpu > usable:
        raise ArgumentError(
            f"a worker needs {_gib(wanted)} of its GPU's memory at its peak, {_gib(usable)} are usable for "
            f"{workers_per_gpu} worker(s); {_smaller_tiles(layout)}use fewer compute.workers_per_gpu"
        )


def _smaller_tiles(layout: Layout) -> str:
    """What makes a worker's tiles smaller, as the first items of a list; empty if nothing does."""
    smaller = f"make compute.tile smaller than {layout.tile}, " if layout.tile > 1 else ""
    return smaller + ("set compute.stderr to sample, " if layout.stderr == StandardErrorChoice.ENTRY else "")


def _other_contraction(costs: FeatureCosts) -> str:
    """What else would make features smaller, if a sketch would."""
    return "; or set kernel.contraction to sketch, which is smaller but adds an error" if costs.allows_sketch else ""


def wanted_workers(config: Config, layout: Layout) -> int:
    """As many as this machine has places for, unless the configuration says."""
    if config.compute.executor == ExecutorChoice.SERIAL:
        return 1
    if config.compute.workers != "auto":
        return config.compute.workers
    if layout.device.startswith("cuda"):
        return max(1, torch.cuda.device_count()) * config.compute.workers_per_gpu
    return max(1, available_cpus() // layout.threads)


def check_disk(storage: RunStorage, wanted: int) -> None:
    """Check that a local run directory's disk has space for the arrays before compression."""
    free = free_disk(storage)
    if free is not None and wanted > free[0]:
        raise ArgumentError(
            f"the arrays take {_gib(wanted)} on disk and {_gib(free[0])} are free at {free[1]}; choose another "
            "run_dir, set compute.stderr to sample, or make data.train smaller"
        )


def free_disk(storage: RunStorage) -> tuple[int, Path] | None:
    """Return the free bytes at a local run directory, and the existing folder above it; None for object stores."""
    if storage.local_path is None:
        return None
    nearest = next(folder for folder in (storage.local_path, *storage.local_path.parents) if folder.exists())
    return psutil.disk_usage(str(nearest)).free, nearest


def available_memory() -> int:
    """Bytes of memory that are free now."""
    return int(psutil.virtual_memory().available)


def check_device(device: str, compute: ComputeConfig, *, continued: bool = False) -> None:
    """Check that the device exists.

    Args:
        device: the device of the run.
        compute: the section of the configuration.
        continued: whether a stored run continues on its device; only the message differs.

    Raises:
        ArgumentError: the device does not exist here, or workers are to share a GPU and there is none.
    """
    if compute.workers_per_gpu > 1 and not device.startswith("cuda"):
        raise ArgumentError(
            f"compute.workers_per_gpu is {compute.workers_per_gpu}, but the run is on {device}; set "
            "compute.device=cuda, or leave compute.workers_per_gpu at 1"
        )
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        if continued:
            raise ArgumentError(
                f"the run was laid out on '{device}', but torch sees no GPU here; continue or verify it on a "
                "machine with a GPU"
            )
        raise ArgumentError(
            f"compute.device is '{device}', but torch sees no GPU here; allowed: auto, cpu (the driver tries the "
            "model on the device that workers use; ray job submit --entrypoint-num-gpus 1 gives it one)"
        )
    number = torch.device(device).index or 0
    if number >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ArgumentError(f"compute.device is '{device}', but torch sees cuda:0 to cuda:{last} here")
    if number > 0 and compute.executor == ExecutorChoice.RAY:
        raise ArgumentError(
            f"compute.device is '{device}', but with Ray every worker has its own GPUs and sees the first as cuda:0; "
            "set compute.device=cuda, or compute.executor=serial"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
