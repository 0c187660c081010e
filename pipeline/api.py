"""The pipeline from Python: `run`, `run_groups` and `plan`, which do what the verbs `nntk run` and `nntk plan` do.

The command line prints what these functions return.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nntk_dist.errors import ArgumentError
from nntk_dist.store.opening import open_groups, open_kernel
from nntk_dist.store.stored_kernel import StoredKernel
from pipeline.config.schema import Config, config_from_dict, load_config
from pipeline.driver.groups import execute_groups, has_groups, prepare_groups
from pipeline.driver.progress import SilentProgress, make_progress
from pipeline.driver.run import execute, prepare
from pipeline.planning.plan import Plan

Overrides = Mapping[str, Any]


def run(
    config: str | Path | Mapping[str, Any],
    overrides: Overrides | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    progress: bool = True,
) -> StoredKernel:
    """Run all stages of a configuration and open the kernel. A run that is already finished is only opened.

    Stages run on Ray, which is started on this machine unless `address` names a cluster, or one after the other in this
    process with `compute.executor: serial`.

    Args:
        config: the path of a YAML file, or its content as a mapping.
        overrides: values for dotted keys, laid over the configuration.
        resume: whether to continue a stopped run, or to redo the stages whose settings changed.
        address: the address of a Ray cluster.
        progress: whether to show progress on standard error.

    Returns:
        The stored kernel. If an accuracy was requested, `manifest["results"]["rtol_reached"]` says whether it was
        reached.

    Raises:
        NNTKError: the configuration, the data, the model or the store is not as it must be, or the run cannot fit into
            memory or on disk.

    Example:
        >>> from pipeline import run
        >>> kernel = run("configs/digits.yaml", {"kernel.distribution.gamma": 0.1})  # doctest: +SKIP
        >>> kernel.regression[["ridge", "test_accuracy"]]  # doctest: +SKIP
    """
    settings = _load_one(config, overrides, "run_groups")
    prepared = prepare(settings, resume=resume)
    if not prepared.nothing_to_do:
        execute(prepared, address=address, progress=make_progress() if progress else SilentProgress())
    return open_kernel(settings.run_dir)


def run_groups(
    config: str | Path | Mapping[str, Any],
    overrides: Overrides | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    progress: bool = True,
) -> dict[str, StoredKernel]:
    """Run a configuration whose `kernel.parameters` is a mapping, and open the kernel of each group.

    The features of all groups are computed in the same passes over the model. Each group then has a run of its own in
    `run_dir/NAME`.

    Args:
        config: as `run`.
        overrides: as `run`.
        resume: as `run`.
        address: as `run`.
        progress: as `run`.

    Returns:
        The stored kernels by group.

    Raises:
        NNTKError: as `run` does; or the configuration has no groups.

    Example:
        >>> from pipeline import run_groups
        >>> layers = {"first": ["0.*"], "others": ["2.*", "4.*"]}
        >>> kernels = run_groups("configs/digits.yaml", {"kernel.parameters": layers})  # doctest: +SKIP
        >>> kernels["first"].regression  # doctest: +SKIP
    """
    settings = _load(config, overrides)
    if not has_groups(settings):
        raise ArgumentError("kernel.parameters is a list, so there is one kernel; use run")
    groups = prepare_groups(settings, resume=resume)
    if not all(each.nothing_to_do for each in groups.values()):
        shown = make_progress() if progress else SilentProgress()
        execute_groups(groups, settings, address=address, progress=shown)
    return open_groups(settings.run_dir)


def plan(config: str | Path | Mapping[str, Any], overrides: Overrides | None = None) -> Plan:
    """Plan a run: estimator and why, tiles, operations, time, disk and memory. Nothing is written or started.

    Args:
        config: the path of a YAML file, or its content as a mapping.
        overrides: values for dotted keys, laid over the configuration.

    Returns:
        The plan: `projection` holds seconds, operations and bytes, `job.decision` the estimator and the reason.

    Raises:
        NNTKError: as `run` does.

    Example:
        >>> from pipeline import plan
        >>> plan("configs/digits.yaml", {"data.train": 1000}).projection.worker_bytes  # doctest: +SKIP
    """
    return prepare(_load_one(config, overrides, "plan with kernel.group"), resume=True).plan


def _load_one(config: str | Path | Mapping[str, Any], overrides: Overrides | None, instead: str) -> Config:
    """The configuration of one kernel."""
    settings = _load(config, overrides)
    if has_groups(settings):
        raise ArgumentError(
            f"kernel.parameters is a mapping of groups, each with a kernel; use {instead}, or set kernel.group to one "
            "of them"
        )
    return settings


def _load(config: str | Path | Mapping[str, Any], overrides: Overrides | None) -> Config:
    if isinstance(config, Mapping):
        return config_from_dict(config, overrides or {})
    return load_config(config, overrides or {})
