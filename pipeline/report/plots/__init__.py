"""The plots of the report page, one a file; the table names them in the order of the page.

A plot is a function of `ReportInputs` that returns a `Plot`, or None if the run lacks its numbers. To add one, write
the function and add one line here; from another package, name it `python:module:function` in `report.plots`.
"""

from collections.abc import Callable
from typing import Any

from nntk_dist.registration.registry import Registry

PLOTS: Registry[Callable[[Any], Any]] = Registry(
    "plot",
    "nntk_dist.plots",
    {
        "gram": "pipeline.report.plots.gram:gram_plot",
        "spectrum": "pipeline.report.plots.spectrum:spectrum_plot",
        "accuracy": "pipeline.report.plots.accuracy:accuracy_plot",
        "error": "pipeline.report.plots.error:error_plot",
    },
)
