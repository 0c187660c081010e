"""The HTML page: text from `facts`, figures from `plots`, layout from `template.html.j2` and `style.css`.

The page is one self-contained HTML file without scripts, external fonts or external pictures. This module reads only
the template and the style sheet next to it; the caller writes the page.
"""

from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from pipeline.report import facts
from pipeline.report.formatting import count, duration, number, percent, size
from pipeline.report.inputs import ReportInputs
from pipeline.report.plots import PLOTS
from pipeline.report.plots.plot import PageSection
from pipeline.report.probe_facts import probe_facts

_TEMPLATE = "template.html.j2"
_TABLE_EIGENVALUES = 10


@dataclass(frozen=True)
class Figure:
    """One figure: its SVG and its caption."""

    svg: Markup
    caption: str


def render_report(inputs: ReportInputs) -> str:
    """Return the whole `index.html` as a string; equal inputs give equal strings.

    The page leaves out plots that `inputs.plots` does not name or that show numbers the run lacks; it keeps all text.
    Cost: about a second for the figures, for any size of kernel.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=count, duration=duration, number=number, percent=percent, size=size)
    figures = _figures(inputs)
    is_regression = inputs.regression is not None and inputs.regression.num_classes is None
    return environment.get_template(_TEMPLATE).render(
        inputs=inputs,
        headline=facts.headline(inputs),
        cautions=facts.cautions(inputs),
        kernel_facts=list(facts.kernel_facts(inputs)),
        probe_facts=[] if inputs.probes is None else probe_facts(inputs.probes),
        spectrum_facts=facts.spectrum_facts(inputs.eigenvalues, inputs.spectrum_numbers),
        spectrum_note=facts.solver_note("Spectrum", inputs.spectrum_solver),
        regression_note=facts.regression_note(inputs),
        loo_estimated=inputs.regression is not None and inputs.regression.selected.loo_stderr is not None,
        leading={name: values[:_TABLE_EIGENVALUES] for name, values in inputs.eigenvalues.items()},
        gram_figures=figures[PageSection.KERNEL],
        spectrum_figures=figures[PageSection.SPECTRUM],
        regression_figures=figures[PageSection.REGRESSION],
        further_figures=figures[PageSection.FURTHER],
        error_unit="squared target unit" if is_regression else "squared one-hot unit",
        longest_seconds=max((stage.wall_seconds for stage in inputs.stages), default=0.0),
    )


def _figures(inputs: ReportInputs) -> dict[PageSection, list[Figure]]:
    """The plots of the page by section, without those that the run lacks."""
    figures: dict[PageSection, list[Figure]] = {section: [] for section in PageSection}
    for name in inputs.plots:
        plot = PLOTS.get(name)(inputs)
        if plot is not None:
            figures[plot.section].append(Figure(Markup(plot.svg), plot.caption))
    return figures
