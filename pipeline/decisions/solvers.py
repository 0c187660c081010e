"""How spectrum and regression are to be solved for a job, why, and what that takes: decided by the plan, done by the
stages.

The choice is a function of the job and of the stored factor's width alone, never of the machine: a resumed run makes
the same one wherever it goes on. Nothing is solved here.

Units: bytes; operations are floating-point ones (a multiply-add is two).
"""

from dataclasses import dataclass

from nntk_dist.analysis.iterative_regression import NUM_SAMPLED, rank_of
from nntk_dist.analysis.leave_one_out import num_sampled_examples
from nntk_dist.errors import NNTKError
from nntk_dist.products.factor_form import WITH_FACTOR, FactorForm
from pipeline.job.job import Job
from pipeline.storage.array_table import kernel_width, statistics_of, stored_factor_form

SOLVED = ("spectrum", "regression")
_DENSE_ROWS = 10_000  # 3 GiB and minutes
_SMALL_ROWS = 4096  # seconds: the dense form is the reference and shows every statistic's whole spectrum
_EIGH_OPERATIONS = 9.0
_DENSE_COPIES = 4  # kernel in float64, its copy in LAPACK, eigenvectors, workspace
_SPECTRUM_PASSES, _REGRESSION_PASSES = 15, 45  # where eigenvalues decay
_BASIS_BLOCKS = 12 + 8  # of `leading`: vectors and products, and what one step and one pass make of them
_PIECES = 3  # that are read at a time, and what is made of them or has just been used beside


@dataclass(frozen=True)
class Solver:
    """A method with the reason for it; `columns` is the factor's width, where it is used."""

    method: str
    reason: str
    columns: int | None = None

    @property
    def text(self) -> str:
        """Method and reason as one phrase."""
        return f"{self.method}, {self.reason}"


def choose_solver(job: Job, stage: str, factor: FactorForm | None) -> Solver:
    """The method of a stage; `factor` is the form of the stored factor, None where there is none.

    Raises: NNTKError where the asked method lacks what it works from.
    """
    asked, tiles = getattr(job.config, stage).method, job.layout.write_tiles
    num_rows = job.sizes.num_train * kernel_width(job)
    if asked == "factored" and factor is None:
        raise NNTKError(
            f"{stage}.method is 'factored', and this run stores no factor; {WITH_FACTOR}, unless 'statistic: unbiased' "
            f"is asked for alone; set {stage}.method=auto"
        )
    if asked in ("dense", "iterative") and not tiles:
        raise NNTKError(
            f"{stage}.method is '{asked}', which reads tiles, and compute.write_tiles is false; set {stage}.method to "
            "auto or factored, or compute.write_tiles to true"
        )
    columns = None if factor is None else factor.num_columns
    if asked == "factored" or not tiles:
        return Solver("factored", "as asked" if asked == "factored" else "since no tiles are written", columns)
    if asked != "auto":
        return Solver(asked, "as asked")
    if num_rows <= _SMALL_ROWS:
        return Solver("dense", f"for {num_rows:,} kernel rows, {_SMALL_ROWS:,} or fewer")
    if columns is not None and columns < num_rows:
        return Solver("factored", f"exact from {columns:,} columns for {num_rows:,} kernel rows", columns)
    if num_rows <= _DENSE_ROWS:
        return Solver("dense", f"for {num_rows:,} kernel rows, {_DENSE_ROWS:,} or fewer, without a narrow factor")
    return Solver("iterative", f"for {num_rows:,} kernel rows, more than {_DENSE_ROWS:,}, without a narrow factor")


def solver_bytes(job: Job, stage: str, solver: Solver) -> int:
    """What a stage takes beside the process itself."""
    rows = job.sizes.num_train * kernel_width(job)
    if solver.method == "dense":
        return _DENSE_COPIES * 8 * rows**2
    ridges = len(job.config.regression.ridge)
    if solver.columns is not None:
        block = min(job.layout.shard_rows, job.sizes.num_train) * kernel_width(job)
        spectrum = stage == "spectrum"
        held = 8 * rows * (job.config.spectrum.top_k if spectrum else 3 * ridges * _num_right(job))
        factor = stored_factor_form(job)
        has_unbiased = factor is not None and not factor.is_sketch and "unbiased" in statistics_of(job).values()
        all_vectors = not spectrum or has_unbiased
        copies = _DENSE_COPIES if all_vectors else _DENSE_COPIES - 1
        return copies * 8 * solver.columns**2 + 8 * block * (_PIECES + 3) * solver.columns + held
    edge = min(job.layout.tile, job.sizes.num_train) * kernel_width(job)
    if stage == "spectrum":
        width = job.config.spectrum.top_k
        numbers = _BASIS_BLOCKS * (width + max(8, width // 4))
    else:
        numbers = 9 * ridges * (_num_right(job) + num_columns_left_out(job)) + rank_of(rows)
    return 8 * (rows * numbers + (_PIECES + 3) * edge**2)


def solver_operations(job: Job, stage: str, solver: Solver) -> float:
    """Operations of a stage, in float64."""
    rows = float(job.sizes.num_train * kernel_width(job))
    if solver.method == "dense":
        return (2.0 / 3.0 if stage == "spectrum" else 1.0) * _EIGH_OPERATIONS * rows**3
    if solver.columns is not None:
        columns = float(solver.columns)
        passes = 2.0 if stage == "spectrum" else 4.0
        return passes * rows * columns**2 + _EIGH_OPERATIONS * columns**3
    if stage == "spectrum":
        return 2.0 * rows**2 * _SPECTRUM_PASSES * 1.25 * job.config.spectrum.top_k * _num_spectra(job)
    width = len(job.config.regression.ridge) * (_num_right(job) + num_columns_left_out(job))
    return 2.0 * rows**2 * _REGRESSION_PASSES / 2 * width + 6.0 * rows * rank_of(int(rows)) ** 2


def solver_reads(job: Job, stage: str, solver: Solver, feature_bytes: int) -> float:
    """Bytes that a stage reads from storage, before compression; `feature_bytes` are those of the factor."""
    rows = job.sizes.num_train * kernel_width(job)
    item = 8 if job.layout.dtype == "float64" else 4
    if solver.method == "dense":
        return float(item * rows**2)
    if solver.columns is not None:
        return 2.0 * feature_bytes
    passes = _SPECTRUM_PASSES * _num_spectra(job) if stage == "spectrum" else _REGRESSION_PASSES
    return passes * item * rows**2 / 2


def _num_spectra(job: Job) -> int:
    return sum(name != "stderr" for name in statistics_of(job).values())


def num_columns_left_out(job: Job) -> int:
    """Columns of the inverse that leave-one-out takes, for one ridge."""
    width = kernel_width(job)
    return num_sampled_examples(job.sizes.num_train, NUM_SAMPLED // width) * width


def _num_right(job: Job) -> int:
    """Right-hand sides of one ridge."""
    if job.spec.meeting.full:
        return 1
    return job.sizes.num_classes or job.sizes.num_outputs
