"""The page itself: every number with its unit and a sentence that says what it means, then figures, then provenance.

What to say is decided here, in words; `template.html.j2` and `style.css` only lay it out. The page is one file that
needs nothing else: no scripts, no fonts or pictures from elsewhere. Nothing is read from disk but the template.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jinja2
import numpy as np
from markupsafe import Markup

from nntk_dist.spectrum import Spectrum
from pipeline.report import plots
from pipeline.report.formatting import count, duration, number, percent, size
from pipeline.report.inputs import KernelFacts, RegressionFacts, ReportInputs

_TEMPLATE = "template.html.j2"
_TABLE_EIGENVALUES = 10
_KINDS = MappingProxyType(
    {
        "nonlocal": "Inner products of the outputs' nonlocal gradients, averages of differences over a neighbourhood.",
        "covariance": "Covariance of output differences: the NTK in the limit γ → 0, but not the nonlocal NTK.",
        "averaged": "The ordinary NTK, averaged over perturbed parameters.",
        "local": "The ordinary empirical NTK: inner products of the outputs' gradients.",
    }
)
_STATISTICS = MappingProxyType(
    {
        "both": "gram holds plugin, positive semidefinite, for solves; gram_unbiased is right on average, for entries.",
        "plugin": "Inner products of mean gradients: positive semidefinite, inflated by noise.",
        "unbiased": "Inner products across blocks: right on average, but not positive semidefinite.",
    }
)
_NOTABLE_BIAS = 0.05
_NOTABLE_ERROR = 0.2
_NOTABLE_NEGATIVE_MASS = 0.05


@dataclass(frozen=True)
class Fact:
    """A number on the page: what it is, its value with unit, and what it means."""

    label: str
    value: str
    meaning: str


@dataclass(frozen=True)
class SpectrumFact:
    """A number of every spectrum on the page, one value for each statistic."""

    label: str
    values: Sequence[str]
    meaning: str


@dataclass(frozen=True)
class Figure:
    """One figure: its SVG and the sentence below it."""

    svg: Markup
    caption: str


def render_report(inputs: ReportInputs) -> str:
    """The whole `index.html` as a string, the same for the same inputs.

    With `inputs.plots` False, and for what a run does not have, the page keeps its numbers and leaves the figures out.
    Cost: a second or so for the figures, whatever the kernel's size.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=count, duration=duration, number=number, percent=percent, size=size)
    regression = inputs.regression
    longest = max((stage.wall_seconds for stage in inputs.stages), default=0.0)
    return environment.get_template(_TEMPLATE).render(
        inputs=inputs,
        headline=[*_regression_headline(inputs), *_trust_headline(inputs.kernel)],
        cautions=list(_cautions(inputs)),
        kernel_facts=list(_kernel_facts(inputs)),
        gram_figures=_gram_figures(inputs),
        spectrum_figures=_spectrum_figures(inputs),
        spectrum_facts=_spectrum_facts(inputs.eigenvalues),
        leading={name: values[:_TABLE_EIGENVALUES] for name, values in inputs.eigenvalues.items()},
        regression_figures=_regression_figures(inputs),
        error_unit="squared target unit" if regression and regression.task == "regression" else "squared one-hot unit",
        longest_seconds=longest,
    )


def _regression_headline(inputs: ReportInputs) -> Iterator[Fact]:
    if inputs.regression is None:
        return
    row, num_test = inputs.regression.selected, inputs.kernel.num_test
    if row.test_accuracy is not None:
        spread = math.sqrt(row.test_accuracy * (1 - row.test_accuracy) / num_test)
        chance = inputs.regression.num_classes
        guess = f" Guessing among {chance} classes gives {percent(1 / chance)}." if chance else ""
        yield Fact(
            "Test accuracy",
            percent(row.test_accuracy),
            f"Share of {count(num_test)} test examples classified rightly; binomial standard error "
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
        f"Relative to the kernel's mean diagonal; {number(row.absolute_ridge)} in the kernel's unit. Chosen by the least "
        "leave-one-out error on the training examples; the test examples had no say.",
    )


def _trust_headline(kernel: KernelFacts) -> Iterator[Fact]:
    if kernel.relative_error is not None:
        subject = "unbiased kernel" if kernel.kind == "nonlocal" else "kernel"
        yield Fact(
            "Kernel error",
            percent(kernel.relative_error),
            f"Estimated relative error of the {subject} in the Frobenius norm, from the spread between "
            f"{kernel.num_blocks} independent blocks of draws.",
        )
    if kernel.relative_bias is not None:
        yield Fact(
            "Plugin bias",
            percent(kernel.relative_bias),
            "‖plugin − unbiased‖ / ‖unbiased‖: how far noise inflates the kernel that the regression uses.",
        )
    if kernel.kind == "local":
        yield Fact(
            "Kernel error", "none", "The local kernel is computed by automatic differentiation, without sampling."
        )


def _cautions(inputs: ReportInputs) -> Iterator[str]:
    """What a reader could get wrong, where there is something."""
    kernel, errors = inputs.kernel, inputs.standard_errors
    if kernel.relative_bias is not None and kernel.relative_bias > _NOTABLE_BIAS:
        yield (
            f"Plugin is inflated by noise: bias {percent(kernel.relative_bias)}. Solve with gram, which is positive "
            "semidefinite; take entries and comparisons from gram_unbiased. More draws reduce the bias."
        )
    if kernel.relative_error is not None and kernel.relative_error > _NOTABLE_ERROR:
        yield (
            f"Single entries are uncertain: the kernel's estimated error is {percent(kernel.relative_error)}. Doubling the "
            "draws divides it by about 1.4 or more."
        )
    if errors is not None and errors.unresolved_share > 0:
        yield (
            f"{percent(errors.unresolved_share)} of the entries are unresolved: no draw changed the model's output there. "
            "Their standard error is NaN; a larger γ or more draws would resolve them."
        )
    unbiased = inputs.eigenvalues.get("unbiased")
    if unbiased is not None:
        mass = Spectrum(unbiased, np.empty((len(unbiased), 0))).negative_mass
        if mass > _NOTABLE_NEGATIVE_MASS:
            yield (
                f"{percent(mass)} of the unbiased spectrum's mass is negative, which is noise: eigenvalues no larger than "
                f"the most negative one in magnitude, {number(-unbiased[-1])}, say little."
            )
    if inputs.regression is not None:
        yield from _ridge_cautions(inputs.regression)


def _ridge_cautions(regression: RegressionFacts) -> Iterator[str]:
    ridges = [row.ridge for row in regression.rows]
    chosen = regression.selected.ridge
    if len(ridges) > 1 and chosen in (min(ridges), max(ridges)):
        edge, direction = ("smallest", "smaller") if chosen == min(ridges) else ("largest", "larger")
        yield (
            f"The selected ridge, {number(chosen)}, is the {edge} of those tried; the best one may be {direction}: extend "
            "regression.ridge."
        )


def _kernel_facts(inputs: ReportInputs) -> Iterator[Fact]:
    kernel, errors = inputs.kernel, inputs.standard_errors
    yield Fact("Kernel", f"{kernel.kind}, outputs {kernel.outputs}", _KINDS[kernel.kind])
    if kernel.distribution is not None:
        yield Fact(
            "Perturbations", kernel.distribution, "Distribution of the parameters' displacements; γ is their range."
        )
    yield Fact(
        "Examples n",
        f"{count(kernel.num_train)} train, {count(kernel.num_test)} test",
        f"From {inputs.data}. The Gram matrix is train by train, the test kernel test by train.",
    )
    yield Fact("Parameters P", count(kernel.num_parameters), "Selected parameters, shared ones counted once.")
    if kernel.num_draws is not None:
        blocks = f" in {kernel.num_blocks} blocks" if kernel.num_blocks is not None else ""
        yield Fact("Draws S", f"{count(kernel.num_draws)}{blocks}", "Perturbed models evaluated for each example.")
    reason = kernel.estimator_reason
    yield Fact("Estimator", kernel.estimator, reason[:1].upper() + reason[1:])
    if kernel.kind == "nonlocal":
        yield Fact("Statistic", kernel.statistic, _STATISTICS[kernel.statistic])
    if errors is not None:
        yield Fact(
            "Standard error of an entry",
            number(errors.median),
            f"Median over the resolved train entries, in the kernel's unit, where the mean diagonal is "
            f"{number(errors.mean_diagonal)}; 90 % are below {number(errors.percentile_90)}, the largest is "
            f"{number(errors.largest)}. It says nothing of the plugin kernel's bias.",
        )


def _spectrum_facts(eigenvalues: Mapping[str, np.ndarray]) -> list[SpectrumFact]:
    spectra = [Spectrum(values, np.empty((len(values), 0))) for values in eigenvalues.values()]
    sizes = ", ".join(sorted({count(len(values)) for values in eigenvalues.values()}))
    return [
        SpectrumFact(
            "Trace", [number(each.trace) for each in spectra], "Sum of the eigenvalues, in the kernel's unit."
        ),
        SpectrumFact(
            "Participation ratio",
            [number(each.participation_ratio) for each in spectra],
            "(Σλ)² / Σλ²: how many equal eigenvalues would spread the trace as widely.",
        ),
        SpectrumFact(
            "Effective rank",
            [number(each.effective_rank) for each in spectra],
            f"Exponential of the spectrum's entropy, out of {sizes}.",
        ),
        SpectrumFact(
            "Condition number",
            [number(each.condition_number) for each in spectra],
            "Largest over smallest eigenvalue magnitude; a ridge makes the solve stable.",
        ),
        SpectrumFact(
            "Negative mass",
            [percent(each.negative_mass) for each in spectra],
            "Share of Σ|λ| that is negative: rounding for a positive semidefinite kernel, noise otherwise.",
        ),
    ]


def _gram_figures(inputs: ReportInputs) -> list[Figure]:
    if not inputs.plots or inputs.gram is None:
        return []
    shown, total = len(inputs.gram.values), inputs.kernel.num_train
    part = f"{count(shown)} of {count(total)} training examples" if shown < total else f"all {count(total)} examples"
    caption = f"The kernel of {part}, {inputs.gram.ordering}. Colours span its 1st to 99th percentile."
    return [Figure(Markup(plots.gram_figure(inputs.gram)), caption)]


def _spectrum_figures(inputs: ReportInputs) -> list[Figure]:
    if not inputs.plots or not inputs.eigenvalues:
        return []
    caption = "Eigenvalues by magnitude."
    if any((values < 0).any() for values in inputs.eigenvalues.values()):
        caption += (
            " Crosses are negative eigenvalues, shown by magnitude: where they begin, noise or rounding takes over."
        )
    return [Figure(Markup(plots.spectrum_figure(inputs.eigenvalues)), caption)]


def _regression_figures(inputs: ReportInputs) -> list[Figure]:
    if not inputs.plots or inputs.regression is None:
        return []
    rows = inputs.regression.rows
    error = Figure(
        Markup(plots.error_figure(rows)),
        "Mean squared error for every ridge. The least leave-one-out error selects the ridge (vertical line).",
    )
    if inputs.regression.task == "regression":
        return [error]
    accuracy = Figure(
        Markup(plots.accuracy_figure(rows)), "Accuracy on the test examples, and on each training example left out."
    )
    return [accuracy, error]
