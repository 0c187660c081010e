"""Kernel ridge regression on a kernel that fits in memory: every ridge, and exact leave-one-out, from one `eigh`.

Works on plain arrays in float64. It never repairs a kernel: one that is indefinite or singular beyond its ridge is
refused, because clipping or pseudo-inverting it gives numbers that look fine and mean nothing.

Axes: n train examples, m test examples, T target columns, C outputs, L ridges. A kernel of form `full` has n·C rows
with index `i·C + c`; every other kernel has n rows, shared by all T columns.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from nntk_dist.errors import NNTKError, check_choice
from nntk_dist.spectrum import check_finite, check_symmetric


@dataclass(frozen=True)
class RidgeRow:
    """What one ridge gives. Errors are mean squared errors over examples and columns (one-hot for classes), in the
    squared unit of the targets; accuracies are shares of examples in [0, 1], None where targets are not labels.
    """

    ridge: float
    absolute_ridge: float
    loo_error: float
    loo_accuracy: float | None
    train_error: float
    test_error: float
    test_accuracy: float | None
    selected: bool

    def numbers(self) -> dict[str, float | bool | None]:
        """The fields by name, one table row."""
        return asdict(self)


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
class RidgePath:
    """Kernel ridge regression fitted at every ridge: `f_l(x) = k(x, X) a_l + offset(x)`.

    `residuals` are `y − f_l` on the train examples, `loo_residuals` the same with the example itself left out.
    """

    ridges: tuple[float, ...]
    absolute_ridges: tuple[float, ...]
    coefficients: Float[np.ndarray, "L rows columns"]
    residuals: Float[np.ndarray, "L n T"]
    loo_residuals: Float[np.ndarray, "L n T"]

    @property
    def selected(self) -> int:
        """Index of the ridge of least leave-one-out mean squared error; of equals the largest ridge."""
        errors = np.square(self.loo_residuals).mean(axis=(1, 2))
        return min(range(len(self.ridges)), key=lambda index: (errors[index], -self.ridges[index]))

    def predict(
        self,
        test_kernel: Float[np.ndarray, "test_rows rows"],
        index: int,
        offset: Float[np.ndarray, "m T"] | None = None,
    ) -> Float[np.ndarray, "m T"]:
        """Scores of ridge number `index` on the examples of `test_kernel` (m rows, or m·C for a `full` kernel).

        Raises:
            NNTKError: the test kernel or the offset does not fit the fitted kernel, or is not finite.
        """
        rows, columns = self.coefficients.shape[1:]
        num_targets = self.residuals.shape[2]
        rows_per_example = num_targets // columns
        test_kernel = np.asarray(test_kernel, dtype=np.float64)
        if test_kernel.ndim != 2 or test_kernel.shape[1] != rows or len(test_kernel) % rows_per_example:
            raise NNTKError(
                f"the test kernel has shape {test_kernel.shape}; it needs {rows} columns, one for each row of the "
                f"train kernel, and {rows_per_example} row(s) for each test example"
            )
        check_finite(test_kernel, "the test kernel")
        scores = (test_kernel @ self.coefficients[index]).reshape(-1, num_targets)
        return scores if offset is None else scores + _matrix_like(offset, scores, "test_offset")


def ridge_regression(
    kernel: Float[np.ndarray, "rows rows"],
    targets: np.ndarray,
    test_kernel: Float[np.ndarray, "test_rows rows"],
    test_targets: np.ndarray,
    *,
    ridges: Sequence[float],
    select: str = "loo",
    num_classes: int | None = None,
    offset: Float[np.ndarray, "n T"] | None = None,
    test_offset: Float[np.ndarray, "m T"] | None = None,
) -> RidgeRegression:
    """Fit every ridge, select one by leave-one-out error, and evaluate all of them on the test examples.

    `targets` are integer labels (n,), made one-hot over `num_classes` (default: the largest label present, plus one),
    or floats (n, T) or (n,). With `offset` `f(X; θ)` the kernel fits `y − offset` and `test_offset` is added back.
    The selection never looks at the test examples. Cost and solution: see `fit_ridge_path`; the rest is m·rows·T·L.

    Raises:
        NNTKError: an argument does not fit the others or is not finite; or what `fit_ridge_path` refuses.
    """
    check_choice("select", select, ("loo",))
    if (offset is None) != (test_offset is None):
        raise NNTKError("offset and test_offset must be given together: the same model outputs, on train and on test")
    is_labels = np.issubdtype(np.asarray(targets).dtype, np.integer)
    if is_labels != np.issubdtype(np.asarray(test_targets).dtype, np.integer):
        raise NNTKError("targets and test_targets must be of one kind: both integer labels, or both floats")
    if is_labels and num_classes is None:
        num_classes = 1 + int(max(np.max(targets, initial=0), np.max(test_targets, initial=0)))
    wanted = _target_matrix(targets, num_classes, "targets")
    test_wanted = _target_matrix(test_targets, num_classes, "test_targets")
    path = fit_ridge_path(kernel, wanted, ridges, offset=offset)
    all_scores = [path.predict(test_kernel, index, test_offset) for index in range(len(path.ridges))]
    if all_scores[0].shape != test_wanted.shape:
        raise NNTKError(
            f"test_targets have shape {test_wanted.shape} (examples, columns); the test kernel and the train targets "
            f"call for {all_scores[0].shape}"
        )
    rows = tuple(
        RidgeRow(
            ridge=path.ridges[index],
            absolute_ridge=path.absolute_ridges[index],
            loo_error=_mean_square(path.loo_residuals[index]),
            loo_accuracy=_accuracy(wanted - path.loo_residuals[index], wanted) if is_labels else None,
            train_error=_mean_square(path.residuals[index]),
            test_error=_mean_square(test_wanted - scores),
            test_accuracy=_accuracy(scores, test_wanted) if is_labels else None,
            selected=index == path.selected,
        )
        for index, scores in enumerate(all_scores)
    )
    scores = all_scores[path.selected]
    return RidgeRegression(rows, scores, scores.argmax(axis=1) if is_labels else None)


def fit_ridge_path(
    kernel: Float[np.ndarray, "rows rows"],
    targets: Float[np.ndarray, "n T"],
    ridges: Sequence[float],
    *,
    offset: Float[np.ndarray, "n T"] | None = None,
) -> RidgePath:
    """Solve `(K + μ_l I) a_l = y − offset`, `μ_l = ridge_l · tr K / rows`, for all ridges from `K = Q Λ Qᵀ`.

    `K` has n rows (all T columns share it) or n·T rows (form `full`: targets are flattened to match `i·T + c`).
    Leave-one-out is exact and leaves out a whole *example*: its residual is `[(A⁻¹)_ii]⁻¹ a_i`, `A = K + μI`, where
    `(A⁻¹)_ii` is a number, or for a full kernel the T×T block of the example (leaving out one output alone would let
    the others of the same example tell it). The absolute ridge μ is held fixed while the example is out.
    Cost: one dense `eigh` (about 9·rows³ operations, three rows² float64 arrays), then rows²·T a ridge.

    Raises:
        NNTKError: the kernel is not finite, square and symmetric; its trace is not positive; the targets do not fit;
            a ridge is not positive; or `K + μI` is not safely positive definite: its least eigenvalue must be at least
            μ/2 (a positive semidefinite kernel has μ; noise of the unbiased statistic pushes it below) and above
            rounding.
    """
    matrix = check_symmetric(kernel)
    targets = _target_matrix(np.asarray(targets, dtype=np.float64), None, "targets")
    num_rows, (num_examples, num_targets) = len(matrix), targets.shape
    if num_rows not in (num_examples, num_examples * num_targets):
        raise NNTKError(
            f"the train kernel has {num_rows} rows and the targets {num_examples} examples of {num_targets} column(s); "
            f"the kernel needs {num_examples} rows, or {num_examples * num_targets} in form 'full'"
        )
    mean_diagonal = float(np.trace(matrix)) / num_rows
    if mean_diagonal <= 0:
        raise NNTKError(
            f"the kernel's mean diagonal is {mean_diagonal:.3g}; a ridge is relative to it and it must be positive; "
            "use 'statistic: plugin' or more draws, and check that the model depends on the selected parameters"
        )
    ridges = tuple(float(ridge) for ridge in ridges)
    eigenvalues, basis = scipy.linalg.eigh(matrix)
    absolute = _absolute_ridges(ridges, mean_diagonal, eigenvalues)
    wanted = targets if offset is None else targets - _matrix_like(offset, targets, "offset")
    size = num_rows // num_examples  # kernel rows of one example
    projected = basis.T @ wanted.reshape(num_rows, -1)
    grouped = basis.reshape(num_examples, size, num_rows)
    coefficients, loo_residuals = [], []
    for ridge in absolute:
        inverse = 1 / (eigenvalues + ridge)
        solution = basis @ (inverse[:, None] * projected)
        own_blocks = (grouped * inverse) @ grouped.transpose(0, 2, 1)  # (A⁻¹)_ii, one size×size block per example
        loo_residuals.append(np.linalg.solve(own_blocks, solution.reshape(num_examples, size, -1)))
        coefficients.append(solution)
    shape = (len(absolute), num_examples, num_targets)
    solved = np.stack(coefficients)
    residuals = np.asarray(absolute)[:, None, None] * solved.reshape(shape)  # y − K a = μ a, without cancellation
    return RidgePath(ridges, absolute, solved, residuals, np.stack(loo_residuals).reshape(shape))


def _absolute_ridges(
    ridges: tuple[float, ...], mean_diagonal: float, eigenvalues: Float[np.ndarray, " rows"]
) -> tuple[float, ...]:
    """The ridges in the kernel's units, after refusing those that leave `K + μI` indefinite or nearly singular."""
    if not ridges or not all(np.isfinite(ridge) and ridge > 0 for ridge in ridges):
        raise NNTKError(f"ridges are {list(ridges)}; allowed: one or more positive numbers, relative to tr K / n")
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    rounding = len(eigenvalues) * np.finfo(np.float64).eps * largest
    refused = [ridge for ridge in ridges if smallest + ridge * mean_diagonal < max(ridge * mean_diagonal / 2, rounding)]
    if refused:
        needed = 1.05 * max(-2 * smallest, rounding - smallest) / mean_diagonal  # printed to two digits: never too low
        raise NNTKError(
            f"K + ridge·(tr K/n)·I is indefinite or nearly singular at ridge {max(refused):g}: the kernel's least "
            f"eigenvalue is {smallest:.3g}, its mean diagonal {mean_diagonal:.3g}; use 'statistic: plugin' (positive "
            f"semidefinite) or ridges of at least {needed:.2g}"
        )
    return tuple(ridge * mean_diagonal for ridge in ridges)


def _target_matrix(targets: np.ndarray, num_classes: int | None, what: str) -> Float[np.ndarray, "n T"]:
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


def _matrix_like(values: np.ndarray, like: np.ndarray, what: str) -> np.ndarray:
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
