"""The page itself: words from `facts`, figures from `plots`, laid out by `template.html.j2` and `style.css`.

One HTML file that needs nothing else: no scripts, no fonts or pictures from elsewhere. Nothing is read from disk but
the template and the style sheet beside this file; writing the page is the caller's business.
"""

from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from pipeline.report import facts, plots
from pipeline.report.formatting import count, duration, number, percent, size
from pipeline.report.inputs import ReportInputs
from pipeline.report.probe_facts import probe_facts

_TEMPLATE = "template.html.j2"
_TABLE_EIGENVALUES = 10


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
    is_regression = inputs.regression is not None and inputs.regression.task == "regression"
    return environment.get_template(_TEMPLATE).render(
        inputs=inputs,
        headline=facts.headline(inputs),
        cautions=facts.cautions(inputs),
        kernel_facts=list(facts.kernel_facts(inputs)),
        probe_facts=[] if inputs.probes is None else probe_facts(inputs.probes),
        spectrum_facts=facts.spectrum_facts(inputs.eigenvalues, inputs.spectrum_numbers),
        spectrum_note=facts.solver_note("Spectrum", inputs.spectrum_solver),
        regression_note=facts.solver_note("Regression", inputs.regression_solver),
        loo_estimated=inputs.regression is not None and inputs.regression.selected.loo_stderr is not None,
        leading={name: values[:_TABLE_EIGENVALUES] for name, values in inputs.eigenvalues.items()},
        gram_figures=_gram_figures(inputs),
        spectrum_figures=_spectrum_figures(inputs),
        regression_figures=_regression_figures(inputs),
        error_unit="squared target unit" if is_regression else "squared one-hot unit",
        longest_seconds=max((stage.wall_seconds for stage in inputs.stages), default=0.0),
    )


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
    leading = inputs.spectrum_solver is not None and inputs.spectrum_solver.method == "iterative"
    caption = "The leading eigenvalues." if leading else "Eigenvalues by magnitude."
    if any((values < 0).any() for values in inputs.eigenvalues.values()):
        caption += " Crosses are negative ones, by magnitude: where they begin, noise or rounding takes over."
    return [Figure(Markup(plots.spectrum_figure(inputs.eigenvalues)), caption)]


def _regression_figures(inputs: ReportInputs) -> list[Figure]:
    if not inputs.plots or inputs.regression is None:
        return []
    rows = inputs.regression.rows
    error_caption = (
        "Mean squared error for every ridge. The least leave-one-out error selects the ridge (vertical line)."
    )
    error = Figure(Markup(plots.error_figure(rows)), error_caption)
    if inputs.regression.task == "regression":
        return [error]
    accuracy_caption = "Accuracy on the test examples, and on each training example left out."
    return [Figure(Markup(plots.accuracy_figure(rows)), accuracy_caption), error]
