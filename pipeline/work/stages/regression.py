"""Stage `regression`: kernel ridge regression on the stored kernel for all ridges; tables regression, predictions.

The solver that the plan chose does the work. Classification regresses on one-hot targets. One task without checkpoints:
after a stop it starts again.

Axes: n train rows, m test rows, T targets.
"""

import numpy as np

from nntk_dist.analysis.regression.ridge_problem import RidgeProblem, RidgeRegression, ridge_problem
from pipeline.job.job import Task
from pipeline.storage.solver_inputs import test_forms, train_forms
from pipeline.storage.tables import write_table
from pipeline.work.context import Context, Written
from pipeline.work.stage import Stage


class Regression(Stage):
    """Kernel ridge regression on the stored kernel."""

    name = "regression"
    reads = ("features", "metric", "gram", "test")
    uses_all_threads = True

    def execute(self, context: Context, task: Task) -> Written:
        """Fit, select, predict, and write the tables."""
        job, store = context.job, context.store
        choice = job.solvers[self.name]
        result = choice.regression_solver().solve(
            train_forms(store, job),
            test_forms(store, job),
            _problem(context),
            job.config.regression.ridge,
            seed=job.spec.seed,
        )
        written = Written(numbers=_solver_numbers(result, choice.columns))
        rows = [row.numbers() for row in result.rows]
        written.num_bytes += write_table(
            context.storage, "regression", {key: [row[key] for row in rows] for key in rows[0]}
        )
        predictions = {"id": store.read("test/id")}
        predictions |= {f"score_{t}": scores for t, scores in enumerate(result.scores.T)}
        if result.labels is not None:
            predictions |= {"label": result.labels, "target": store.read("test/targets")}
        written.num_bytes += write_table(context.storage, "predictions", predictions)
        written.numbers |= {key: float(value) for key, value in result.selected.numbers().items() if value is not None}
        return written


def _problem(context: Context) -> RidgeProblem:
    """Targets, and the model's outputs if the kernel fits what they leave."""
    store = context.store
    offsets: dict[str, np.ndarray] = {}
    if context.job.config.regression.center_outputs:
        paths = {"offset": "train/outputs", "test_offset": "test/outputs"}
        offsets = {name: store.read(path).astype(np.float64) for name, path in paths.items()}
    targets, test_targets = store.read("train/targets"), store.read("test/targets")
    return ridge_problem(targets, test_targets, num_classes=context.dataset.num_classes, **offsets)


def _solver_numbers(result: RidgeRegression, columns: int | None) -> dict[str, float]:
    """What the solver says of its work, for the ledger."""
    numbers = {f"solver:{key}": value for key, value in result.solver_numbers.items()}
    if columns is not None:
        numbers["solver:columns"] = float(columns)
    if result.convergence is not None:
        numbers["solver:passes"] = float(result.convergence.passes)
        numbers["solver:converged"] = float(result.convergence.converged)
    return numbers
