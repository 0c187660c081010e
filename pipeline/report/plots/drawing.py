"""Inline SVG that takes its colours from the page, and so follows its light or dark scheme.

Figures use matplotlib's object interface: no figure registry, no lasting change of settings. They are drawn in
placeholder colours, which CSS variables replace in the text of the SVG; the style sheet defines the variables. Its
colours are from Okabe & Ito (2008) and distinct for all common kinds of colour vision; markers differ in shape as well.

Axes: none.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nntk_dist.analysis.regression.ridge_problem import RidgeRow
from pipeline.report.formatting import power_of_ten

# Placeholders for the page's CSS variables; any colours that occur nowhere else would do.
INK, FAINT = "#010203", "#040506"
SERIES = ("#070809", "#0a0b0c", "#0d0e0f")
_VARIABLES = (
    (INK, "var(--ink)"),
    (FAINT, "var(--rule)"),
    *((color, f"var(--series-{index})") for index, color in enumerate(SERIES, start=1)),
)
_WIDTH, HEIGHT = 4.6, 3.3  # inches: one column of the page, or the width of a phone


def log_log_axes(figure: Figure, x_label: str, y_label: str) -> Axes:
    """Return axes with logarithmic scales and powers of ten as ticks."""
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(powers())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True)
    return axes


def powers() -> FuncFormatter:
    """Return a formatter of ticks as powers of ten."""
    return FuncFormatter(lambda value, _: power_of_ten(round(np.log10(value))))


def ridge_axes(
    figure: Figure, rows: Sequence[RidgeRow], series: Mapping[str, Sequence[float | None]], y_label: str
) -> Axes:
    """Return axes with one line for each series against the ridge, and the selected ridge marked."""
    axes = figure.add_subplot()
    order = np.argsort([row.ridge for row in rows])
    ridges = np.array([row.ridge for row in rows])[order]
    for color, style, (name, values) in zip(SERIES, ("o-", "s--", "^:"), series.items(), strict=False):
        axes.plot(ridges, np.array(values, dtype=float)[order], style, color=color, label=name)
    chosen = next(row.ridge for row in rows if row.selected)
    axes.axvline(chosen, color=INK, linewidth=0.8, alpha=0.6, label="selected", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(powers())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ridge, relative to the kernel's mean diagonal")
    axes.set_ylabel(y_label)
    axes.grid(True, axis="y")
    axes.legend()
    return axes


def _style(name: str) -> dict[Any, Any]:
    """The drawing settings for one figure."""
    return {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": name,
        "font.size": 9,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
    }


def svg(name: str, draw: Callable[[Figure], None], height: float = HEIGHT) -> str:
    """Draw a figure and return it as an `<svg>` element with the page's colours.

    Ids are hashes salted with `name`: the same in every run, and different in every figure of a page.
    """
    with matplotlib.rc_context(_style(name)):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", dpi=220, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", text)
    for color, variable in _VARIABLES:
        text = text.replace(color, variable)
    return text
