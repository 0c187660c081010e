"""Stage `spectrum`: eigenvalues of the train kernel, of every statistic that can be had; tables eigenvalues and
eigenvectors.

By the method that the plan chose: dense, all of the stored kernel in memory; factored, exactly from the features, where
`unbiased` has a spectrum for output differences alone; iterative, the leading eigenvalues of the stored tiles.
One task without checkpoints: it is minutes at most where the kernel decays, and begins anew after a stop.

Axes: n kernel rows, k leading eigenvectors.
"""

from collections.abc import Iterator

import numpy as np

from nntk_dist.analysis.block_krylov import LeadingPairs, leading_eigenpairs
from nntk_dist.analysis.factor_solvers import factored_spectrum, indefinite_spectrum
from nntk_dist.analysis.spectrum import Spectrum, kernel_spectrum
from nntk_dist.products.factor_form import FactorForm, unbiased_metric
from pipeline.decisions.solvers import choose_solver
from pipeline.job.job import Job, Task
from pipeline.storage.array_table import statistics_of, stored_factor_form
from pipeline.storage.factor import factor_rows, feature_columns
from pipeline.storage.streamed_kernels import stored_tiles
from pipeline.storage.tables import write_table
from pipeline.work.context import Context, Written

NAME = "spectrum"
USES_ALL_THREADS = True


def tasks(job: Job) -> Iterator[Task]:
    """One task for the whole kernel."""
    yield Task(NAME, "spectrum")


def execute(context: Context, task: Task) -> Written:
    """Decompose the Gram matrices and write the tables."""
    factor = stored_factor_form(context.job)
    solver = choose_solver(context.job, NAME, factor)
    written = Written()
    columns: dict[str, np.ndarray] = {}
    for suffix, name in statistics_of(context.job).items():
        if name == "stderr":
            continue
        first = not columns
        top_k = context.job.config.spectrum.top_k if first else 0
        found: Spectrum | LeadingPairs | None
        if solver.method == "dense":
            found = kernel_spectrum(context.store.read(f"train/gram{suffix}"), top_k=top_k)
        elif solver.method == "iterative":
            found = _iterative(context, suffix)
        else:
            assert factor is not None
            found = _factored(context, factor, top_k) if first else _factored_unbiased(context, factor)
        if found is None:
            continue
        columns[f"eigenvalue{suffix}"] = found.eigenvalues
        if isinstance(found, LeadingPairs):
            columns[f"residual{suffix}"] = found.residuals
        written.numbers |= {f"{name}:{key}": value for key, value in found.numbers().items()}
        if first:
            vectors = {f"vector_{k}": vector for k, vector in enumerate(found.eigenvectors.T)}
            written.num_bytes += write_table(context.storage, "eigenvectors", vectors)
    if solver.columns is not None:
        written.numbers["solver:columns"] = float(solver.columns)
    passes = [value for key, value in written.numbers.items() if key.endswith(":passes")]
    if passes:
        written.numbers["solver:passes"] = sum(passes)
    written.num_bytes += write_table(context.storage, "eigenvalues", _table(columns))
    return written


def _iterative(context: Context, suffix: str) -> LeadingPairs:
    kernel = stored_tiles(context.store, f"train/gram{suffix}")
    return leading_eigenpairs(kernel, top_k=context.job.config.spectrum.top_k, seed=context.job.spec.seed)


def _factored(context: Context, factor: FactorForm, top_k: int) -> Spectrum:
    return factored_spectrum(factor_rows(context.store, factor, "train"), top_k=top_k)


def _factored_unbiased(context: Context, factor: FactorForm) -> Spectrum | None:
    """Of output differences from another metric; sketches would take all blocks' columns side by side."""
    if factor.is_sketch:
        return None
    metric = unbiased_metric(context.store.read("metric"), context.job.sizes.num_blocks)
    return indefinite_spectrum(feature_columns(context.store, factor, "train"), metric)


def _table(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of one length, with NaN where a statistic has fewer eigenvalues, and their index."""
    longest = max(map(len, columns.values()))
    filled = {name: np.pad(each, (0, longest - len(each)), constant_values=np.nan) for name, each in columns.items()}
    return {"index": np.arange(longest)} | filled
