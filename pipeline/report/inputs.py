"""The content of a report page as plain frozen values; the caller collects them from store, tables, ledger, manifest.

Nothing here reads, computes or formats. None stands for what a run lacks, such as error bars of a local kernel.

Axes: n train examples, k rows of the thumbnail. Units: `_bytes`, `_seconds`; kernel values in the kernel's own unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from nntk_dist.analysis.regression.ridge_problem import RidgeRow
from nntk_dist.planning.model_probes import ModelProbes
from nntk_dist.runtime.precision import FULL
from nntk_dist.spec import Kind, Statistic
from pipeline.report.plots import PLOTS


@dataclass(frozen=True)
class KernelFacts:
    """How the kernel was computed, and how far to trust it."""

    kind: Kind
    estimator: str
    estimator_reason: str
    statistic: Statistic  # for kind nonlocal only
    outputs: str
    num_train: int
    num_test: int
    num_parameters: int
    num_draws: int | None = None
    num_blocks: int | None = None
    distribution: str | None = None  # such as "gaussian, γ = 0.05"
    weighting: str | None = None  # in words; None if all draws have the same weight
    relative_error: float | None = None  # √(Σ variance / Σ entry²) of the unbiased kernel
    relative_error_bound: float | None = None  # upper bound on the actual error, with 95 % confidence
    accuracy: str | None = None  # how the search for a requested accuracy ended, in words
    accuracy_reached: bool | None = None
    accuracy_caution: str | None = None  # why the estimate is useless, and what helps
    interval_caution: str | None = None  # why intervals of entries may be too short, and what helps
    relative_bias: float | None = None  # ‖plugin − unbiased‖ / ‖unbiased‖
    unresolved_share: float = 0.0  # of the entries of the train kernel
    matmul_precision: str = FULL  # precision of the products that form tiles


@dataclass(frozen=True)
class Thumbnail:
    """The Gram matrix, subsampled to at most 512 rows and sorted."""

    values: Float[np.ndarray, "k k"]
    ordering: str  # such as "ordered by class"
    boundaries: Sequence[int] = ()  # first row of each class except the first class
    labels: Sequence[str] = ()  # one per class


@dataclass(frozen=True)
class StandardErrors:
    """Summary of the standard errors of the resolved entries of the train kernel.

    Attributes:
        median: their median.
        percentile_90: 90 % of them are below it.
        largest: their maximum.
        mean_diagonal: the mean of the kernel's diagonal.
        num_rows: how many of the first rows all other numbers cover; None for all rows.
    """

    median: float
    percentile_90: float
    largest: float
    mean_diagonal: float
    num_rows: int | None = None

    @property
    def rows_text(self) -> str:
        """The rows that are covered, as text to append; empty for all rows."""
        return "" if self.num_rows is None else f" of the first {self.num_rows} rows"


@dataclass(frozen=True)
class RegressionFacts:
    """Kernel ridge regression: one row per ridge, as in the regression table."""

    rows: Sequence[RidgeRow]
    num_classes: int | None = None  # None for targets that are no classes

    @property
    def selected(self) -> RidgeRow:
        """The row of the selected ridge."""
        return next(row for row in self.rows if row.selected)


@dataclass(frozen=True)
class SolverFacts:
    """How the spectrum or the regression was solved, if not by one dense decomposition."""

    method: str
    columns: int | None = None  # of the factor
    passes: int | None = None  # over the stored kernel
    converged: bool | None = None  # whether an iteration reached its tolerance


@dataclass(frozen=True)
class StageTiming:
    """Time and resources of one stage, from manifest and ledger: wall-clock time, and sums over its tasks."""

    stage: str
    tasks: int
    wall_seconds: float
    busy_seconds: float
    written_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Provenance:
    """The origin of the run, and the commands that repeat it."""

    created: str
    git_commit: str | None
    fingerprints: Mapping[str, str]
    seeds: Mapping[str, int]
    versions: Mapping[str, str]
    config_yaml: str
    commands: Sequence[tuple[str, str]]  # (what it does, command line)


@dataclass(frozen=True)
class ReportInputs:
    """Everything on the page.

    Attributes:
        eigenvalues: the eigenvalues of each statistic ("plugin", "unbiased", "local", …), in descending order.
        spectrum_numbers: derived numbers of each statistic, for spectra with only some eigenvalues listed.
    """

    title: str
    data: str  # such as "sklearn:digits"
    model: str  # such as "mlp, widths 256, 256, relu"
    kernel: KernelFacts
    provenance: Provenance
    gram: Thumbnail | None = None
    eigenvalues: Mapping[str, Float[np.ndarray, " n"]] = field(default_factory=dict)
    regression: RegressionFacts | None = None
    standard_errors: StandardErrors | None = None
    stages: Sequence[StageTiming] = ()
    plots: Sequence[str] = tuple(PLOTS.locations)  # names of plots
    probes: ModelProbes | None = None
    spectrum_numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    spectrum_solver: SolverFacts | None = None
    regression_solver: SolverFacts | None = None
