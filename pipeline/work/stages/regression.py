"""Stage `regression`: kernel ridge regression on the stored kernel, all ridges at once; tables regression and
predictions.

By the method that the plan chose: dense, the whole kernel in memory; factored, exactly from the features; iterative, in
passes over the stored tiles, with residuals and the error of leave-one-out in the table. Classification regresses on
one-hot targets. One task without checkpoints: what was stopped begins anew.

Axes: n train rows, m test rows, T targets.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from nntk_dist.analysis.dense_regression import ridge_regression
from nntk_dist.analysis.factor_solvers import factored_regression
from nntk_dist.analysis.iterative_regression import streamed_regression
from nntk_dist.analysis.ridge_problem import RidgeProblem, RidgeRegression, ridge_problem
from nntk_dist.products.factor_form import FactorForm
from pipeline.decisions.solvers import choose_solver
from pipeline.job.job import Job, Task
from pipeline.storage.array_table import stored_factor_form
from pipeline.storage.factor import factor_rows
from pipeline.storage.streamed_kernels import stored_rectangle, stored_tiles
from pipeline.storage.tables import write_table
from pipeline.work.context import Context, Written

NAME = "regression"
USES_ALL_THREADS = True


def tasks(job: Job) -> Iterator[Task]:
    """One task for the whole kernel."""
    yield Task(NAME, "regression")


def execute(context: Context, task: Task) -> Written:
    """Fit, select, predict, and write the tables."""
    store = context.store
    factor = stored_factor_form(context.job)
    solver = choose_solver(context.job, NAME, factor)
    written = Written()
    if solver.method == "dense":
        result = _dense(context)
    elif solver.method == "factored":
        assert factor is not None
        result = _factored(context, factor)
        written.numbers["solver:columns"] = float(factor.num_columns)
    else:
        result, numbers = _iterative(context)
        written.numbers |= numbers
    rows = [row.numbers() for row in result.rows]
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


def _dense(context: Context) -> RidgeRegression:
    section, store = context.job.config.regression, context.store
    return ridge_regression(
        store.read("train/gram"),
        store.read("train/targets"),
        store.read("test/gram"),
        store.read("test/targets"),
        ridges=section.ridge,
        select=section.select,
        num_classes=context.dataset.num_classes,
        **_offsets(context),
    )


def _factored(context: Context, factor: FactorForm) -> RidgeRegression:
    train, test = (factor_rows(context.store, factor, split) for split in ("train", "test"))
    return factored_regression(train, test, _problem(context), context.job.config.regression.ridge)


def _iterative(context: Context) -> tuple[RidgeRegression, Mapping[str, float]]:
    kernel = stored_tiles(context.store, "train/gram")
    test = stored_rectangle(context.store, "test/gram")
    section = context.job.config.regression
    found = streamed_regression(
        kernel, test, _problem(context), section.ridge, seed=context.job.spec.seed, tolerance=section.tolerance
    )
    numbers = {
        "solver:passes": float(found.passes),
        "solver:rank": float(found.rank),
        "solver:trace_left": found.trace_left,
        "solver:converged": float(found.converged),
    }
    return found.regression, numbers


def _problem(context: Context) -> RidgeProblem:
    store = context.store
    targets, test_targets = store.read("train/targets"), store.read("test/targets")
    return ridge_problem(targets, test_targets, num_classes=context.dataset.num_classes, **_offsets(context))


def _offsets(context: Context) -> dict[str, np.ndarray | None]:
    """The model's outputs, where the kernel fits what they leave."""
    paths = {"offset": "train/outputs", "test_offset": "test/outputs"}
    if not context.job.config.regression.center_outputs:
        return dict.fromkeys(paths)
    return {name: context.store.read(path).astype(np.float64) for name, path in paths.items()}
