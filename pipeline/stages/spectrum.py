"""Stage `spectrum`: eigenvalues of the stored train kernel, of every statistic it holds; tables eigenvalues and
eigenvectors.

Dense, in the memory of one worker: 2 n² float64 beside the kernel, which the plan checks.

Axes: n kernel rows, k leading eigenvectors.
"""

from collections.abc import Iterator

import numpy as np

from nntk_dist.spectrum import kernel_spectrum
from pipeline.arrays import statistics_of
from pipeline.context import Context, Written
from pipeline.job import Job, Task
from pipeline.tables import write_table

NAME = "spectrum"
USES_ALL_THREADS = True


def tasks(job: Job) -> Iterator[Task]:
    """One task for the whole kernel."""
    yield Task(NAME, "spectrum")


def execute(context: Context, task: Task) -> Written:
    """Decompose the Gram matrices and write the tables."""
    top_k = context.job.config.spectrum.top_k
    written = Written()
    columns: dict[str, np.ndarray] = {}
    for suffix, name in statistics_of(context.job).items():
        if name == "stderr":
            continue
        first = not columns
        spectrum = kernel_spectrum(context.store.read(f"train/gram{suffix}"), top_k=top_k if first else 0)
        columns[f"eigenvalue{suffix}"] = spectrum.eigenvalues
        written.numbers |= {f"{name}:{key}": value for key, value in spectrum.numbers().items()}
        if first:
            vectors = {f"vector_{k}": vector for k, vector in enumerate(spectrum.eigenvectors.T)}
            written.num_bytes += write_table(context.storage, "eigenvectors", vectors)
    index = {"index": np.arange(len(columns["eigenvalue"]))}
    written.num_bytes += write_table(context.storage, "eigenvalues", index | columns)
    return written
