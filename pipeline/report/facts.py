"""The text of the report page: every number with its unit and meaning, and warnings about what is easy to misread.

It turns `ReportInputs` into labels, values and meanings as text. It makes no HTML and no figures.

Axes: n eigenvalues. Kernel values, eigenvalues and standard errors are in the kernel's own unit.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

from nntk_dist.analysis.spectra.results import Spectrum
from nntk_dist.runtime.precision import FULL
from nntk_dist.spec import Kind, Statistic
from pipeline.report.formatting import count, number, percent
from pipeline.report.inputs import KernelFacts, RegressionFacts, ReportInputs, SolverFacts

_KINDS = MappingProxyType(
    {
        Kind.NONLOCAL: "Inner products of the outputs' nonlocal gradients: differences averaged over a neighbourhood.",
        Kind.COVARIANCE: "Covariance of output differences: tends to the NTK as γ → 0, but is not the nonlocal NTK.",
        Kind.AVERAGED: "The ordinary NTK, averaged over perturbed parameters.",
        Kind.LOCAL: "The ordinary empirical NTK: inner products of the outputs' gradients.",
    }
)
_STATISTICS = MappingProxyType(
    {
        Statistic.BOTH: "gram, the plugin kernel, is positive semidefinite: use it for solves. gram_unbiased is for "
        "entries.",
        Statistic.PLUGIN: "Inner products of mean gradients: positive semidefinite, but biased upwards by noise.",
        Statistic.UNBIASED: "Inner products across blocks of draws: unbiased, but not positive semidefinite.",
    }
)
_WEIGHTING = (
    "The draws of a block are weighted against each other. This is a ratio estimator: consistent, but not unbiased. "
    "Both statistics have a bias that falls like one over the number of draws in a block; no number on this page "
    "includes it."
)
_NOTABLE_BIAS = 0.05
_NOTABLE_ERROR = 0.2
_NOTABLE_NEGATIVE_MASS = 0.05


@dataclass(frozen=True)
class Fact:
    """A number on the page: its label, its value with unit, and its meaning."""

    label: str
    value: str
    meaning: str


@dataclass(frozen=True)
class SpectrumFact:
    """A number that describes a spectrum, with one value for each statistic."""

    label: str
    values: Sequence[str]
    meaning: str


def headline(inputs: ReportInputs) -> list[Fact]:
    """Return the numbers that a reader wants first: the regression's result, and how far to trust the kernel."""
    return [*_regression_headline(inputs), *_trust_headline(inputs.kernel)]


def cautions(inputs: ReportInputs) -> list[str]:
    """Return warnings about results that are easy to misread, one or two sentences each; empty if there are none."""
    return [
        *_kernel_cautions(inputs),
        *_solver_cautions(inputs),
        *(_ridge_cautions(inputs.regression) if inputs.regression else ()),
    ]


def kernel_facts(inputs: ReportInputs) -> Iterator[Fact]:
    """Yield the facts on how the kernel was computed."""
    kernel, errors, reason = inputs.kernel, inputs.standard_errors, inputs.kernel.estimator_reason
    yield Fact("Kernel", f"{kernel.kind}, outputs {kernel.outputs}", _KINDS[kernel.kind])
    if kernel.distribution is not None:
        yield Fact("Perturbations", kernel.distribution, "Distribution of the perturbations; γ is their range.")
    yield Fact(
        "Examples n",
        f"{count(kernel.num_train)} train, {count(kernel.num_test)} test",
        f"From {inputs.data}. The Gram matrix is train by train, the test kernel test by train.",
    )
    yield Fact("Parameters P", count(kernel.num_parameters), "Perturbed parameters; shared ones count once.")
    if kernel.num_draws is not None:
        blocks = f" in {kernel.num_blocks} blocks" if kernel.num_blocks is not None else ""
        yield Fact("Draws S", f"{count(kernel.num_draws)}{blocks}", "Perturbed models evaluated for each example.")
    if kernel.weighting is not None:
        yield Fact("Weighting", kernel.weighting, _WEIGHTING)
    yield Fact("Estimator", kernel.estimator, reason[:1].upper() + reason[1:])
    if kernel.kind == Kind.NONLOCAL:
        yield Fact("Statistic", kernel.statistic, _STATISTICS[kernel.statistic])
    if errors is not None:
        bias = " The error does not include the plugin kernel's bias." if kernel.kind == Kind.NONLOCAL else ""
        yield Fact(
            "Standard error of an entry",
            number(errors.median),
            f"Median over the resolved train entries{errors.rows_text}, in the kernel's unit; 90 % are below "
            f"{number(errors.percentile_90)}, the largest is {number(errors.largest)}. For comparison, the mean "
            f"diagonal is {number(errors.mean_diagonal)}.{bias}",
        )


def spectrum_facts(
    eigenvalues: Mapping[str, Float[np.ndarray, " n"]], known: Mapping[str, Mapping[str, float]]
) -> list[SpectrumFact]:
    """Return the derived numbers of each spectrum, as `nntk_dist.analysis.Spectrum` defines them.

    Args:
        eigenvalues: the eigenvalues of each statistic, in descending order.
        known: the numbers of spectra that were computed already; the others are computed from their eigenvalues.
    """
    spectra = [known.get(name) or _spectrum(values).numbers() for name, values in eigenvalues.items()]
    sizes = ", ".join(sorted({count(len(values)) for values in eigenvalues.values()}))

    def shown(key: str, text: Callable[[float], str] = number) -> list[str]:
        return [text(each[key]) if key in each else "needs all eigenvalues" for each in spectra]

    return [
        SpectrumFact("Trace", shown("trace"), "Sum of the eigenvalues, in the kernel's unit."),
        SpectrumFact(
            "Participation ratio",
            shown("participation_ratio"),
            "(Σλ)² / Σλ²: the number of equal eigenvalues with the same trace and the same sum of squares.",
        ),
        SpectrumFact(
            "Effective rank",
            shown("effective_rank"),
            f"Exponential of the spectrum's entropy, out of {sizes}.",
        ),
        SpectrumFact(
            "Condition number",
            shown("condition_number"),
            "Largest eigenvalue magnitude over the smallest; if it is large, a ridge keeps the solve stable.",
        ),
        SpectrumFact(
            "Negative mass",
            shown("negative_mass", percent),
            "Share of Σ|λ| from negative eigenvalues: rounding if the kernel is positive semidefinite, else noise.",
        ),
    ]


def solver_note(what: str, solver: SolverFacts | None) -> str:
    """Return a sentence on how a stage was solved; empty if by one dense decomposition of the kernel."""
    if solver is None:
        return ""
    if solver.method == "factored":
        columns = "" if solver.columns is None else f" with {count(solver.columns)} columns"
        return f"{what}: exact, from the kernel's factor{columns}; eigenvalues beyond its rank are zero."
    if solver.passes is None:
        return f"{what}: solved by {solver.method}."
    passes = f" in {count(solver.passes)} passes over the stored kernel"
    short = " The iteration did not reach its tolerance." if solver.converged is False else ""
    return f"{what}: solved iteratively{passes}; its table has the residuals.{short}"


def regression_note(inputs: ReportInputs) -> str:
    """Return sentences on how the regression was solved and what rounding does to it; empty if there is no need."""
    notes = [solver_note("Regression", inputs.regression_solver)]
    if inputs.regression is not None and (error := inputs.regression.selected.rounding_error) is not None:
        notes.append(
            "Rounding of the kernel's entries moves predictions at the selected ridge by up to about "
            f"{number(100 * error, 2)} % of the targets' root mean square."
        )
    return " ".join(filter(None, notes))


def _regression_headline(inputs: ReportInputs) -> Iterator[Fact]:
    if inputs.regression is None:
        return
    row, num_test, num_classes = inputs.regression.selected, inputs.kernel.num_test, inputs.regression.num_classes
    if row.test_accuracy is not None:
        spread = math.sqrt(row.test_accuracy * (1 - row.test_accuracy) / num_test)
        guess = f" Guessing among {num_classes} classes gives {percent(1 / num_classes)}." if num_classes else ""
        yield Fact(
            "Test accuracy",
            percent(row.test_accuracy),
            f"Share of {count(num_test)} test examples classified correctly; binomial standard error "
            f"{number(100 * spread, 2)} points.{guess}",
        )
    else:
        yield Fact(
            "Test error",
            number(row.test_error),
            f"Mean squared error over {count(num_test)} test examples, in squared target units; its root is "
            f"{number(math.sqrt(row.test_error))}.",
        )
    yield Fact(
        "Selected ridge",
        number(row.ridge),
        f"Relative to the kernel's mean diagonal; {number(row.absolute_ridge)} in the kernel's unit. Chosen for the "
        f"smallest {'leave-one-out error' if row.loo_stderr is None else 'estimated leave-one-out error'} on the "
        "training examples; test examples are not used for it.",
    )


def _trust_headline(kernel: KernelFacts) -> Iterator[Fact]:
    if kernel.relative_error is not None:
        subject = "unbiased kernel" if kernel.kind == Kind.NONLOCAL else "kernel"
        parts = "groups of the sketch's numbers" if kernel.kind == Kind.LOCAL else "blocks of draws"
        yield Fact(
            "Kernel error",
            percent(kernel.relative_error),
            f"Estimated relative error of the {subject} in the Frobenius norm, from the spread between "
            f"{'' if kernel.accuracy else f'{kernel.num_blocks} '}independent {parts}."
            f"{_bound_text(kernel.relative_error_bound)}",
        )
    if kernel.accuracy is not None:
        reached = "reached" if kernel.accuracy_reached else "not reached"
        yield Fact("Requested accuracy", reached, f"By a 95 % bound on a sample of rows: {kernel.accuracy}.")
    if kernel.relative_bias is not None:
        yield Fact(
            "Plugin bias",
            percent(kernel.relative_bias),
            "‖plugin − unbiased‖ / ‖unbiased‖: how much noise inflates the kernel that the regression uses.",
        )
    if kernel.kind == Kind.LOCAL and kernel.relative_error is None:
        yield Fact("Kernel error", "none", "The local kernel comes from automatic differentiation, without sampling.")


def _bound_text(bound: float | None) -> str:
    return "" if bound is None else f" With 95 % confidence the actual error is below {percent(bound)}."


def _kernel_cautions(inputs: ReportInputs) -> Iterator[str]:
    kernel = inputs.kernel
    for caution in () if inputs.probes is None else inputs.probes.cautions:
        yield f"{caution[:1].upper()}{caution[1:]}."
    if kernel.relative_bias is not None and kernel.relative_bias > _NOTABLE_BIAS:
        yield (
            f"Noise inflates the plugin kernel: its bias is {percent(kernel.relative_bias)}. Solve with gram, which is "
            "positive semidefinite, but read and compare entries in gram_unbiased. More draws reduce the bias."
        )
    if kernel.matmul_precision != FULL:
        yield (
            f"Tiles were multiplied at matmul_precision {kernel.matmul_precision}, which is coarser than float32 on "
            "hardware that supports it. The standard errors do not include this rounding."
        )
    if kernel.accuracy_reached is False:
        yield f"The kernel did not reach the requested accuracy: {kernel.accuracy}."
    if kernel.accuracy_caution is not None:
        yield f"{kernel.accuracy_caution[:1].upper()}{kernel.accuracy_caution[1:]}."
    elif kernel.relative_error is not None and kernel.relative_error > _NOTABLE_ERROR:
        yield (
            f"Single entries are uncertain: the kernel's estimated error is {percent(kernel.relative_error)}. Twice as "
            "many draws divide it by 1.4 or more."
        )
    if kernel.interval_caution is not None:
        yield f"{kernel.interval_caution[:1].upper()}{kernel.interval_caution[1:]}."
    if kernel.unresolved_share > 0:
        yield (
            f"{percent(kernel.unresolved_share)} of the entries are unresolved: no draw changed the model's output "
            "there. Their standard error is NaN; what they could hold is part of the 95 % bound of the kernel's error, "
            "and of no other number. A larger γ or more draws would resolve them."
        )
    unbiased = inputs.eigenvalues.get("unbiased")
    if unbiased is not None and (mass := _spectrum(unbiased).negative_mass) > _NOTABLE_NEGATIVE_MASS:
        yield (
            f"{percent(mass)} of the unbiased spectrum's mass is negative, which is noise. Do not rely on eigenvalues "
            f"that are no larger in magnitude than the most negative one, {number(unbiased[-1])}."
        )


def _solver_cautions(inputs: ReportInputs) -> Iterator[str]:
    for what, solver in (("spectrum", inputs.spectrum_solver), ("regression", inputs.regression_solver)):
        if solver is not None and solver.converged is False:
            yield (
                f"The iteration for the {what} stopped before it reached its tolerance; its table has the residuals. A "
                "larger ridge, or fewer eigenvalues, would converge sooner."
            )


def _ridge_cautions(regression: RegressionFacts) -> Iterator[str]:
    for caution in regression.selected.cautions:
        yield f"{caution[:1].upper()}{caution[1:]}."
    ridges = [row.ridge for row in regression.rows]
    chosen = regression.selected.ridge
    if len(ridges) > 1 and chosen in (min(ridges), max(ridges)):
        edge, direction = ("smallest", "smaller") if chosen == min(ridges) else ("largest", "larger")
        yield (
            f"The selected ridge, {number(chosen)}, is the {edge} of those tried; the best one may be {direction}: "
            "extend regression.ridge."
        )


def _spectrum(eigenvalues: Float[np.ndarray, " n"]) -> Spectrum:
    return Spectrum(eigenvalues, np.empty((len(eigenvalues), 0)))
