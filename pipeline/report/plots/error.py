"""Errors against the ridge.

Axes: none.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nntk_dist.analysis.regression.ridge_problem import RidgeRow
from pipeline.report.formatting import number
from pipeline.report.inputs import ReportInputs
from pipeline.report.plots.drawing import powers, ridge_axes, svg
from pipeline.report.plots.plot import PageSection, Plot


def error_plot(inputs: ReportInputs) -> Plot | None:
    """Plot the mean squared errors of a regression."""
    if inputs.regression is None:
        return None
    caption = "Mean squared error for every ridge. The smallest leave-one-out error selects the ridge (vertical line)."
    return Plot(PageSection.REGRESSION, error_figure(inputs.regression.rows), caption)


def error_figure(rows: Sequence[RidgeRow]) -> str:
    """Draw test, leave-one-out and training error against the ridge; logarithmic if they span more than a decade."""
    series = {
        "test": [row.test_error for row in rows],
        "leave-one-out": [row.loo_error for row in rows],
        "training": [row.train_error for row in rows],
    }

    def draw(figure: Figure) -> None:
        axes = ridge_axes(figure, rows, series, "mean squared error (target unit²)")
        errors = np.array([(row.test_error, row.loo_error, row.train_error) for row in rows])
        # A small ridge interpolates: its training error, decades below the others, would flatten the other curves.
        lowest, highest = max(errors.min(), errors[:, :2].min() / 100), errors.max()
        if lowest > 0 and highest > 10 * lowest:
            axes.set_yscale("log")
            axes.set_ylim(lowest / 1.5, highest * 1.5)
            axes.yaxis.set_major_formatter(powers())
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))

    return svg("error", draw)
