"""What a run directory that already holds a run allows: continue, rerun later stages, or refuse and say why.

Compares values only; it changes nothing on disk. Names, places, executors, workers and memory never count.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from nntk_dist.analysis.solvers import SolverChoice
from nntk_dist.errors import StoreError
from nntk_dist.planning.decision import Decision
from nntk_dist.planning.plain import from_plain
from nntk_dist.products.feature_description import FeatureStorage
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from pipeline.config.schema import Config, config_from_dict
from pipeline.decisions.build import build_spec
from pipeline.job.job import Job, Layout, Sizes
from pipeline.records.manifest import Manifest, describe_difference
from pipeline.storage.run_storage import RunStorage

Section = TypeVar("Section")


def stored_job(manifest: Manifest, config: Config | None = None) -> Job:
    """Restore the job that a manifest describes; neither data nor model are loaded, and nothing is decided.

    Args:
        manifest: of the run.
        config: the configuration with which the run goes on, if it is not the stored one; `check_kernel` says whether
            the stored decisions hold for it.

    Raises:
        StoreError: the manifest is not whole.
    """
    stored = config_from_dict(manifest.config)  # checked also if the run goes on with another one
    config = stored if config is None else config
    return Job(
        run_dir=RunStorage(config.run_dir).url,
        fingerprint=manifest.fingerprints.get("kernel", ""),
        config=config,
        spec=build_spec(config.kernel),
        decision=stored_decision(manifest),
        layout=_restored(lambda: from_plain(Layout, manifest.layout), "layout"),
        sizes=_restored(lambda: from_plain(Sizes, manifest.sizes), "sizes"),
        features=_restored(lambda: from_plain(FeatureStorage, manifest.features), "features"),
        solvers={stage: _restored_choice(stage, values) for stage, values in manifest.solvers.items()},
    )


def stored_decision(manifest: Manifest) -> Decision:
    """Restore the decision that a manifest keeps.

    Raises:
        StoreError: it is not whole.
    """
    return _restored(lambda: Decision.from_plain(manifest.decision), "decision")


def _restored_choice(stage: str, values: Mapping[str, Any]) -> SolverChoice:
    try:
        return SolverChoice(**values)
    except TypeError as error:
        reason = str(error).replace("SolverChoice.__init__() ", "")
        raise StoreError(
            f"manifest.json is broken at solvers.{stage}: {reason}; restore it, or choose another run_dir"
        ) from error


def _restored(restore: Callable[[], Section], key: str) -> Section:
    try:
        return restore()
    except ValueError as error:
        raise StoreError(f"manifest.json is broken at {key}.{error}; restore it, or choose another run_dir") from error


def check_kernel(manifest: Manifest, config: Config, parts: Mapping[str, Any], run_dir: str) -> None:
    """Check that the stored kernel is the configured one.

    Raises:
        StoreError: it is another one, or is laid out in another way; the message names the first difference.
    """
    plain = json.loads(json.dumps(parts))
    if plain != manifest.identity:
        named = {key: getattr(config, key).model_dump(mode="json") for key in ("data", "model", "kernel")}
        stored = {key: manifest.config.get(key, {}) for key in named}
        sections = [key for key in named if plain[key] != manifest.identity.get(key)]
        old = {key: stored[key] for key in sections}
        new = {key: named[key] for key in sections}
        if plain["dtype"] != manifest.identity.get("dtype"):
            old["compute"], new["compute"] = {"dtype": manifest.identity.get("dtype")}, {"dtype": plain["dtype"]}
        if old == new:  # the same words, other contents: a changed file
            old, new = manifest.identity, plain
        raise StoreError(
            f"{run_dir} holds another kernel: {describe_difference(old, new)}; choose another run_dir, or remove "
            "this one"
        )
    compute = config.compute
    asked = {
        "tile": compute.tile,
        "stderr": compute.stderr,
        "batch": compute.batch,
        "threads": compute.threads,
        "device": compute.device,
        "write_tiles": compute.write_tiles,
        "matmul_precision": compute.matmul_precision,
    }
    for key, value in asked.items():
        kept = manifest.layout[key]
        too_few = key == "stderr" and manifest.sizes["num_blocks"] < MINIMUM_BLOCKS  # then there are none in any case
        # If memory ran out, the batch was halved; the first configured batch is still allowed.
        asked_then = key == "batch" and value == manifest.config.get("compute", {}).get(key)
        if not (value in ("auto", kept) or too_few or asked_then):
            raise StoreError(
                f"{run_dir} was laid out with compute.{key} {kept}, the configuration says {value}; set "
                f"compute.{key}={kept}, or choose another run_dir"
            )


def stages_to_rerun(
    manifest: Manifest, config: Config, fingerprints: Mapping[str, str], run_dir: str, *, resume: bool
) -> tuple[str, ...]:
    """Return the later stages whose section changed, and on resume the report if its section did.

    Raises:
        StoreError: without `resume`, the run is unfinished or a later section changed.
    """
    later = [stage for stage in fingerprints if stage != "kernel"]
    changed = tuple(stage for stage in later if fingerprints[stage] != manifest.fingerprints.get(stage))
    if changed and not resume:
        asked = config.model_dump(mode="json")
        old, new = ({key: each.get(key, {}) for key in (*changed, "stages")} for each in (manifest.config, asked))
        raise StoreError(
            f"{run_dir} was finished with another {' and '.join(changed)}: {describe_difference(old, new)}; "
            f"--resume (in Python resume=True) reruns only {' and '.join(changed)}"
        )
    if not resume and manifest.completed is None:
        raise StoreError(
            f"{run_dir} holds an unfinished run of this configuration; to continue it, add --resume (in Python "
            "resume=True)"
        )
    page_changed = resume and config.report.model_dump(mode="json") != manifest.config.get("report")
    return (*changed, "report") if page_changed else changed
