"""The pipeline from Python: `run` and `plan`, which do what the verbs `nntk run` and `nntk plan` do.

The command line prints what these functions return.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nntk_dist.store.opening import open_kernel
from nntk_dist.store.stored_kernel import StoredKernel
from pipeline.config.schema import Config, config_from_dict, load_config
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
    settings = _load(config, overrides)
    prepared = prepare(settings, resume=resume)
    if not prepared.nothing_to_do:
        execute(prepared, address=address, progress=make_progress() if progress else SilentProgress())
    return open_kernel(settings.run_dir)


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
    return prepare(_load(config, overrides), resume=True).plan


def _load(config: str | Path | Mapping[str, Any], overrides: Overrides | None) -> Config:
    if isinstance(config, Mapping):
        return config_from_dict(config, overrides or {})
    return load_config(config, overrides or {})
