"""The report's figures: inline SVG that takes its colours from the page, and so follows its light or dark scheme.

Drawn with matplotlib's object interface; no figure registry, no lasting change of settings. Colours are drawn as marker
values and replaced by CSS variables in the text of the SVG: the page decides what "series-1" looks like. The variables
hold colours of Okabe & Ito (2008) that all common kinds of colour vision tell apart; markers differ in shape as well.

Axes: n eigenvalues, k rows of the Gram thumbnail.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nntk_dist.analysis.regression.ridge_problem import RidgeRow
from pipeline.report.formatting import number, percent, power_of_ten
from pipeline.report.inputs import Thumbnail

# Stand-ins for the page's CSS variables: any colours that occur nowhere else would do.
INK, FAINT = "#010203", "#040506"
SERIES = ("#070809", "#0a0b0c", "#0d0e0f")
_VARIABLES = (
    (INK, "var(--ink)"),
    (FAINT, "var(--rule)"),
    *((color, f"var(--series-{index})") for index, color in enumerate(SERIES, start=1)),
)
_WIDTH, _HEIGHT = 4.6, 3.3  # inches: one column of the page, or the width of a phone
_MOST_POINTS = 300


def gram_figure(thumbnail: Thumbnail) -> str:
    """Heat map of the kernel, colours from its 1st to its 99th percentile, classes divided by lines."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = np.ma.masked_invalid(thumbnail.values)
        known = values.compressed()
        low, high = np.percentile(known, [1, 99]) if known.size else (0.0, 1.0)
        num_rows = len(thumbnail.values)
        image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, interpolation="none")
        for boundary in thumbnail.boundaries:
            axes.axhline(boundary - 0.5, color="white", linewidth=0.5, alpha=0.8)
            axes.axvline(boundary - 0.5, color="white", linewidth=0.5, alpha=0.8)
        if thumbnail.labels:
            edges = [0, *thumbnail.boundaries, num_rows]
            centres = [(start + stop - 1) / 2 for start, stop in pairwise(edges)]
            axes.set_xticks(centres, thumbnail.labels)
            axes.set_yticks(centres, thumbnail.labels)
            axes.tick_params(length=0)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        axes.set_xlabel(f"training example, {thumbnail.ordering}")
        axes.set_ylabel(f"training example, {thumbnail.ordering}")
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.82, pad=0.03)
        bar.outline.set_visible(False)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)  # one small picture instead of 256 rectangles
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        bar.set_label("kernel value")

    return _svg("gram", draw, height=4.1)


def spectrum_figure(eigenvalues: Mapping[str, Float[np.ndarray, " n"]]) -> str:
    """Magnitudes of eigenvalues against their rank by magnitude, log-log; negative ones as crosses."""

    def draw(figure: Figure) -> None:
        axes = _log_log_axes(figure, "rank by magnitude", "eigenvalue magnitude (kernel unit)")
        for color, style, (statistic, values) in zip(SERIES[:2], ("-", "o"), eigenvalues.items(), strict=False):
            ranked = values[np.argsort(-np.abs(values), kind="stable")]
            indices = log_spaced(int(np.count_nonzero(ranked)))
            ranks, shown = indices + 1, ranked[indices]
            positive = shown > 0
            axes.plot(ranks[positive], shown[positive], style, color=color, markersize=2.5, label=statistic)
            if not positive.all():
                axes.plot(ranks[~positive], -shown[~positive], "x", color=SERIES[2], label=f"{statistic}, negative")
        axes.legend()

    return _svg("spectrum", draw)


def accuracy_figure(rows: Sequence[RidgeRow]) -> str:
    """Test and leave-one-out accuracy against the ridge."""
    series = {"test": [row.test_accuracy for row in rows], "leave-one-out": [row.loo_accuracy for row in rows]}

    def draw(figure: Figure) -> None:
        axes = _ridge_axes(figure, rows, series, "accuracy (share of examples)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))

    return _svg("accuracy", draw)


def error_figure(rows: Sequence[RidgeRow]) -> str:
    """Test, leave-one-out and training error against the ridge; logarithmic where they span more than a decade."""
    series = {
        "test": [row.test_error for row in rows],
        "leave-one-out": [row.loo_error for row in rows],
        "training": [row.train_error for row in rows],
    }

    def draw(figure: Figure) -> None:
        axes = _ridge_axes(figure, rows, series, "mean squared error (target unit²)")
        errors = np.array([(row.test_error, row.loo_error, row.train_error) for row in rows])
        # A small ridge interpolates: its training error, many decades down, would flatten the curves that matter.
        lowest, highest = max(errors.min(), errors[:, :2].min() / 100), errors.max()
        if lowest > 0 and highest > 10 * lowest:
            axes.set_yscale("log")
            axes.set_ylim(lowest / 1.5, highest * 1.5)
            axes.yaxis.set_major_formatter(_powers())
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))

    return _svg("error", draw)


def log_spaced(total: int) -> np.ndarray:
    """At most a few hundred indices out of `total`, evenly spread in the logarithm, first and last included."""
    if total <= _MOST_POINTS:
        return np.arange(total)
    return np.unique(np.geomspace(1, total, _MOST_POINTS).round().astype(int)) - 1


def _log_log_axes(figure: Figure, x_label: str, y_label: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_powers())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True)
    return axes


def _powers() -> FuncFormatter:
    return FuncFormatter(lambda value, _: power_of_ten(round(np.log10(value))))


def _ridge_axes(
    figure: Figure, rows: Sequence[RidgeRow], series: Mapping[str, Sequence[float | None]], y_label: str
) -> Axes:
    axes = figure.add_subplot()
    order = np.argsort([row.ridge for row in rows])
    ridges = np.array([row.ridge for row in rows])[order]
    for color, style, (name, values) in zip(SERIES, ("o-", "s--", "^:"), series.items(), strict=False):
        axes.plot(ridges, np.array(values, dtype=float)[order], style, color=color, label=name)
    chosen = next(row.ridge for row in rows if row.selected)
    axes.axvline(chosen, color=INK, linewidth=0.8, alpha=0.6, label="selected", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_powers())
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


def _svg(name: str, draw: Callable[[Figure], None], height: float = _HEIGHT) -> str:
    """Draw a figure and give it as an `<svg>` element with the page's colours.

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
