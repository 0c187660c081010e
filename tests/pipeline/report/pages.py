"""A run with every part of a report, and a reader of report pages."""

from html.parser import HTMLParser

import numpy as np

from nntk_dist.analysis.regression.ridge_problem import RidgeRow
from pipeline.report import (
    KernelFacts,
    Provenance,
    RegressionFacts,
    ReportInputs,
    StageTiming,
    StandardErrors,
    Thumbnail,
)

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects text and ids, and refuses tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.words, self.ids, self.links = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def ridge_rows(selected, accuracy=True):
    return tuple(
        RidgeRow(
            ridge=ridge,
            absolute_ridge=126 * ridge,
            loo_error=0.02 + ridge,
            loo_accuracy=0.96 if accuracy else None,
            train_error=ridge**2,
            test_error=0.0625,
            test_accuracy=0.975 if accuracy else None,
            selected=ridge == selected,
        )
        for ridge in (1e-4, 1e-2, 1.0)
    )


def whole_digits() -> ReportInputs:
    """A finished nonlocal classification run with both statistics, with every plot."""
    values = np.linspace(0, 1, 30)[:, None] + np.linspace(0, 1, 30)
    return ReportInputs(
        title="digits <1437>",
        data="sklearn:digits",
        model="mlp, widths 256, 256",
        kernel=KernelFacts(
            kind="nonlocal",
            estimator="autodiff",
            estimator_reason="no jump was found",
            statistic="both",
            outputs="trace",
            num_train=1437,
            num_test=360,
            num_parameters=85002,
            num_draws=16,
            num_blocks=8,
            distribution="gaussian, γ = 0.05",
            relative_error=0.017,
            relative_bias=0.081,
        ),
        provenance=Provenance(
            created="2025-11-03 14:22 UTC",
            git_commit="2c38c83f",
            fingerprints={"kernel": "9f2c77"},
            seeds={"kernel": 41},
            versions={"torch": "2.13.0"},
            config_yaml="name: digits\nmodel: {builder: '<mlp>'}\n",
            commands=(("Again:", "nntk run digits.yaml --set kernel.seed=41"),),
        ),
        gram=Thumbnail(values, "ordered by class", boundaries=(10, 20), labels=("0", "1", "2")),
        eigenvalues={"plugin": np.geomspace(900, 1, 1437), "unbiased": np.linspace(800, -300, 1437)},
        regression=RegressionFacts(ridge_rows(selected=1e-2), num_classes=10),
        standard_errors=StandardErrors(0.31, 0.62, 2.2, 126.0),
        stages=(
            StageTiming("gram", 3, 14.2, 26.5, 33 << 20, 820 << 20),
            StageTiming("test", 2, 4.0, 7.5, 1 << 20, 1 << 30),
        ),
    )
