"""`nntk verify`: checks that the store agrees with the ledger, is symmetric and finite, and can be computed again.

It reads the whole kernel once, a stripe of tiles at a time. It repairs nothing; `forget` lets a resumed run do so.

Axes: i, j tiles; k recomputed tiles.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from nntk_dist.errors import NNTKError
from nntk_dist.runtime.precision import full_precision
from nntk_dist.sampling.philox import uniform
from nntk_dist.sampling.streams import VERIFIED_SAMPLE, Stream
from pipeline.config.schema import config_from_dict
from pipeline.decisions.build import build_dataset, build_model, identity
from pipeline.decisions.stored_run import check_kernel, stored_job
from pipeline.driver.run import state_of
from pipeline.job.job import Job, Outcome, Task, intervals
from pipeline.planning.plan import check_device
from pipeline.records.ledger import Ledger
from pipeline.records.lock import RunLock
from pipeline.records.manifest import Manifest, read_manifest, write_manifest
from pipeline.storage.array_table import StoredArray, feature_arrays, kernel_arrays, kernel_width
from pipeline.storage.kernel_store import checksum
from pipeline.storage.run_storage import RunStorage, StorageRefusal
from pipeline.work.context import Context
from pipeline.work.stages import stage_named, stages_of, with_readers

_ROUNDING = 1e4  # in units of the dtype's rounding: another machine's summation order, far below any wrong entry


@dataclass(frozen=True)
class Damage:
    """A task that wrote a damaged piece.

    Attributes:
        stage: the name of the stage.
        tile: the name of the task.
        readable: whether later stages may have read the piece without an error.
    """

    stage: str
    tile: str
    readable: bool


@dataclass(frozen=True)
class Finding:
    """The result of one check: its name, whether it passed, a detail, and the tasks with damaged pieces."""

    check: str
    passed: bool
    detail: str
    damaged: tuple[Damage, ...] = ()


def verify(storage: RunStorage, manifest: Manifest, *, recompute: int) -> Iterator[Finding]:
    """Yield the checks one by one, as they finish.

    Args:
        storage: the run directory.
        manifest: its manifest.
        recompute: how many tiles to compute again.

    Raises:
        NNTKError: data or model of the configuration have changed since, or the manifest is incomplete.
    """
    # The store may have been moved, so its present location replaces the stored one.
    config = config_from_dict(manifest.config).model_copy(update={"run_dir": storage.url})
    job = stored_job(manifest, config)
    dataset = build_dataset(config)
    model = build_model(config, dataset)
    check_kernel(manifest, config, identity(config, dataset, model), config.run_dir)
    check_device(job.layout.device, config.compute, continued=True)
    context = Context(job, dataset, state_of(model), built=model)
    ledger = Ledger(storage)
    checks = {
        "completeness": lambda: _completeness(job, ledger),
        "checksums": lambda: _checksums(context, ledger),
        "symmetry": lambda: _symmetry(context),
        "finiteness": lambda: _finiteness(context),
        "recomputation": lambda: _recomputed(context, ledger, recompute),
    }
    for name, check in checks.items():
        try:
            with full_precision():
                finding = check()
        except NNTKError as error:  # an unreadable piece fails the checks that need it; the other checks go on
            finding = Finding(name, False, f"cannot be checked: {error}")
        yield finding


def forget(storage: RunStorage, damaged: Iterable[Damage]) -> None:
    """Remove damaged tasks from the ledger, so that a resumed run repeats them with the same bits.

    Stages that may have read a damaged piece without an error are removed as a whole.
    """
    with RunLock(storage):
        ledger = Ledger(storage)
        manifest = read_manifest(storage)
        stages = stages_of(() if manifest is None else config_from_dict(manifest.config).stages)
        by_stage: dict[str, set[str]] = {}
        later: set[str] = set()
        for each in damaged:
            by_stage.setdefault(each.stage, set()).add(each.tile)
            if each.readable:
                later.update(with_readers([each.stage], stages) - {each.stage})
        for name, tiles in by_stage.items():
            ledger.forget(name, tiles)
        for name in later:
            ledger.forget(name)
        if manifest is not None:
            records = {
                name: record.model_copy(update={"finished": None}) if name in later | by_stage.keys() else record
                for name, record in manifest.stages.items()
            }
            write_manifest(storage, manifest.model_copy(update={"stages": records, "completed": None}))


def _completeness(job: Job, ledger: Ledger) -> Finding:
    total, missing, first = 0, 0, ""
    for stage in stages_of(job.config.stages):
        done = ledger.done(stage.name)
        for task in stage.tasks(job):
            total += 1
            if task.tile not in done:
                missing += 1
                first = first or f"; the first missing: {stage.name} {task.tile}"
    return Finding("completeness", not missing, f"{total - missing} of {total} tasks are in the ledger{first}")


def _pieces(row: Outcome) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(array path, start, checksum) of every piece that a task wrote to the kernel store."""
    for key, value in row.numbers.items():
        kind, _, piece = key.partition(":")
        if kind == "crc32c":
            path, _, start = piece.partition("@")
            yield path, tuple(map(int, start.split(","))), int(value)


def _checksums(context: Context, ledger: Ledger) -> Finding:
    """Read every piece back; a flipped byte fails in the codec or here."""
    count, wrong, damaged = 0, [], []
    for row in ledger.rows():
        for path, start, expected in _pieces(row):
            count += 1
            reason = _fault(context, path, start, expected)
            if reason is not None:
                wrong.append(f"{path} at {start}{reason}")
                damaged.append(Damage(row.stage, row.tile, readable=not reason))
    detail = f"{count - len(wrong)} of {count} pieces hold what was written"
    detail += f"; the first damaged piece: {wrong[0]}" if wrong else ""
    return Finding("checksums", not wrong, detail, tuple(dict.fromkeys(damaged)))


def _fault(context: Context, path: str, start: tuple[int, ...], expected: int) -> str | None:
    """Why a piece is damaged: empty if only its values differ, None if it is not damaged.

    Raises:
        StorageRefusal: the storage does not allow reading, which is not damage.
    """
    try:
        values = context.store.read_shard(path, start)
    except StorageRefusal:
        raise
    except NNTKError as error:
        return f" ({error})"
    return None if checksum(values) == expected else ""


def _stripes(job: Job) -> list[tuple[int, int]]:
    width = kernel_width(job)
    return [(start * width, stop * width) for start, stop in intervals(job.sizes.num_train, job.layout.tile)]


def _symmetry(context: Context) -> Finding:
    """Check that every train array equals its transpose, bit for bit."""
    wrong = []
    for array in kernel_arrays(context.job):
        if not array.path.startswith("train/"):
            continue
        stripes = _stripes(context.job)
        for i, (start, stop) in enumerate(stripes):
            rows = context.store.read(array.path, slice(start, stop), slice(start, None))
            columns = context.store.read(array.path, slice(start, None), slice(start, stop))
            if not np.array_equal(rows, columns.T, equal_nan=True):
                wrong.append(f"{array.path} in tile row {i}")
    return Finding(
        "symmetry",
        not wrong,
        f"differs: {wrong[0]}" if wrong else _symmetric_text(context.job),
    )


def _symmetric_text(job: Job) -> str:
    tiles = "every train array equals its transpose, bit for bit"
    return tiles if job.layout.write_tiles else "no tiles are stored; Φ M Φᵀ is symmetric by itself"


def _finiteness(context: Context) -> Finding:
    """Check for NaN and infinity; NaN in a standard error marks an unresolved entry and counts separately."""
    bad, unresolved = 0, 0
    for array in _kernel_or_factor(context):
        for start, stop in intervals(array.shape[0], array.shards[0]):
            values = context.store.read(array.path, slice(start, stop))
            count = int(np.count_nonzero(~np.isfinite(values)))
            if array.path.endswith("_stderr"):
                unresolved += int(np.count_nonzero(np.isnan(values)))
                count -= int(np.count_nonzero(np.isnan(values)))
            bad += count
    return Finding(
        "finiteness", bad == 0, f"{bad} entries are NaN or infinite; {unresolved} standard errors are unresolved"
    )


def _kernel_or_factor(context: Context) -> list[StoredArray]:
    """The arrays that hold the kernel: tiles, or features if no tiles are written."""
    tiles = context.job.layout.write_tiles
    return kernel_arrays(context.job) + ([] if tiles else feature_arrays(context.job))


def _recomputed(context: Context, ledger: Ledger, count: int) -> Finding:
    """Compute some tiles again from the features and compare them; without tiles, features from the model.

    A fixed seed chooses the tiles. On the same machine the bits agree; on another one, up to rounding.
    """
    stages = ("gram", "test") if context.job.layout.write_tiles else ("features", "metric", "test")
    num_rows = sum(len(ledger.done(stage)) for stage in stages)
    keys = uniform(0, Stream.SAMPLE, torch.tensor([VERIFIED_SAMPLE]), num_rows)[0] if num_rows else torch.empty(0)
    chosen = keys.argsort()[:count].tolist()
    wanted, every = set(chosen), chain.from_iterable(map(ledger.rows, stages))
    rows = {index: row for index, row in enumerate(every) if index in wanted}
    levels = {row.tile: row.numbers["level"] for row in ledger.rows("calibration")}
    comparison = _Comparison(context)
    shadow = replace(context, sink=comparison)
    distances = {}
    for row in map(rows.__getitem__, chosen):
        level = levels.get(row.tile.split("/")[0])
        comparison.distance = 0.0
        task = Task(row.stage, row.tile, {} if level is None else {"level": level})
        shadow.finish(stage_named(row.stage, context.job).execute(shadow, task))
        distances[row.tile] = comparison.distance
    same = sum(1 for distance in distances.values() if distance == 0)
    detail = f"{same} of {len(distances)} recomputed tiles have the same bits"
    if same < len(distances):
        worst = max(distances, key=distances.__getitem__)
        detail += f"; {worst} differs by {distances[worst]:.1e} of its largest entry"
    tolerance = _ROUNDING * float(torch.finfo(context.dtype).eps)
    return Finding("recomputation", all(distance <= tolerance for distance in distances.values()), detail)


@dataclass
class _Comparison:
    """A sink that compares a task's results with the store; `distance` is relative to the largest entry."""

    context: Context
    distance: float = 0.0

    def write(self, path: str, start: Sequence[int], values: np.ndarray) -> tuple[int, int]:
        stored = self.context.store.read_shard(path, start)
        if not np.array_equal(stored, values, equal_nan=True):
            self.distance = max(self.distance, _distance(stored, values))
        return 0, 0


def _distance(stored: np.ndarray, values: np.ndarray) -> float:
    """The largest difference over the largest of `values`; infinite if an entry is finite in only one of them."""
    finite = np.isfinite(values)
    scale = float(np.abs(values[finite]).max(initial=0.0))
    if scale == 0.0 or not np.array_equal(finite, np.isfinite(stored)):
        return math.inf
    return float(np.abs(stored[finite] - values[finite]).max()) / scale
