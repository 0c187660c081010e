"""The report page of a run: plain values in, one self-contained HTML file out."""

from pipeline.report.inputs import (
    KernelFacts,
    Provenance,
    RegressionFacts,
    ReportInputs,
    SolverFacts,
    StageTiming,
    StandardErrors,
    Thumbnail,
)
from pipeline.report.page import render_report

__all__ = [
    "KernelFacts",
    "Provenance",
    "RegressionFacts",
    "ReportInputs",
    "SolverFacts",
    "StageTiming",
    "StandardErrors",
    "Thumbnail",
    "render_report",
]
