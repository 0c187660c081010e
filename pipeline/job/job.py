"""The values that a run is made of: layout, sizes, job. All frozen, picklable and written into the manifest.

A task is a pure, idempotent function of (job, stage, tile): whoever runs it, however often, writes the same bits to
the same place. Nothing here computes.

Units: `_bytes`, `_seconds`. Rows are counted in examples, also where a `full` kernel holds C rows for each.
"""

from dataclasses import asdict, dataclass
from typing import Any

from nntk_dist.planning.decision import Decision
from nntk_dist.products.feature_description import FeatureStorage
from nntk_dist.spec import KernelSpec
from pipeline.config.schema import Config
from pipeline.job.task import Outcome, Task

__all__ = ["SPLITS", "Job", "Layout", "Outcome", "Sizes", "Task", "as_plain", "intervals"]

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Layout:
    """What decides rounding and file layout: fixed when a run is planned, kept in the manifest, reused on resume."""

    tile: int
    batch: int
    shard_rows: int
    chunk_draws: int
    threads: int
    device: str
    dtype: str
    stderr: str
    store_features: bool
    outputs_at_once: int
    write_tiles: bool = True
    matmul_precision: str = "highest"
    tile_group: int = 1  # columns of tiles whose features a worker keeps


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything."""

    num_train: int
    num_test: int
    num_outputs: int
    num_kernel_outputs: int
    num_parameters: int
    num_draws: int
    num_blocks: int
    num_classes: int | None

    def rows(self, split: str) -> int:
        return self.num_train if split == "train" else self.num_test


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know, beside the data and the model's state."""

    run_dir: str
    fingerprint: str
    config: Config
    spec: KernelSpec
    decision: Decision
    layout: Layout
    sizes: Sizes
    features: FeatureStorage


def intervals(total: int, step: int) -> list[tuple[int, int]]:
    """Consecutive half-open intervals of length `step` that cover `total`; the last may be shorter."""
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def as_plain(value: object) -> dict[str, Any]:
    """A frozen dataclass as the plain mapping that the manifest keeps."""
    return asdict(value)  # type: ignore[call-overload]
