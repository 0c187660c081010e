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
from nntk_dist.registration.registry import PYTHON
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from pipeline.config.schema import Config, config_from_dict
from pipeline.decisions.build import build_spec
from pipeline.job.function_values import FunctionValues
from pipeline.job.job import Job, Layout, Sizes
from pipeline.records.manifest import Manifest, describe_difference, environment_versions
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
        function=_stored_values(manifest),
        solvers={stage: _restored_choice(stage, values) for stage, values in manifest.solvers.items()},
    )


def stored_decision(manifest: Manifest) -> Decision:
    """Restore the decision that a manifest keeps.

    Raises:
        StoreError: it is not whole.
    """
    return _restored(lambda: Decision.from_plain(manifest.decision), "decision")


def _stored_values(manifest: Manifest) -> FunctionValues:
    return _restored(lambda: from_plain(FunctionValues, manifest.identity.get("function")), "identity.function")


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


def check_kernel(manifest: Manifest, config: Config, parts: Mapping[str, Any], run_dir: str) -> dict[str, Any]:
    """Check that the stored kernel is the configured one, and return its parts as they are stored.

    Values of f agree to rounding, everything else exactly.

    Args:
        manifest: of the run.
        config: the configuration with which it goes on.
        parts: what `identity` says of it.
        run_dir: for messages.

    Raises:
        StoreError: it is another one, or is laid out in another way; the message names the first difference.
    """
    plain, stored = json.loads(json.dumps(parts)), manifest.identity
    values = _stored_values(manifest)
    changed = values.difference(from_plain(FunctionValues, plain["function"]))
    if changed is None:
        plain["function"] = stored["function"]
    if plain != stored:
        raise StoreError(
            f"{run_dir} holds another kernel: {_difference(manifest, config, plain, changed)}; choose another run_dir, "
            "or remove this one"
        )
    _check_layout(manifest, config, run_dir)
    return plain


def _difference(manifest: Manifest, config: Config, plain: Mapping[str, Any], changed: str | None) -> str:
    """The first differences between the configured kernel and the stored one, in words that name their cause."""
    stored = manifest.identity
    named = {key: getattr(config, key).model_dump(mode="json") for key in ("data", "model", "kernel")}
    sections = [key for key in named if plain[key] != stored.get(key)]
    old = {key: manifest.config.get(key, {}) for key in sections}
    new = {key: named[key] for key in sections}
    if plain["dtype"] != stored.get("dtype"):
        old["compute"], new["compute"] = {"dtype": stored.get("dtype")}, {"dtype": plain["dtype"]}
    if old != new:
        return describe_difference(old, new)
    # the same words, other contents: a changed file
    if "data" in sections:
        parts = ", ".join(key for key, value in plain["data"].items() if value != stored["data"].get(key))
        source, unfixed = config.data.source, ""
        if source.startswith(PYTHON):
            unfixed = ", or it draws random numbers without a fixed seed"
        return f"'{source}' gives other examples ({parts}), so its files or its code have changed since{unfixed}"
    if plain["model"] != stored.get("model"):
        source, unfixed = config.model.checkpoint or config.model.builder, ""
        if source.startswith(PYTHON):
            unfixed = ", or it draws random numbers that model.seed does not fix"
        if config.model.checkpoint is None:  # torch rounds random numbers by the instructions of the processor
            unfixed += ", or this is another kind of processor, whose initial parameters differ in their last bits"
        return (
            f"'{source}' gives other parameters or freezes others, so its file or its code has changed since{unfixed}"
            f"{_versions(manifest)}"
        )
    kernel, output = config.kernel, config.model.output
    function = output.get("function") if isinstance(output, Mapping) else output
    code = [config.model.builder, function, kernel.weighting.name, kernel.distribution.name]
    own = ", ".join(str(each) for each in code if str(each).startswith(PYTHON)) or config.model.builder
    return f"the code of {own} has changed since: {changed}{_versions(manifest)}; restore it to continue"


def _versions(manifest: Manifest) -> str:
    """The packages that have another version than the run began with."""
    now = environment_versions()
    others = [f"{name} {old} -> {now[name]}" for name, old in manifest.versions.items() if now.get(name) != old]
    return f"; versions have changed too: {', '.join(others)}" if others else ""


def _check_layout(manifest: Manifest, config: Config, run_dir: str) -> None:
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
        difference = describe_difference(old, new) or "the code has changed since"
        raise StoreError(
            f"{run_dir} was finished with another {' and '.join(changed)}: {difference}; "
            f"--resume (in Python resume=True) reruns only {' and '.join(changed)}"
        )
    if not resume and manifest.completed is None:
        raise StoreError(
            f"{run_dir} holds an unfinished run of this configuration; to continue it, add --resume (in Python "
            "resume=True)"
        )
    page_changed = resume and config.report.model_dump(mode="json") != manifest.config.get("report")
    return (*changed, "report") if page_changed else changed
