"""The choice of the solvers of a run: by name if the configuration has one, else by the kernel's size and its factor.

The plan chooses once; the job carries the choice to the stages, and the manifest keeps it. The choice depends on the
job and on the width of the stored factor, never on the machine. What a solver costs, it says itself
(`nntk_dist.analysis.solvers`).
"""

import inspect

from nntk_dist.analysis.kernel_forms import Needs
from nntk_dist.analysis.solvers import (
    REGRESSION_SOLVERS,
    Cost,
    KernelSize,
    RegressionSize,
    SolverChoice,
    SpectrumSize,
)
from nntk_dist.errors import ArgumentError
from nntk_dist.products.factor_form import WITH_FACTOR, FactorForm
from pipeline.job.job import Job
from pipeline.storage.array_table import StoredArray, kernel_width, statistics_of, stored_factor_form

_DENSE_ROWS = 10_000  # 3 GiB and minutes
_SMALL_ROWS = 4096  # seconds: the dense solver is the reference and shows the whole spectrum of each statistic


def choose_solvers(job: Job) -> dict[str, SolverChoice]:
    """Choose the solvers of `spectrum` and `regression` for a job.

    Raises:
        ArgumentError: the configuration names a solver that does not exist, refuses its arguments, or needs a form of
            the kernel that is not stored.
    """
    factor = stored_factor_form(job)
    return {stage: choose_solver(job, stage, factor) for stage in ("spectrum", "regression")}


def choose_solver(job: Job, stage: str, factor: FactorForm | None) -> SolverChoice:
    """Choose the solver of one stage; `factor` is the form of the stored factor, None without one.

    Raises:
        ArgumentError: see `choose_solvers`.
    """
    asked = getattr(job.config, stage).method
    columns = None if factor is None else factor.num_columns
    name, reason = (asked, "as asked") if asked != "auto" else _automatic(job, columns)
    choice = SolverChoice(name, reason, _arguments(job, stage, name))
    needs = (choice.spectrum_solver() if stage == "spectrum" else choice.regression_solver()).needs
    if needs is Needs.FACTOR and factor is None:
        raise ArgumentError(
            f"{stage}.method is '{asked}', but this run stores no factor; {WITH_FACTOR}, unless statistic is unbiased; "
            f"set {stage}.method=auto"
        )
    if needs is Needs.TILES and not job.layout.write_tiles:
        raise ArgumentError(
            f"{stage}.method is '{asked}', which reads tiles, and compute.write_tiles is false; set {stage}.method to "
            "auto or factored, or compute.write_tiles to true"
        )
    return SolverChoice(name, reason, choice.arguments, columns if needs is Needs.FACTOR else None)


def _automatic(job: Job, columns: int | None) -> tuple[str, str]:
    """The name of a solver and the reason, by the number of rows and the width of the factor."""
    num_rows = job.sizes.num_train * kernel_width(job)
    if not job.layout.write_tiles:
        return "factored", "since no tiles are written"
    if num_rows <= _SMALL_ROWS:
        return "dense", f"for {num_rows:,} kernel rows, {_SMALL_ROWS:,} or fewer"
    if columns is not None and columns < num_rows:
        return "factored", f"exact from {columns:,} columns for {num_rows:,} kernel rows"
    if num_rows <= _DENSE_ROWS:
        return "dense", f"for {num_rows:,} kernel rows, {_DENSE_ROWS:,} or fewer, without a narrow factor"
    return "iterative", f"for {num_rows:,} kernel rows, more than {_DENSE_ROWS:,}, without a narrow factor"


def _arguments(job: Job, stage: str, name: str) -> dict[str, object]:
    """The solver's arguments: `args` of the section, and `regression.tolerance` if the solver takes one."""
    section = getattr(job.config, stage)
    takes = stage == "regression" and "tolerance" in inspect.signature(REGRESSION_SOLVERS.get(name)).parameters
    return ({"tolerance": section.tolerance} if takes else {}) | section.args


def solver_cost(job: Job, stage: str, arrays: tuple[StoredArray, ...]) -> Cost:
    """Return what the job's solver of a stage estimates that it takes."""
    choice, kernel = job.solvers[stage], _kernel_size(job, job.solvers[stage].columns, arrays)
    if stage == "spectrum":
        kernels = [name for name in statistics_of(job).values() if name != "stderr"]
        factor = stored_factor_form(job)
        indefinite = factor is not None and not factor.is_sketch and "unbiased" in kernels
        size = SpectrumSize(kernel, job.config.spectrum.top_k, len(kernels), indefinite)
        return choice.spectrum_solver().cost(size)
    num_targets = 1 if job.spec.meeting.full else job.sizes.num_classes or job.sizes.num_outputs
    size_of_regression = RegressionSize(kernel, len(job.config.regression.ridge), num_targets)
    return choice.regression_solver().cost(size_of_regression)


def _kernel_size(job: Job, columns: int | None, arrays: tuple[StoredArray, ...]) -> KernelSize:
    width, num_train = kernel_width(job), job.sizes.num_train
    return KernelSize(
        num_rows=num_train * width,
        rows_per_example=width,
        tile_rows=min(job.layout.tile, num_train) * width,
        entry_bytes=8 if job.layout.dtype == "float64" else 4,
        factor_columns=columns,
        factor_block_rows=min(job.layout.shard_rows, num_train) * width,
        factor_bytes=sum(array.num_bytes for array in arrays if array.path == "train/features"),
    )
