"""Eigenvalues against their rank.

Axes: n eigenvalues.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from pipeline.report.inputs import ReportInputs
from pipeline.report.plots.drawing import SERIES, log_log_axes, svg
from pipeline.report.plots.plot import PageSection, Plot

_MOST_POINTS = 300


def spectrum_plot(inputs: ReportInputs) -> Plot | None:
    """Plot the eigenvalues of each statistic."""
    if not inputs.eigenvalues:
        return None
    leading = inputs.spectrum_solver is not None and inputs.spectrum_solver.method == "iterative"
    caption = "The leading eigenvalues." if leading else "Eigenvalues by magnitude."
    if any((values < 0).any() for values in inputs.eigenvalues.values()):
        caption += " Crosses mark negative ones; from the first cross on, noise or rounding dominates."
    return Plot(PageSection.SPECTRUM, spectrum_figure(inputs.eigenvalues), caption)


def spectrum_figure(eigenvalues: Mapping[str, Float[np.ndarray, " n"]]) -> str:
    """Draw magnitudes of eigenvalues against their rank by magnitude, log-log; negative ones as crosses."""

    def draw(figure: Figure) -> None:
        axes = log_log_axes(figure, "rank by magnitude", "eigenvalue magnitude (kernel unit)")
        for color, style, (statistic, values) in zip(SERIES[:2], ("-", "o"), eigenvalues.items(), strict=False):
            ranked = values[np.argsort(-np.abs(values), kind="stable")]
            indices = log_spaced(int(np.count_nonzero(ranked)))
            ranks, shown = indices + 1, ranked[indices]
            positive = shown > 0
            axes.plot(ranks[positive], shown[positive], style, color=color, markersize=2.5, label=statistic)
            if not positive.all():
                axes.plot(ranks[~positive], -shown[~positive], "x", color=SERIES[2], label=f"{statistic}, negative")
        axes.legend()

    return svg("spectrum", draw)


def log_spaced(total: int) -> np.ndarray:
    """Return at most 300 of `total` indices, evenly spaced in the logarithm, with the first and the last."""
    if total <= _MOST_POINTS:
        return np.arange(total)
    return np.unique(np.geomspace(1, total, _MOST_POINTS).round().astype(int)) - 1
