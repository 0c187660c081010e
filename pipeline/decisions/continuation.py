"""What a run directory that already holds a run allows: continue, rerun later stages, or refuse and say why.

Compares values only; it changes nothing on disk. Names, places, executors, workers and memory never count.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from nntk_dist.errors import NNTKError, StoreError
from nntk_dist.planning.decision import Decision
from nntk_dist.planning.model_probes import ModelProbes
from nntk_dist.products.feature_description import FeatureStorage
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from pipeline.config.schema import Config, config_from_dict
from pipeline.decisions.build import build_spec
from pipeline.job.job import Job, Layout, Sizes
from pipeline.records.manifest import Manifest, describe_difference
from pipeline.storage.run_storage import RunStorage

Section = TypeVar("Section")
LATER_STAGES = ("spectrum", "regression")


def stored_job(manifest: Manifest) -> Job:
    """The job that a manifest describes, without loading data or model. Raises an NNTKError where it is not whole."""
    config = config_from_dict(manifest.config)
    return Job(
        run_dir=RunStorage(config.run_dir).url,
        fingerprint=manifest.fingerprints.get("kernel", ""),
        config=config,
        spec=build_spec(config.kernel),
        decision=_restored_decision(manifest),
        layout=_restored(Layout, manifest.layout, "layout"),
        sizes=_restored(Sizes, manifest.sizes, "sizes"),
        features=_restored_features(manifest),
    )


def stored_probes(manifest: Manifest) -> ModelProbes | None:
    """What the model was found to be like; None where the run was planned by a version that kept no probes.

    Raises: NNTKError where they are not whole.
    """
    values = manifest.decision.get("probes")
    return None if values is None else _restored(ModelProbes, values, "decision.probes")


def _restored_decision(manifest: Manifest) -> Decision:
    return _restored(Decision, {**manifest.decision, "probes": stored_probes(manifest)}, "decision")


def _restored_features(manifest: Manifest) -> FeatureStorage:
    """How the store keeps features. Raises a StoreError if the manifest's record is not whole."""
    try:
        return FeatureStorage.from_plain(manifest.features)
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"manifest.json is broken at features: {error}; restore it, or choose another run_dir"
        ) from error


def _restored(kind: type[Section], values: Mapping[str, Any], key: str) -> Section:
    try:
        return kind(**values)
    except TypeError as error:
        reason = str(error).replace(f"{kind.__name__}.__init__() ", "")
        raise NNTKError(f"manifest.json is broken at {key}: {reason}; restore it, or choose another run_dir") from error


def check_kernel(manifest: Manifest, config: Config, parts: Mapping[str, Any], run_dir: str) -> None:
    """Raise an NNTKError, naming the first difference, unless the stored kernel is the one that is asked for."""
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
        raise NNTKError(
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
        kept = manifest.layout.get(key)
        too_few = key == "stderr" and manifest.sizes["num_blocks"] < MINIMUM_BLOCKS  # there are none, whatever is asked
        # The batch may have been halved since, where memory ran out: what was asked then is as good as what came of it.
        asked_then = key == "batch" and value == manifest.config.get("compute", {}).get(key)
        if not (value in ("auto", kept) or too_few or asked_then):
            raise NNTKError(
                f"{run_dir} was laid out with compute.{key} {kept}, the configuration says {value}; set "
                f"compute.{key}={kept}, or choose another run_dir"
            )


def stages_to_rerun(
    manifest: Manifest, config: Config, fingerprints: Mapping[str, str], run_dir: str, *, resume: bool
) -> tuple[str, ...]:
    """Later stages whose section changed, the report among them on resume; () where nothing did.

    Raises: NNTKError without `resume`, where the run is unfinished or a later section changed.
    """
    changed = tuple(stage for stage in LATER_STAGES if fingerprints[stage] != manifest.fingerprints.get(stage))
    if changed and not resume:
        old = {stage: manifest.config.get(stage, {}) for stage in changed}
        new = {stage: getattr(config, stage).model_dump(mode="json") for stage in changed}
        raise NNTKError(
            f"{run_dir} was finished with another {' and '.join(changed)}: {describe_difference(old, new)}; "
            f"--resume reruns only {' and '.join(changed)}"
        )
    if not resume and manifest.completed is None:
        raise NNTKError(f"{run_dir} holds an unfinished run of this configuration; add --resume to continue it")
    page_changed = resume and config.report.model_dump(mode="json") != manifest.config.get("report")
    return (*changed, "report") if page_changed else changed
