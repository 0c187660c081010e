"""The manifest: what a run is, in one JSON file that people read too.

It holds everything that resuming, repeating and reporting a run need and that is not a number per task: config,
fingerprints, versions, decision, layout, and the outcome of each stage. Beside it are two pure helpers that tell stages
apart: a fingerprint, and the first difference between two configs. It holds no arrays, only the driver writes it, and
what belongs into which stage's fingerprint is decided elsewhere.
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from nntk_dist.errors import StoreError
from pipeline.storage.run_storage import RunStorage

PATH = "manifest.json"
SCHEMA_VERSION = 1

_DISTRIBUTIONS = {"nntk": "nntk-dist"} | {name: name for name in ("torch", "numpy", "scipy", "zarr", "pyarrow", "ray")}


class StageRecord(BaseModel):
    """One stage's outcome.

    Attributes:
        started: when it first began.
        finished: when it ended; None while it is incomplete.
        seconds: time spent in it, over all attempts.
        results: its headline numbers (JSON values; NaN is stored as null).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    started: AwareDatetime
    finished: AwareDatetime | None = None
    seconds: float = 0.0
    results: dict[str, Any] = Field(default_factory=dict)


class Manifest(BaseModel):
    """A run's description. Unchangeable: `with_stage` and `model_copy(update=…)` make new ones.

    Attributes:
        schema_version: of this file's format.
        created: when the run was planned.
        config: the full configuration, defaults included.
        fingerprints: stage name to hash.
        seeds: stream name to seed.
        versions: of Python and of the packages that shape results (null if not installed).
        git_commit: of the code, "-dirty" appended if it differs from the commit; None outside a work tree.
        layout: what fixes rounding (tile, batch, draw chunk, threads, …); a resumed run takes it from here.
        sizes: how many rows, outputs, parameters, draws and blocks.
        decision: the `Decision` in plain values: estimator, reason, plans; a continued run decides nothing.
        features: the feature arrays, and how the store keeps them.
        solvers: the solver of spectrum and regression: name, reason, arguments, columns of the factor.
        identity: what the kernel's fingerprint is a hash of, in nameable parts.
        projection: projected bytes, operations and tiles.
        stages: stage name to outcome, in the order in which they began.
        results: the headline numbers (JSON values).
        completed: when the last stage and the report were done; None before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    created: AwareDatetime
    config: dict[str, Any]
    fingerprints: dict[str, str]
    seeds: dict[str, int]
    versions: dict[str, str | None]
    git_commit: str | None
    layout: dict[str, Any]
    sizes: dict[str, Any]
    decision: dict[str, Any]
    features: dict[str, Any]
    solvers: dict[str, dict[str, Any]]
    identity: dict[str, Any]
    projection: dict[str, Any] = Field(default_factory=dict)
    stages: dict[str, StageRecord] = Field(default_factory=dict)
    results: dict[str, Any] = Field(default_factory=dict)
    completed: AwareDatetime | None = None

    def with_stage(self, name: str, record: StageRecord) -> "Manifest":
        """This manifest with the record of one stage added or replaced."""
        return self.model_copy(update={"stages": {**self.stages, name: record}})

    def finished(self, stage: str) -> datetime | None:
        """Return when the stage ended, or None if it has not."""
        record = self.stages.get(stage)
        return record.finished if record else None


def read_manifest(storage: RunStorage) -> Manifest | None:
    """Read the run's manifest; None if the directory has none.

    Raises:
        StoreError: it is not valid JSON, lacks or mistypes a field, or was written by a newer version.
    """
    content = storage.read_bytes(PATH)
    if content is None:
        return None
    where = f"{PATH} in run_dir '{storage.url}'"
    try:
        document = json.loads(content)
    except ValueError as error:
        raise StoreError(f"{where} is not valid JSON ({error}); restore it, or choose another run_dir") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise StoreError(
            f"{where} has schema version {version}; this nntk reads up to {SCHEMA_VERSION}: use the nntk that wrote it"
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the top level"
        raise StoreError(
            f"{where} is broken at {key}: {first['msg']}; restore it, or choose another run_dir"
        ) from error


def write_manifest(storage: RunStorage, manifest: Manifest) -> None:
    """Replace the run's manifest, atomically."""
    storage.write_bytes(PATH, manifest.model_dump_json(indent=2).encode() + b"\n")


def environment_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that can change a run's numbers or files; None if not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_commit(source: Path = Path(__file__), *, but_for: str | None = None) -> str | None:
    """Return the commit of the work tree that tracks `source`, with "-dirty" if tracked files differ from it, those in
    its folder `but_for` not counted.

    None if there is no git or no commit, or git does not track the file: code installed into a virtual
    environment that happens to lie inside some repository is not of that repository's commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        commit = git("rev-parse", "HEAD")
        others = [] if but_for is None else ["--", ":/", f":(top,exclude){but_for}"]
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no", *others) else commit
    except (OSError, subprocess.SubprocessError):
        return None


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the hex sha256 of the canonical JSON of `parts`.

    Keys are sorted, floats written by `repr` (so 1 and 1.0 differ), tuples are lists. A NumPy array enters with its
    dtype, shape and little-endian bytes in C order, for any layout in memory; a NumPy scalar as the Python number.

    Raises:
        TypeError: a value that has no canonical form (also arrays of objects, whose bytes are addresses).
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_canonical)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU":
        flat = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<")).reshape(-1)
        return {
            "dtype": flat.dtype.str,
            "shape": value.shape,
            "sha256": hashlib.sha256(flat.view(np.uint8).data).hexdigest(),
        }
    raise TypeError(f"no canonical form for a {type(value).__name__}: {value!r:.80}")


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 3) -> str:
    """`kernel.gamma: 0.05 -> 0.1; regression.ridge.0: 1.0 -> absent; and 2 more`: the first keys that differ.

    One line, in the order of `new`, keys that only `old` has last; an empty string if nothing differs.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    # Compared by repr: NaN equals itself, and 1 differs from 1.0 as it does in a fingerprint.
    differing = [key for key in {**after, **before} if _shown(before, key, None) != _shown(after, key, None)]
    named = [f"{key}: {_shown(before, key)} -> {_shown(after, key)}" for key in islice(differing, limit)]
    more = [f"and {len(differing) - limit} more"] if len(differing) > limit else []
    return "; ".join([*named, *more])


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else None
    )
    if items is None or (not value and prefix):
        yield prefix, value
        return
    for key, inner in items:
        yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))


def _shown(flat: Mapping[str, Any], key: str, longest: int | None = 60) -> str:
    if key not in flat:
        return "absent"
    text = repr(list(flat[key]) if isinstance(flat[key], tuple) else flat[key]).replace("\n", " ")
    return text if longest is None or len(text) <= longest else f"{text[:longest]}…"
