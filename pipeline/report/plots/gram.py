"""The kernel as a heat map.

Axes: k rows of the thumbnail.
"""

from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.report.formatting import count, number
from pipeline.report.inputs import ReportInputs, Thumbnail
from pipeline.report.plots.drawing import svg
from pipeline.report.plots.plot import PageSection, Plot


def gram_plot(inputs: ReportInputs) -> Plot | None:
    """Plot at most 512 rows of the kernel."""
    if inputs.gram is None:
        return None
    shown, total = len(inputs.gram.values), inputs.kernel.num_train
    part = f"{count(shown)} of {count(total)} training examples" if shown < total else f"all {count(total)} examples"
    caption = f"The kernel on {part}, {inputs.gram.ordering}. Colours span the 1st to the 99th percentile."
    return Plot(PageSection.KERNEL, gram_figure(inputs.gram), caption)


def gram_figure(thumbnail: Thumbnail) -> str:
    """Draw the kernel as a heat map, with colours from its 1st to its 99th percentile and lines between classes."""

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

    return svg("gram", draw, height=4.1)
