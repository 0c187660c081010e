"""The functions for kernels in memory or opened from a store: `spectrum` and `ridge`.

They wrap arrays, tiles and factors for the solvers; the solvers do the work.

Axes: n train examples, m test examples, T target columns, L ridges.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.analysis.kernel_forms import KernelForms
from nntk_dist.analysis.regression.dense import DenseRidge
from nntk_dist.analysis.regression.ridge_problem import RidgeRegression, ridge_problem
from nntk_dist.analysis.solvers import Eigenpairs, RegressionSolver, SpectrumSolver
from nntk_dist.analysis.spectra.dense import DenseSpectrum
from nntk_dist.analysis.streamed_kernel import StreamedKernel, StreamedRectangle
from nntk_dist.runtime.warning import warn_caller

_DENSE_SPECTRUM, _DENSE_RIDGE = DenseSpectrum(), DenseRidge()


def spectrum(
    kernel: Any, *, top_k: int = 50, solver: SpectrumSolver = _DENSE_SPECTRUM, vectors: bool = True, seed: int = 0
) -> Eigenpairs:
    """Compute eigenvalues and leading eigenvectors of a symmetric kernel.

    Args:
        kernel: a matrix, a `StreamedKernel`, a `FactorRows`, or a `KernelForms`.
        top_k: eigenvectors to compute (and eigenvalues, for an iterative solver).
        solver: `DenseSpectrum()`, `FactoredSpectrum()`, `BlockKrylov(tolerance=…)`, or your own.
        vectors: False for eigenvalues only.
        seed: of an iterative solver's random start.

    Returns:
        A `Spectrum`, or `LeadingEigenpairs` from an iterative solver.

    Raises:
        ArgumentError: the kernel is not square and symmetric, or `top_k` is out of range.
        DataError: an entry is not finite.
        Unavailable: the solver needs another form of the kernel.

    Example:
        >>> spectrum(np.diag([1.0, 3.0, 2.0])).eigenvalues.tolist()
        [3.0, 2.0, 1.0]
    """
    return solver.solve(_forms(kernel, KernelForms.of_kernel), top_k=top_k, vectors=vectors, seed=seed)


def ridge(
    kernel: Any,
    targets: np.ndarray,
    test_kernel: Any,
    test_targets: np.ndarray,
    *,
    ridges: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    solver: RegressionSolver = _DENSE_RIDGE,
    num_classes: int | None = None,
    offset: Float[np.ndarray, "n T"] | None = None,
    test_offset: Float[np.ndarray, "m T"] | None = None,
    seed: int = 0,
) -> RidgeRegression:
    """Fit kernel ridge regression at every ridge, select one by leave-one-out error, and predict the test examples.

    The selection never uses the test examples. `RidgeRow.rounding_error` says what rounding of the kernel's entries, as
    they are stored, does to predictions. An `NNTKWarning` says if that is more than 0.1 % at the selected ridge, or if
    the leave-one-out error is hardly known.

    Args:
        kernel: train by train, as in `spectrum`.
        targets: integer labels (n,), or floats (n,) or (n, T).
        test_kernel: test by train, in the same form.
        test_targets: targets of the test examples.
        ridges: relative to the kernel's mean diagonal.
        solver: `DenseRidge()`, `FactoredRidge()`, `ConjugateGradients(tolerance=…)`, or your own.
        num_classes: classes of labels; by default the largest label plus one.
        offset: outputs of the model on the train examples; the kernel fits `y − offset`.
        test_offset: outputs of the model on the test examples; they are added to the predictions.
        seed: of an iterative solver's samples.

    Raises:
        ArgumentError: arguments do not fit each other, or a ridge leaves the kernel indefinite.
        DataError: an entry or target is not finite.
        Unavailable: the solver needs another form of the kernels.

    Example:
        >>> kernel = np.eye(3) + 1
        >>> result = ridge(kernel, np.array([0.0, 1.0, 2.0]), kernel[:1], np.array([0.0]), ridges=[0.1])
        >>> result.scores.shape
        (1, 1)
    """
    problem = ridge_problem(targets, test_targets, num_classes=num_classes, offset=offset, test_offset=test_offset)
    train, test = _forms(kernel, KernelForms.of_kernel), _forms(test_kernel, KernelForms.of_test_kernel)
    result = solver.solve(train, test, problem, ridges, seed=seed)
    for caution in result.selected.cautions:
        warn_caller(caution)
    return result


def _forms(kernel: Any, of_array: Callable[[Any], KernelForms[Any]]) -> KernelForms[Any]:
    if isinstance(kernel, KernelForms):
        return kernel
    if isinstance(kernel, StreamedKernel | StreamedRectangle):
        return KernelForms(tiles=lambda: kernel)
    return KernelForms(factor=lambda: kernel) if isinstance(kernel, FactorRows) else of_array(kernel)
