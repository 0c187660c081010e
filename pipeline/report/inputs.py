"""What a report is made of: plain frozen values, collected by the caller from store, tables, ledger and manifest.

Nothing here reads, computes or formats. None marks what a run does not have (error bars of a local kernel, a commit).

Axes: n train examples, k rows of the thumbnail. Units: `_bytes`, `_seconds`; kernel values in the kernel's own unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from nntk_dist.analysis.regression.ridge_problem import RidgeRow
from nntk_dist.planning.model_probes import ModelProbes
from pipeline.report.plots import PLOTS


@dataclass(frozen=True)
class KernelFacts:
    """How the kernel was made and how far it can be trusted."""

    kind: str  # nonlocal, covariance, averaged or local
    estimator: str
    estimator_reason: str
    statistic: str  # plugin, unbiased or both; of kind nonlocal only
    outputs: str
    num_train: int
    num_test: int
    num_parameters: int
    num_draws: int | None = None
    num_blocks: int | None = None
    distribution: str | None = None  # such as "gaussian, γ = 0.05"
    weighting: str | None = None  # in words; None where all draws count the same
    relative_error: float | None = None  # √(Σ variance / Σ entry²) of the unbiased kernel
    relative_error_bound: float | None = None  # what the error made stays below in 95 % of all cases
    accuracy: str | None = None  # how the search for an asked accuracy ended, in words
    accuracy_reached: bool | None = None
    relative_bias: float | None = None  # ‖plugin − unbiased‖ / ‖unbiased‖
    matmul_precision: str = "highest"  # of the products that tiles are made of


@dataclass(frozen=True)
class Thumbnail:
    """The Gram matrix, already subsampled to at most 512 rows and put in order."""

    values: Float[np.ndarray, "k k"]
    ordering: str  # such as "ordered by class"
    boundaries: Sequence[int] = ()  # first row of each class but the first
    labels: Sequence[str] = ()  # one for each class


@dataclass(frozen=True)
class StandardErrors:
    """Summary of the entries' standard errors, over the resolved entries of the train kernel: of its first `num_rows`
    rows, all that stands here but the unresolved share; None for all rows.
    """

    median: float
    percentile_90: float
    largest: float
    mean_diagonal: float
    unresolved_share: float
    num_rows: int | None = None

    @property
    def where(self) -> str:
        """Which rows, as words to follow on what is summarised."""
        return "" if self.num_rows is None else f" of the first {self.num_rows} rows"


@dataclass(frozen=True)
class RegressionFacts:
    """Kernel ridge regression: one row per ridge, as the regression table keeps them."""

    task: Literal["classification", "regression"]
    rows: Sequence[RidgeRow]
    num_classes: int | None = None

    @property
    def selected(self) -> RidgeRow:
        """The row of the selected ridge."""
        return next(row for row in self.rows if row.selected)


@dataclass(frozen=True)
class SolverFacts:
    """How the spectrum or the regression was solved, where not by one dense decomposition."""

    method: str
    columns: int | None = None  # of the factor
    passes: int | None = None  # over the stored kernel
    converged: bool | None = None  # whether an iteration reached its tolerance


@dataclass(frozen=True)
class StageTiming:
    """One stage, from manifest and ledger: wall-clock time, and the sum over its tasks."""

    stage: str
    tasks: int
    wall_seconds: float
    busy_seconds: float
    written_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Provenance:
    """Where the run came from, and how to get it again."""

    created: str
    git_commit: str | None
    fingerprints: Mapping[str, str]
    seeds: Mapping[str, int]
    versions: Mapping[str, str]
    config_yaml: str
    commands: Sequence[tuple[str, str]]  # (what it does, command line)


@dataclass(frozen=True)
class ReportInputs:
    """Everything on the page. `eigenvalues` goes by statistic ("plugin", "unbiased", "local", …), each descending, and
    so does `spectrum_numbers`: what is known of spectra whose eigenvalues are not all listed.
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
