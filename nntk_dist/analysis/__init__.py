"""Analysis of a finished kernel: spectrum and kernel ridge regression. No models and no stores.

`spectrum(kernel)` and `ridge(kernel, targets, …)` take a solver, a small object such as `BlockKrylov(tolerance=1e-8)`.
"""

from nntk_dist.analysis.convergence import Convergence
from nntk_dist.analysis.functions import ridge, spectrum
from nntk_dist.analysis.kernel_forms import KernelForms, Needs
from nntk_dist.analysis.regression.conjugate_gradients import ConjugateGradients
from nntk_dist.analysis.regression.dense import DenseRidge
from nntk_dist.analysis.regression.factored import FactoredRidge
from nntk_dist.analysis.regression.ridge_problem import RidgeProblem, RidgeRegression, RidgeRow
from nntk_dist.analysis.solvers import (
    REGRESSION_SOLVERS,
    SPECTRUM_SOLVERS,
    Cost,
    RegressionSize,
    RegressionSolver,
    SpectrumSize,
    SpectrumSolver,
)
from nntk_dist.analysis.spectra.block_krylov import BlockKrylov
from nntk_dist.analysis.spectra.dense import DenseSpectrum
from nntk_dist.analysis.spectra.factored import FactoredSpectrum
from nntk_dist.analysis.spectra.results import LeadingEigenpairs, Spectrum
from nntk_dist.analysis.streamed_kernel import StreamedKernel, StreamedRectangle

__all__ = [
    "REGRESSION_SOLVERS",
    "SPECTRUM_SOLVERS",
    "BlockKrylov",
    "ConjugateGradients",
    "Convergence",
    "Cost",
    "DenseRidge",
    "DenseSpectrum",
    "FactoredRidge",
    "FactoredSpectrum",
    "KernelForms",
    "LeadingEigenpairs",
    "Needs",
    "RegressionSize",
    "RegressionSolver",
    "RidgeProblem",
    "RidgeRegression",
    "RidgeRow",
    "Spectrum",
    "SpectrumSize",
    "SpectrumSolver",
    "StreamedKernel",
    "StreamedRectangle",
    "ridge",
    "spectrum",
]
