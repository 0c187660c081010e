"""The values that define a run: layout, sizes, job. All are frozen, picklable and written into the manifest.

A task is a pure, idempotent function of (job, stage, tile): whoever runs it, however often, writes the same bits to
the same place. Nothing here computes.

Units: `_bytes`, `_seconds`. Rows are counted in examples, also if a `full` kernel holds C rows for each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nntk_dist.analysis.solvers import SolverChoice
from nntk_dist.planning.decision import Decision
from nntk_dist.products.feature_description import FeatureStorage
from nntk_dist.products.wanted import Wanted
from nntk_dist.spec import KernelSpec
from pipeline.config.choices import StandardErrorChoice
from pipeline.config.schema import Config
from pipeline.job.function_values import FunctionValues
from pipeline.job.task import Outcome, Task

__all__ = ["SPLITS", "Job", "Layout", "Outcome", "Sizes", "Task", "intervals"]

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Layout:
    """What decides rounding and file layout: fixed when a run is planned, kept in the manifest, reused on resume.

    Attributes:
        tile: rows of a tile.
        batch: rows of one forward pass.
        shard_rows: rows of one shard of features.
        chunk_draws: draws of one task of the stage `features`.
        threads: threads of a worker.
        device: the device of the workers.
        dtype: the dtype of their results.
        stderr: which entries get a standard error.
        store_features: whether features are stored; otherwise each tile recomputes its rows.
        outputs_at_once: outputs whose features are in memory at the same time, if features are recomputed.
        write_tiles: whether the kernel's tiles are stored.
        matmul_precision: of float32 matrix products on a GPU.
        tile_group: columns of tiles whose features a worker keeps.
    """

    tile: int
    batch: int
    shard_rows: int
    chunk_draws: int
    threads: int
    device: str
    dtype: str
    stderr: StandardErrorChoice
    store_features: bool
    outputs_at_once: int
    write_tiles: bool
    matmul_precision: str
    tile_group: int


@dataclass(frozen=True)
class Sizes:
    """The numbers of rows, outputs, parameters, draws and blocks; `num_classes` is None for real-valued targets."""

    num_train: int
    num_test: int
    num_outputs: int
    num_kernel_outputs: int
    num_parameters: int
    num_draws: int
    num_blocks: int
    num_classes: int | None

    @property
    def draws_per_block(self) -> int:
        """Draws of one block; the blocks of a sketched local kernel share its one gradient."""
        return max(1, self.num_draws // self.num_blocks)

    def rows(self, split: str) -> int:
        """Return the number of examples of a split, `train` or `test`."""
        return self.num_train if split == "train" else self.num_test


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know beside the data and the model's state; the manifest restores an equal one.

    Attributes:
        run_dir: the run directory, as a URL.
        fingerprint: of the kernel.
        config: the configuration.
        spec: the kernel, in the library's terms.
        decision: how it is computed.
        layout: how it is cut into tasks and stored.
        sizes: how much there is of everything.
        features: how the store keeps features.
        function: values of f on a few rows, with which a worker compares the model that it builds.
        solvers: the solver of each stage that solves, as the plan chose.
        siblings: the jobs of other groups of parameters whose features are computed in the same passes, by name.
    """

    run_dir: str
    fingerprint: str
    config: Config
    spec: KernelSpec
    decision: Decision
    layout: Layout
    sizes: Sizes
    features: FeatureStorage
    function: FunctionValues
    solvers: Mapping[str, SolverChoice] = field(default_factory=dict)
    siblings: Mapping[str, "Job"] = field(default_factory=dict)

    @property
    def wanted(self) -> Wanted:
        """Whether products are made with standard errors for every entry."""
        return Wanted(stderr=self.layout.stderr == StandardErrorChoice.ENTRY)


def intervals(total: int, step: int) -> list[tuple[int, int]]:
    """Return consecutive half-open intervals of length `step` that cover `total`; the last may be shorter."""
    return [(start, min(start + step, total)) for start in range(0, total, step)]
