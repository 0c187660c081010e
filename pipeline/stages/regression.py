"""Stage `regression`: kernel ridge regression on the stored kernel, all ridges at once; tables regression and
predictions.

Dense, in the memory of one worker. Classification regresses on one-hot targets.

Axes: n train rows, m test rows, T targets.
"""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from nntk_dist.regression import ridge_regression
from pipeline.context import Context, Written
from pipeline.job import Job, Task
from pipeline.tables import write_table

NAME = "regression"
USES_ALL_THREADS = True


def tasks(job: Job) -> Iterator[Task]:
    """One task for the whole kernel."""
    yield Task(NAME, "regression")


def execute(context: Context, task: Task) -> Written:
    """Fit, select, predict, and write the tables."""
    section, store = context.job.config.regression, context.store
    centred = section.center_outputs
    result = ridge_regression(
        store.read("train/gram"),
        store.read("train/targets"),
        store.read("test/gram"),
        store.read("test/targets"),
        ridges=section.ridge,
        select=section.select,
        num_classes=context.dataset.num_classes,
        offset=store.read("train/outputs").astype(np.float64) if centred else None,
        test_offset=store.read("test/outputs").astype(np.float64) if centred else None,
    )
    rows = [asdict(row) for row in result.rows]
    written = Written()
    written.num_bytes += write_table(
        context.storage, "regression", {key: [row[key] for row in rows] for key in rows[0]}
    )
    predictions = {"id": store.read("test/id")}
    predictions |= {f"score_{t}": scores for t, scores in enumerate(result.scores.T)}
    if result.labels is not None:
        predictions |= {"label": result.labels, "target": store.read("test/targets")}
    written.num_bytes += write_table(context.storage, "predictions", predictions)
    chosen = next(row for row in rows if row["selected"])
    written.numbers |= {key: float(value) for key, value in chosen.items() if value is not None}
    return written
