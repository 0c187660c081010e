"""Stage `spectrum`: eigenvalues of the train kernel for each stored statistic; tables eigenvalues and eigenvectors.

The solver that the plan chose does the work; a statistic that it cannot read is left out (the unbiased one, from
sketches). One task without checkpoints: it takes minutes at most if eigenvalues decay, and starts again after a stop.

Axes: n kernel rows, k leading eigenvectors.
"""

import numpy as np

from pipeline.job.job import Task
from pipeline.storage.array_table import statistics_of
from pipeline.storage.solver_inputs import train_forms
from pipeline.storage.tables import write_table
from pipeline.work.context import Context, Written
from pipeline.work.stage import Stage


class Spectrum(Stage):
    """Eigenvalues and leading eigenvectors of the train kernel."""

    name = "spectrum"
    reads = ("features", "metric", "gram")
    uses_all_threads = True

    def execute(self, context: Context, task: Task) -> Written:
        """Decompose the kernels and write the tables."""
        job = context.job
        choice = job.solvers[self.name]
        solver = choice.spectrum_solver()
        written = Written()
        columns: dict[str, np.ndarray] = {}
        for suffix, name in statistics_of(job).items():
            forms = train_forms(context.store, job, suffix)
            if name == "stderr" or not forms.offers(solver.needs):
                continue
            first = not columns
            found = solver.solve(forms, top_k=job.config.spectrum.top_k, vectors=first, seed=job.spec.seed)
            columns[f"eigenvalue{suffix}"] = found.eigenvalues
            if found.residuals is not None:
                columns[f"residual{suffix}"] = found.residuals
            written.numbers |= {f"{name}:{key}": value for key, value in found.numbers().items()}
            if first:
                vectors = {f"vector_{k}": vector for k, vector in enumerate(found.eigenvectors.T)}
                written.num_bytes += write_table(context.storage, "eigenvectors", vectors)
        if choice.columns is not None:
            written.numbers["solver:columns"] = float(choice.columns)
        passes = [value for key, value in written.numbers.items() if key.endswith(":passes")]
        if passes:
            written.numbers["solver:passes"] = sum(passes)
        written.num_bytes += write_table(context.storage, "eigenvalues", _table(columns))
        return written


def _table(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of one length, with NaN if a statistic has fewer eigenvalues, and their index."""
    longest = max(map(len, columns.values()))
    filled = {name: np.pad(each, (0, longest - len(each)), constant_values=np.nan) for name, each in columns.items()}
    return {"index": np.arange(longest)} | filled
