"""Accuracy against the ridge.

Axes: none.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nntk_dist.analysis.regression.ridge_problem import RidgeRow
from pipeline.report.formatting import percent
from pipeline.report.inputs import ReportInputs
from pipeline.report.plots.drawing import ridge_axes, svg
from pipeline.report.plots.plot import PageSection, Plot


def accuracy_plot(inputs: ReportInputs) -> Plot | None:
    """Plot the accuracies of a classification."""
    if inputs.regression is None or inputs.regression.num_classes is None:
        return None
    caption = "Accuracy for every ridge: on the test examples, and leave-one-out on the training examples."
    return Plot(PageSection.REGRESSION, accuracy_figure(inputs.regression.rows), caption)


def accuracy_figure(rows: Sequence[RidgeRow]) -> str:
    """Draw test and leave-one-out accuracy against the ridge."""
    series = {"test": [row.test_accuracy for row in rows], "leave-one-out": [row.loo_accuracy for row in rows]}

    def draw(figure: Figure) -> None:
        axes = ridge_axes(figure, rows, series, "accuracy (share of examples)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))

    return svg("accuracy", draw)
