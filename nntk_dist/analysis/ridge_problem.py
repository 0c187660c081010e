"""What every kernel ridge regression is given and what it answers, whichever way it solves: targets as matrices,
offsets, one row of results for each ridge.

It solves nothing and sees no kernel: residuals and scores come in, errors and accuracies go out.

Axes: n train examples, m test examples, T target columns, L ridges.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Int

from nntk_dist.analysis.spectrum import check_finite
from nntk_dist.errors import NNTKError


@dataclass(frozen=True)
class RidgeRow:
    """What one ridge gives. Errors are mean squared errors over examples and columns (one-hot for classes), in the
    squared unit of the targets; accuracies are shares of examples in [0, 1], None where targets are not labels.

    Of an iterative solution only: `loo_stderr` is the standard error of `loo_error`, which is an estimate there, and
    `solve_residual` the largest `‖y − (K + μI) a‖ / ‖y‖` of a target column, in float64.
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

    def numbers(self) -> dict[str, float | bool | None]:
        """The fields by name, one table row; without those of another way to solve."""
        optional = ("loo_stderr", "solve_residual")
        return {key: value for key, value in asdict(self).items() if key not in optional or value is not None}


@dataclass(frozen=True)
class RidgeRegression:
    """One row per ridge, in the order given, and the test predictions of the selected one."""

    rows: tuple[RidgeRow, ...]
    scores: Float[np.ndarray, "m T"]
    labels: Int[np.ndarray, " m"] | None

    @property
    def selected(self) -> RidgeRow:
        """The row of the selected ridge."""
        return next(row for row in self.rows if row.selected)


@dataclass(frozen=True)
class RidgeProblem:
    """Targets and offsets; the kernel fits `y − offset`, and `test_offset` is added back to what it predicts."""

    targets: Float[np.ndarray, "n T"]
    test_targets: Float[np.ndarray, "m T"]
    offset: Float[np.ndarray, "n T"] | None
    test_offset: Float[np.ndarray, "m T"] | None
    is_labels: bool

    @property
    def fitted(self) -> Float[np.ndarray, "n T"]:
        """What the kernel is fitted to."""
        return self.targets if self.offset is None else self.targets - self.offset

    def rows_per_example(self, num_rows: int) -> int:
        """Kernel rows of one example: 1 where all columns share the kernel, T in form `full`.

        Raises: NNTKError where the train kernel has another number of rows.
        """
        num_examples, num_targets = self.targets.shape
        check_rows(num_rows, num_examples, num_targets)
        return num_rows // num_examples

    def with_offset(self, scores: Float[np.ndarray, "m T"]) -> Float[np.ndarray, "m T"]:
        """Test scores with the offset added back."""
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
    ) -> RidgeRegression:
        """Errors and accuracies of all ridges, and which of them leave-one-out selects; `loo_errors` are given where
        its errors are not the mean squares of the residuals.
        """
        errors = loo_errors if loo_errors is not None else [_mean_square(own) for own in loo_residuals]
        chosen = select_ridge(ridges, errors)
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
            )
            for index, own in enumerate(scores)
        )
        return RidgeRegression(rows, scores[chosen], scores[chosen].argmax(axis=1) if self.is_labels else None)


def ridge_problem(
    targets: np.ndarray,
    test_targets: np.ndarray,
    *,
    num_classes: int | None = None,
    offset: Float[np.ndarray, "n T"] | None = None,
    test_offset: Float[np.ndarray, "m T"] | None = None,
) -> RidgeProblem:
    """Targets are integer labels (n,), made one-hot over `num_classes` (default: the largest label present, plus one),
    or floats (n, T) or (n,).

    Raises:
        NNTKError: an argument does not fit the others or is not finite.
    """
    if (offset is None) != (test_offset is None):
        raise NNTKError("offset and test_offset must be given together: the same model outputs, on train and on test")
    is_labels = np.issubdtype(np.asarray(targets).dtype, np.integer)
    if is_labels != np.issubdtype(np.asarray(test_targets).dtype, np.integer):
        raise NNTKError("targets and test_targets must be of one kind: both integer labels, or both floats")
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
    """Index of the ridge of least leave-one-out mean squared error; of equals the largest ridge."""
    return min(range(len(ridges)), key=lambda index: (errors[index], -ridges[index]))


def check_rows(num_rows: int, num_examples: int, num_targets: int) -> None:
    """Raise an NNTKError unless a train kernel of so many rows fits the targets, shared or in form `full`."""
    if num_rows not in (num_examples, num_examples * num_targets):
        raise NNTKError(
            f"the train kernel has {num_rows} rows and the targets {num_examples} examples of {num_targets} column(s); "
            f"the kernel needs {num_examples} rows, or {num_examples * num_targets} in form 'full'"
        )


def check_mean_diagonal(mean_diagonal: float) -> None:
    """Raise an NNTKError unless a ridge can be relative to it."""
    if not mean_diagonal > 0:
        raise NNTKError(
            f"the kernel's mean diagonal is {mean_diagonal:.3g}; a ridge is relative to it and it must be positive; "
            "use 'statistic: plugin' or more draws, and check that the model depends on the selected parameters"
        )


def absolute_ridges(
    ridges: Sequence[float], mean_diagonal: float, *, smallest: float, largest: float, num_rows: int
) -> tuple[float, ...]:
    """The ridges in the kernel's units, after refusing those that leave `K + μI` indefinite or nearly singular.

    `smallest` and `largest` are eigenvalues of K, `num_rows` the size of the matrix that they were computed from.

    Raises:
        NNTKError: a ridge is not positive; or the least eigenvalue of `K + μI` is below μ/2 or below rounding.
    """
    check_positive(ridges)
    rounding = num_rows * np.finfo(np.float64).eps * largest
    refused = [ridge for ridge in ridges if smallest + ridge * mean_diagonal < max(ridge * mean_diagonal / 2, rounding)]
    if refused:
        needed = 1.05 * max(-2 * smallest, rounding - smallest) / mean_diagonal  # printed to two digits: never too low
        raise NNTKError(
            f"K + ridge·(tr K/n)·I is indefinite or nearly singular at ridge {max(refused):g}: the kernel's least "
            f"eigenvalue is {smallest:.3g}, its mean diagonal {mean_diagonal:.3g}; use 'statistic: plugin' (positive "
            f"semidefinite) or ridges of at least {needed:.2g}"
        )
    return tuple(ridge * mean_diagonal for ridge in ridges)


def check_positive(ridges: Sequence[float]) -> None:
    """Raise an NNTKError unless there are ridges and all are positive numbers."""
    if not ridges or not all(np.isfinite(ridge) and ridge > 0 for ridge in ridges):
        raise NNTKError(f"ridges are {list(ridges)}; allowed: one or more positive numbers, relative to tr K / n")


def target_matrix(targets: np.ndarray, num_classes: int | None, what: str) -> Float[np.ndarray, "n T"]:
    """Float targets as (n, T), or integer labels as one-hot rows."""
    targets = np.asarray(targets)
    if np.issubdtype(targets.dtype, np.integer):
        if targets.ndim != 1:
            raise NNTKError(f"{what} are integers of shape {targets.shape}; labels must have shape (examples,)")
        if num_classes is None or targets.min(initial=0) < 0 or targets.max(initial=0) >= num_classes:
            raise NNTKError(f"{what} hold labels outside 0 … num_classes − 1, num_classes = {num_classes}")
        return np.eye(num_classes)[targets]
    matrix = targets.astype(np.float64)
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or matrix.size == 0:
        raise NNTKError(f"{what} have shape {targets.shape}; allowed: (examples,) or (examples, columns), not empty")
    check_finite(matrix, what)
    return matrix


def matrix_like(values: np.ndarray, like: np.ndarray, what: str) -> np.ndarray:
    """`values` as finite float64 of the shape of `like`."""
    values = np.asarray(values, dtype=np.float64)
    if values.shape != like.shape:
        raise NNTKError(f"{what} has shape {values.shape}; it must match the targets, {like.shape}")
    check_finite(values, what)
    return values


def _mean_square(residuals: np.ndarray) -> float:
    return float(np.square(residuals).mean())


def _accuracy(scores: Float[np.ndarray, "n T"], one_hot: Float[np.ndarray, "n T"]) -> float:
    return float((scores.argmax(axis=1) == one_hot.argmax(axis=1)).mean())
