"""The input and the results of every kernel ridge regression: targets as matrices, offsets, one row for each ridge.

Nothing is solved here and no kernel is read: residuals and scores come in, errors and accuracies go out.

Axes: n train examples, m test examples, T target columns, L ridges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int

from nntk_dist.analysis.checks import check_finite_entries
from nntk_dist.analysis.convergence import Convergence
from nntk_dist.errors import ArgumentError, DataError

_NOTABLE_ROUNDING = 1e-3  # of the targets' root mean square
_NOTABLE_STDERR = 0.5  # of the leave-one-out error


@dataclass(frozen=True)
class RidgeRow:
    """The results at one ridge.

    Errors are mean squared errors over examples and columns (one-hot for classes), in the squared unit of the targets.
    Accuracies are shares of examples in [0, 1]; None if targets are not labels.

    Attributes:
        ridge: relative to the kernel's mean diagonal.
        absolute_ridge: μ, in the kernel's unit.
        loo_error: leave-one-out error on the train examples.
        loo_accuracy: leave-one-out accuracy on the train examples.
        train_error: error on the train examples.
        test_error: error on the test examples.
        test_accuracy: accuracy on the test examples.
        selected: whether leave-one-out selects this ridge.
        loo_stderr: standard error of `loo_error` if it is an estimate (iterative solvers), else None.
        solve_residual: the largest `‖y − (K + μI) a‖ / ‖y‖` of a target column, in float64 (iterative solvers).
        rounding_error: root mean square error of predictions from the rounding of stored kernel entries, relative to
            the root mean square of the fitted targets; usually three times the actual one. None for factored solvers.
    """

    ridge: float
    absolute_ridge: float
    loo_error: float
    loo_accuracy: float | None
    train_error: float
    test_error: float
    test_accuracy: float | None
    selected: bool
    loo_stderr: float | None = None
    solve_residual: float | None = None
    rounding_error: float | None = None

    def numbers(self) -> dict[str, float | bool | None]:
        """Return the fields by name as a table row, without the last three if they are None."""
        optional = ("loo_stderr", "solve_residual", "rounding_error")
        return {key: value for key, value in asdict(self).items() if key not in optional or value is not None}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> Self:
        """Return the row from its fields by name; missing ones are None, other names are ignored."""
        return cls(**{name: numbers.get(name) for name in cls.__dataclass_fields__})  # type: ignore[arg-type]

    @property
    def cautions(self) -> tuple[str, ...]:
        """Return warnings: rounding moves predictions notably, or the leave-one-out error is hardly known."""
        found = []
        if self.rounding_error is not None and self.rounding_error > _NOTABLE_ROUNDING:
            found.append(
                f"rounding of the kernel's stored entries moves predictions at ridge {self.ridge:g} by up to about "
                f"{100 * self.rounding_error:.2g} % of the targets' root mean square; use larger ridges, a kernel in "
                "float64, or the factored solver"
            )
        if self.loo_stderr is not None and self.loo_stderr > _NOTABLE_STDERR * self.loo_error:
            found.append(
                f"the leave-one-out error at ridge {self.ridge:g}, {self.loo_error:.3g}, has a standard error of "
                f"{self.loo_stderr:.2g}; raise rank or num_sampled of the iterative solver"
            )
        return tuple(found)


@dataclass(frozen=True)
class RidgeRegression:
    """One row for each ridge, in the order given, and the test predictions of the selected one.

    Attributes:
        rows: the results of each ridge.
        scores: predictions for the test examples.
        labels: the column with the highest score for each test example; None if targets are not labels.
        convergence: how the iteration ended; None for exact solvers.
        solver_numbers: further numbers that the solver reports, by name.
    """

    rows: tuple[RidgeRow, ...]
    scores: Float[np.ndarray, "m T"]
    labels: Int[np.ndarray, " m"] | None
    convergence: Convergence | None = None
    solver_numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def selected(self) -> RidgeRow:
        """Return the row of the selected ridge."""
        return next(row for row in self.rows if row.selected)


@dataclass(frozen=True)
class RidgeProblem:
    """Targets and offsets: the kernel fits `y − offset`, and `test_offset` is added to its predictions."""

    targets: Float[np.ndarray, "n T"]
    test_targets: Float[np.ndarray, "m T"]
    offset: Float[np.ndarray, "n T"] | None
    test_offset: Float[np.ndarray, "m T"] | None
    is_labels: bool

    @property
    def fitted(self) -> Float[np.ndarray, "n T"]:
        """Return what the kernel is fitted to."""
        return self.targets if self.offset is None else self.targets - self.offset

    def rows_per_example(self, num_rows: int) -> int:
        """Return the kernel rows of one example: 1 if all columns share the kernel, T in form `full`.

        Raises:
            ArgumentError: the train kernel has another number of rows.
        """
        num_examples, num_targets = self.targets.shape
        check_rows(num_rows, num_examples, num_targets)
        return num_rows // num_examples

    def with_offset(self, scores: Float[np.ndarray, "m T"]) -> Float[np.ndarray, "m T"]:
        """Return test scores with the offset added."""
        return scores if self.test_offset is None else scores + self.test_offset

    def results(
        self,
        ridges: Sequence[float],
        absolute: Sequence[float],
        residuals: Float[np.ndarray, "L n T"],
        loo_residuals: Float[np.ndarray, "L n T"],
        scores: Sequence[Float[np.ndarray, "m T"]],
        *,
        loo_errors: Sequence[float] | None = None,
        loo_stderr: Sequence[float] | None = None,
        solve_residuals: Sequence[float] | None = None,
        rounding_errors: Sequence[float] | None = None,
        convergence: Convergence | None = None,
        solver_numbers: Mapping[str, float] | None = None,
    ) -> RidgeRegression:
        """Compute errors and accuracies at all ridges and select a ridge by leave-one-out error.

        Args:
            ridges: relative ridges.
            absolute: the same in the kernel's unit.
            residuals: `y − f` on the train examples.
            loo_residuals: the same with the example itself left out.
            scores: predictions for the test examples, for each ridge.
            loo_errors: leave-one-out errors, if they are not the mean squares of `loo_residuals`.
            loo_stderr: their standard errors, if they are estimates.
            solve_residuals: relative residuals of an iterative solve.
            rounding_errors: what rounding of stored entries does to predictions, in the unit of the targets.
            convergence: how an iterative solve ended.
            solver_numbers: further numbers that the solver reports, by name.
        """
        errors = loo_errors if loo_errors is not None else [_mean_square(own) for own in loo_residuals]
        chosen = select_ridge(ridges, errors)
        scale = max(np.sqrt(_mean_square(self.fitted)), np.finfo(np.float64).tiny)
        rows = tuple(
            RidgeRow(
                ridge=ridges[index],
                absolute_ridge=absolute[index],
                loo_error=errors[index],
                loo_accuracy=_accuracy(self.targets - loo_residuals[index], self.targets) if self.is_labels else None,
                train_error=_mean_square(residuals[index]),
                test_error=_mean_square(self.test_targets - own),
                test_accuracy=_accuracy(own, self.test_targets) if self.is_labels else None,
                selected=index == chosen,
                loo_stderr=None if loo_stderr is None else loo_stderr[index],
                solve_residual=None if solve_residuals is None else solve_residuals[index],
                rounding_error=None if rounding_errors is None else float(rounding_errors[index] / scale),
            )
            for index, own in enumerate(scores)
        )
        labels = scores[chosen].argmax(axis=1) if self.is_labels else None
        return RidgeRegression(rows, scores[chosen], labels, convergence, solver_numbers or {})


def ridge_problem(
    targets: np.ndarray,
    test_targets: np.ndarray,
    *,
    num_classes: int | None = None,
    offset: Float[np.ndarray, "n T"] | None = None,
    test_offset: Float[np.ndarray, "m T"] | None = None,
) -> RidgeProblem:
    """Make a problem from targets as they are stored.

    Args:
        targets: integer labels (n,), which become one-hot rows, or floats (n,) or (n, T).
        test_targets: the same for the test examples.
        num_classes: columns of one-hot rows; by default the largest label plus one.
        offset: outputs of the model on the train examples; the kernel fits what they leave.
        test_offset: outputs of the model on the test examples.

    Raises:
        ArgumentError: an argument does not fit the others.
        DataError: targets or offsets hold NaN or infinity, or labels are out of range.
    """
    if (offset is None) != (test_offset is None):
        raise ArgumentError(
            "offset and test_offset must be given together: the same model outputs, on train and on test"
        )
    is_labels = np.issubdtype(np.asarray(targets).dtype, np.integer)
    if is_labels != np.issubdtype(np.asarray(test_targets).dtype, np.integer):
        raise ArgumentError("targets and test_targets must be of one kind: both integer labels, or both floats")
    if is_labels and num_classes is None:
        num_classes = 1 + int(max(np.max(targets, initial=0), np.max(test_targets, initial=0)))
    wanted = target_matrix(targets, num_classes, "targets")
    test_wanted = target_matrix(test_targets, num_classes, "test_targets")
    return RidgeProblem(
        wanted,
        test_wanted,
        None if offset is None else matrix_like(offset, wanted, "offset"),
        None if test_offset is None else matrix_like(test_offset, test_wanted, "test_offset"),
        bool(is_labels),
    )


def select_ridge(ridges: Sequence[float], errors: Sequence[float]) -> int:
    """Return the index of the ridge with the least leave-one-out error; of equal errors, the largest ridge."""
    return min(range(len(ridges)), key=lambda index: (errors[index], -ridges[index]))


def check_rows(num_rows: int, num_examples: int, num_targets: int) -> None:
    """Check that a train kernel of `num_rows` rows fits the targets, shared by all columns or in form `full`.

    Raises:
        ArgumentError: it does not.
    """
    if num_rows not in (num_examples, num_examples * num_targets):
        raise ArgumentError(
            f"the train kernel has {num_rows} rows and the targets {num_examples} examples of {num_targets} column(s); "
            f"the kernel needs {num_examples} rows, or {num_examples * num_targets} in form 'full'"
        )


def check_mean_diagonal(mean_diagonal: float) -> None:
    """Check that ridges can be relative to the mean diagonal.

    Raises:
        DataError: it is not positive.
    """
    if not mean_diagonal > 0:
        raise DataError(
            f"the kernel's mean diagonal is {mean_diagonal:.3g}; a ridge is relative to it and it must be positive; "
            "use 'statistic: plugin' or more draws, and check that the model depends on the selected parameters"
        )


def absolute_ridges(
    ridges: Sequence[float], mean_diagonal: float, *, smallest: float, largest: float, num_rows: int, unit: float = 0.0
) -> tuple[float, ...]:
    """Return the ridges in the kernel's unit; refuse those that leave `K + μI` indefinite or nearly singular.

    Args:
        ridges: relative to `mean_diagonal`.
        mean_diagonal: `tr K / n`.
        smallest: the least eigenvalue of K.
        largest: its largest eigenvalue.
        num_rows: rows of the matrix that they were computed from.
        unit: the largest relative rounding of a stored entry.

    Raises:
        ArgumentError: a ridge is not positive; or the least eigenvalue of `K + μI` is below μ/2 or below rounding.
    """
    check_positive(ridges)
    rounding = num_rows * np.finfo(np.float64).eps * largest
    refused = [ridge for ridge in ridges if smallest + ridge * mean_diagonal < max(ridge * mean_diagonal / 2, rounding)]
    if refused:
        needed = 1.05 * max(-2 * smallest, rounding - smallest) / mean_diagonal  # printed to two digits: never too low
        rounded = -smallest <= unit * largest
        advice = (
            "a kernel in float64 (the entries are rounded)"
            if rounded
            else "'statistic: plugin' (positive semidefinite)"
        )
        raise ArgumentError(
            f"K + ridge·(tr K/n)·I is indefinite or nearly singular at ridge {max(refused):g}: the kernel's least "
            f"eigenvalue is {smallest:.3g}, its mean diagonal {mean_diagonal:.3g}; use {advice} or ridges of at least "
            f"{needed:.2g}"
        )
    return tuple(ridge * mean_diagonal for ridge in ridges)


def check_positive(ridges: Sequence[float]) -> None:
    """Check that there are ridges and that all are positive.

    Raises:
        ArgumentError: there are none, or one is not.
    """
    if not ridges or not all(np.isfinite(ridge) and ridge > 0 for ridge in ridges):
        raise ArgumentError(f"ridges are {list(ridges)}; allowed: one or more positive numbers, relative to tr K / n")


def target_matrix(targets: np.ndarray, num_classes: int | None, what: str) -> Float[np.ndarray, "n T"]:
    """Return float targets as (n, T), or integer labels as one-hot rows.

    Raises:
        DataError: the targets have the wrong shape or values.
    """
    targets = np.asarray(targets)
    if np.issubdtype(targets.dtype, np.integer):
        if targets.ndim != 1:
            raise DataError(f"{what} are integers of shape {targets.shape}; labels must have shape (examples,)")
        if num_classes is None or targets.min(initial=0) < 0 or targets.max(initial=0) >= num_classes:
            raise DataError(f"{what} hold labels outside 0 … num_classes − 1, num_classes = {num_classes}")
        return np.eye(num_classes)[targets]
    matrix = targets.astype(np.float64)
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or matrix.size == 0:
        raise DataError(f"{what} have shape {targets.shape}; allowed: (examples,) or (examples, columns), not empty")
    check_finite_entries(matrix, what)
    return matrix


def matrix_like(values: np.ndarray, like: np.ndarray, what: str) -> np.ndarray:
    """Return `values` in float64 after checking that they are finite and have the shape of `like`.

    Raises:
        ArgumentError: they have another shape.
        DataError: they are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != like.shape:
        raise ArgumentError(f"{what} has shape {values.shape}; it must match the targets, {like.shape}")
    check_finite_entries(values, what)
    return values


def _mean_square(residuals: np.ndarray) -> float:
    return float(np.square(residuals).mean())


def _accuracy(scores: Float[np.ndarray, "n T"], one_hot: Float[np.ndarray, "n T"]) -> float:
    return float((scores.argmax(axis=1) == one_hot.argmax(axis=1)).mean())
