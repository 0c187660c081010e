"""What a solver is: it says what it reads and what it costs, and solves. Also the tables of all solvers by name.

A solver is a small frozen object such as `BlockKrylov(tolerance=1e-8)`. To add one, write a class with the methods of
`SpectrumSolver` or `RegressionSolver` in a new file and add one line to a table below; from another package, name it
`python:module:Name` or register an entry point. No solver is here.

Units: bytes; operations are floating-point ones (a multiply-add is two).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nntk_dist.analysis.kernel_forms import KernelForms, Needs
from nntk_dist.analysis.regression.ridge_problem import RidgeProblem, RidgeRegression
from nntk_dist.analysis.streamed_kernel import StreamedKernel, StreamedRectangle
from nntk_dist.registration.callables import call_checked
from nntk_dist.registration.registry import Registry


@dataclass(frozen=True)
class Cost:
    """What a solve takes, estimated: peak memory beside the process itself, float64 operations, bytes read."""

    memory_bytes: int
    operations: float
    read_bytes: float


@dataclass(frozen=True)
class KernelSize:
    """The size of a train kernel and of the form in which it is stored.

    Attributes:
        num_rows: kernel rows.
        rows_per_example: kernel rows of one example: C in form `full`, else 1.
        tile_rows: kernel rows of one stored tile.
        entry_bytes: bytes of one stored entry.
        factor_columns: columns of the factor; None without one.
        factor_block_rows: rows of the factor that are read at a time.
        factor_bytes: bytes of the stored factor, train and test.
    """

    num_rows: int
    rows_per_example: int = 1
    tile_rows: int = 1024
    entry_bytes: int = 4
    factor_columns: int | None = None
    factor_block_rows: int = 0
    factor_bytes: int = 0


@dataclass(frozen=True)
class SpectrumSize:
    """A spectrum to compute: `num_kernels` is 2 if `plugin` and `unbiased` are stored; `indefinite` if the factor gives
    the unbiased one too.
    """

    kernel: KernelSize
    top_k: int
    num_kernels: int = 1
    indefinite: bool = False


@dataclass(frozen=True)
class RegressionSize:
    """A regression to compute: ridges, and right-hand sides of each."""

    kernel: KernelSize
    num_ridges: int
    num_targets: int


class Eigenpairs(Protocol):
    """What a spectrum solver returns; see `Spectrum` and `LeadingEigenpairs`."""

    @property
    def eigenvalues(self) -> np.ndarray:
        """Return the eigenvalues found, in descending order."""

    @property
    def eigenvectors(self) -> np.ndarray:
        """Return unit eigenvectors of the leading eigenvalues as columns."""

    @property
    def residuals(self) -> np.ndarray | None:
        """Return `‖K u − λ u‖` of each pair; None if the eigenvalues are exact up to rounding."""

    def numbers(self) -> dict[str, float]:
        """Return the derived numbers by name."""


class SpectrumSolver(Protocol):
    """Computes eigenvalues of a symmetric kernel."""

    @property
    def needs(self) -> Needs:
        """Return what the solver reads."""

    def cost(self, size: SpectrumSize) -> Cost:
        """Estimate what a solve takes."""

    def solve(
        self, kernel: KernelForms[StreamedKernel], *, top_k: int, vectors: bool = True, seed: int = 0
    ) -> Eigenpairs:
        """Compute at least the `top_k` largest eigenvalues, and their eigenvectors if `vectors`."""


class RegressionSolver(Protocol):
    """Fits kernel ridge regression at several ridges."""

    @property
    def needs(self) -> Needs:
        """Return what the solver reads."""

    def cost(self, size: RegressionSize) -> Cost:
        """Estimate what a solve takes."""

    def solve(
        self,
        train: KernelForms[StreamedKernel],
        test: KernelForms[StreamedRectangle],
        problem: RidgeProblem,
        ridges: Sequence[float],
        *,
        seed: int = 0,
    ) -> RidgeRegression:
        """Fit every ridge, select one by leave-one-out error, and predict the test examples."""


SPECTRUM_SOLVERS: Registry[type[SpectrumSolver]] = Registry(
    "spectrum solver",
    "nntk_dist.spectrum_solvers",
    {
        "dense": "nntk_dist.analysis.spectra.dense:DenseSpectrum",
        "factored": "nntk_dist.analysis.spectra.factored:FactoredSpectrum",
        "iterative": "nntk_dist.analysis.spectra.block_krylov:BlockKrylov",
    },
)
REGRESSION_SOLVERS: Registry[type[RegressionSolver]] = Registry(
    "regression solver",
    "nntk_dist.regression_solvers",
    {
        "dense": "nntk_dist.analysis.regression.dense:DenseRidge",
        "factored": "nntk_dist.analysis.regression.factored:FactoredRidge",
        "iterative": "nntk_dist.analysis.regression.conjugate_gradients:ConjugateGradients",
    },
)


@dataclass(frozen=True)
class SolverChoice:
    """A solver by name and arguments, and why it was chosen: what a run keeps.

    Attributes:
        name: its name in a table above, or `python:module:Name`.
        reason: why it was chosen, as a phrase.
        arguments: arguments of its class.
        columns: columns of the factor, if it reads one.

    Example:
        >>> SolverChoice("iterative", "as asked", {"tolerance": 1e-8}).spectrum_solver()
        BlockKrylov(tolerance=1e-08, max_passes=60)
    """

    name: str
    reason: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    columns: int | None = None

    @property
    def text(self) -> str:
        """Return name and reason as one phrase."""
        return f"{self.name}, {self.reason}"

    def spectrum_solver(self) -> SpectrumSolver:
        """Make the solver. Raises `ArgumentError` if there is no such solver or it refuses the arguments."""
        return _made(SPECTRUM_SOLVERS, self)

    def regression_solver(self) -> RegressionSolver:
        """Make the solver. Raises `ArgumentError` if there is no such solver or it refuses the arguments."""
        return _made(REGRESSION_SOLVERS, self)


def _made(registry: Registry[Any], choice: SolverChoice) -> Any:
    return call_checked(registry.get(choice.name), choice.arguments, what=f"{registry.kind} '{choice.name}'")
