"""The plots of the page: error against forward equivalents, as SVG that is the same for the same figures.

Axes: none.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.studies.cells import Answer
from scripts.studies.cost import TARGET, ErrorLaw

# Okabe & Ito (2008): distinct for all common kinds of colour vision.
_COLORS = {
    "autodiff": "#009e73",
    "activation": "#0072b2",
    "weight, unbiased": "#d55e00",
    "weight, plugin": "#cc79a7",
}
_MARKERS = {"iid": "o", "antithetic": "^"}


def error_plot(answer: Answer, path: Path) -> None:
    """All methods of a network: measured points and the fitted law through them, dashed beyond the points."""
    with matplotlib.rc_context({"svg.hashsalt": "nntk", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.0, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for method in answer["methods"]:
            _draw(axes, method)
        axes.axhline(TARGET, color="0.4", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="forward equivalents", ylabel="relative error of the kernel")
        axes.grid(which="major", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8, loc="upper right")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw(axes: Axes, method: Answer) -> None:
    """One method."""
    name = method["estimator"]
    if name == "weight":
        name = f"weight, {method['statistic']}"
    points, law = method["points"], ErrorLaw(**method["law"])
    each = (points[-1]["forwards"] - (method["estimator"] != "autodiff")) / points[-1]["draws"]
    style: dict[str, Any] = {"color": _COLORS[name], "linewidth": 1.0}
    axes.plot(
        [point["forwards"] for point in points],
        [point["error"] for point in points],
        linestyle="",
        marker=_MARKERS[method["design"]],
        color=_COLORS[name],
        markersize=5,
        label=f"{name}, {method['design']}",
    )
    for low, high, line in (
        (points[0]["draws"], points[-1]["draws"], "-"),
        (points[-1]["draws"], method["at_target"]["draws"], ":"),
    ):
        if high > low:
            draws = np.geomspace(low, high, 60)
            axes.plot(draws * each, [law.error(s) for s in draws], linestyle=line, **style)
