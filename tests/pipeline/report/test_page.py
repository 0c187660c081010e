"""The report page: its content for each kind of run, that it needs no other file, and that its markup is valid."""

import re
from dataclasses import replace

import numpy as np
import pytest

from nntk_dist import ModelProbes
from nntk_dist.errors import NNTKError
from pipeline.report import (
    KernelFacts,
    RegressionFacts,
    ReportInputs,
    SolverFacts,
    Thumbnail,
    render_report,
)
from tests.pipeline.report.pages import Page, ridge_rows, whole_digits


@pytest.fixture(scope="module")
def html():
    """The run's page with every plot; plots take most of the time."""
    return render_report(whole_digits())


@pytest.fixture
def digits():
    """The same run without plots, for tests of the page's text."""
    return replace(whole_digits(), plots=())


def test_the_page_stands_alone_and_its_markup_nests(html):
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"<script|@import|url\(\s*['\"]?http", html)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_the_same_inputs_give_the_same_page(html):
    assert render_report(whole_digits()) == html


def test_figures_take_their_colours_from_the_page(html):
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert "var(--ink)" in figure
        assert not re.search(r"(fill|stroke): #0[0-9a-f]0", figure)  # an unreplaced placeholder
    for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", html)):
        assert html.count(f"{variable}: #") == 2, variable  # one colour for the light scheme and one for the dark


def test_headline_numbers_carry_units_and_meanings(digits):
    text = Page(render_report(digits)).text
    assert (
        "Test accuracy 97.5 % Share of 360 test examples classified correctly; binomial standard error 0.82 points"
        in text
    )
    assert "Guessing among 10 classes gives 10 %" in text
    assert "Selected ridge 0.01 Relative to the kernel's mean diagonal; 1.26 in the kernel's unit" in text
    assert "Kernel error 1.7 % Estimated relative error of the unbiased kernel" in text
    assert "Plugin bias 8.1 % ‖plugin − unbiased‖ / ‖unbiased‖" in text
    assert "Parameters P 85,002" in text
    assert "Draws S 16 in 8 blocks" in text
    assert "Estimator autodiff No jump was found" in text
    assert "Standard error of an entry 0.31 Median over the resolved train entries" in text


def test_errors_of_some_rows_say_so(digits):
    some = replace(digits, standard_errors=replace(digits.standard_errors, num_rows=26))
    assert "Median over the resolved train entries of the first 26 rows, in" in Page(render_report(some)).text


def test_cautions_say_what_could_be_misread(digits):
    text = Page(render_report(digits)).text
    assert "Noise inflates the plugin kernel: its bias is 8.1 %. Solve with gram" in text
    assert (
        "of the unbiased spectrum's mass is negative, which is noise. Do not rely on eigenvalues that are no larger in"
        in text
    )
    assert "selected ridge" not in text.split("Kernel ridge regression")[0].split("gram_unbiased. More draws")[1]
    assert "unresolved:" not in text
    assert "Single entries are uncertain" not in text


def test_a_requested_accuracy_is_shown_with_a_caution_if_it_was_not_reached(digits):
    reached = replace(digits.kernel, accuracy="rtol 0.1 is reached: bound 0.08", accuracy_reached=True)
    page = Page(render_report(replace(digits, kernel=replace(reached, relative_error_bound=0.0812))))
    assert (
        "Requested accuracy reached By a 95 % bound on a sample of rows: rtol 0.1 is reached: bound 0.08." in page.text
    )
    assert "With 95 % confidence the actual error is below 8.12 %." in page.text
    assert "did not reach the requested accuracy" not in page.text
    missed = replace(digits.kernel, accuracy="rtol 0.1 is not reached: bound 0.2", accuracy_reached=False)
    page = Page(render_report(replace(digits, kernel=missed)))
    assert "Requested accuracy not reached" in page.text
    assert "The kernel did not reach the requested accuracy: rtol 0.1 is not reached: bound 0.2." in page.text
    assert "Requested accuracy" not in Page(render_report(digits)).text


def test_cautions_of_a_worse_run(digits):
    worse = replace(
        digits,
        kernel=replace(digits.kernel, relative_error=0.6, relative_bias=0.01, unresolved_share=0.125),
        regression=RegressionFacts(ridge_rows(selected=1.0), 10),
    )
    text = Page(render_report(worse)).text
    assert "Single entries are uncertain: the kernel's estimated error is 60 %" in text
    assert "12.5 % of the entries are unresolved: no draw changed the model's output there" in text
    assert "The selected ridge, 1, is the largest of those tried; the best one may be larger" in text
    assert "Noise inflates the plugin kernel" not in text


def test_spectrum_numbers_are_those_of_the_eigenvalues(digits):
    page = Page(render_report(replace(digits, eigenvalues={"plugin": np.array([3.0, 1.0, 0.0])})))
    assert "Trace Sum of the eigenvalues, in the kernel's unit. 4 Participation ratio" in page.text
    assert "with the same trace and the same sum of squares. 1.6 Effective rank" in page.text
    assert "a ridge keeps the solve stable. ∞ Negative mass" in page.text


def test_an_exact_spectrum_from_a_factor_shows_the_numbers_that_were_found(digits):
    known = {"trace": 4.0, "participation_ratio": 1.6, "effective_rank": 1.75, "condition_number": np.inf}
    exact = replace(
        digits,
        eigenvalues={"plugin": np.array([3.0, 1.0])},
        spectrum_numbers={"plugin": known | {"negative_mass": 0.0}},
        spectrum_solver=SolverFacts("factored", columns=2048),
        regression_solver=SolverFacts("factored", columns=2048),
    )
    text = Page(render_report(exact)).text
    assert "Spectrum: exact, from the kernel's factor with 2,048 columns; eigenvalues beyond its rank are zero." in text
    assert "Regression: exact, from the kernel's factor with 2,048 columns" in text
    assert "a ridge keeps the solve stable. ∞ Negative mass" in text
    assert "from all others, exactly. It alone selects the ridge" in text


def test_leading_eigenvalues_and_estimates_say_what_they_are(digits):
    estimated = {"loo_stderr": 0.0012, "solve_residual": 3e-4, "rounding_error": 2.5e-3}
    rows = [replace(row, **estimated) for row in ridge_rows(selected=1e-2)]
    leading = replace(
        digits,
        regression=RegressionFacts(rows, 10),
        eigenvalues={"plugin": np.array([3.0, 1.0])},
        spectrum_numbers={"plugin": {"trace": 9.0, "participation_ratio": 2.5}},
        spectrum_solver=SolverFacts("iterative", passes=17, converged=True),
        regression_solver=SolverFacts("iterative", passes=43, converged=False),
        plots=("spectrum",),
    )
    text = Page(render_report(leading)).text
    assert "Spectrum: solved iteratively in 17 passes over the stored kernel; its table has the residuals." in text
    assert "in the kernel's unit. 9 Participation ratio" in text
    assert "out of 2. needs all eigenvalues Condition number" in text
    assert "The leading eigenvalues." in text
    assert "exactly for a sample of them, which gives an estimate with its standard error. It alone selects" in text
    assert "0.03 ± 0.0012" in text
    assert "Chosen for the smallest estimated leave-one-out error on the training examples" in text
    assert (
        "The iteration for the regression stopped before it reached its tolerance; its table has the residuals." in text
    )
    assert "The iteration for the spectrum" not in text
    moves = "predictions at the selected ridge by up to about 0.25 % of the targets' root mean square."
    assert f"Rounding of the kernel's entries moves {moves}" in text
    assert "Rounding of the kernel's stored entries moves predictions at ridge 0.01 by up to about 0.25 %" in text
    assert "the spectrum stopped before" not in Page(render_report(digits)).text


def test_timings_carry_units_and_a_total(digits):
    text = Page(render_report(digits)).text
    assert "gram 3 14 s 26 s 33.0 MiB 820 MiB" in text
    assert "all 5 18 s 34 s 34.0 MiB 1.0 GiB" in text


def test_provenance_is_on_the_page(digits):
    text = Page(render_report(digits)).text
    for expected in (
        "kernel 41",
        "torch 2.13.0",
        "2c38c83f",
        "kernel 9f2c77",
        "nntk run digits.yaml --set kernel.seed=41",
    ):
        assert expected in text
    without = replace(digits, provenance=replace(digits.provenance, git_commit=None))
    assert "Git commit: not run from a git working tree" in Page(render_report(without)).text


def test_markup_in_names_and_configuration_is_escaped(html):
    assert "digits &lt;1437&gt;" in html
    assert "<mlp>" not in html
    assert "<1437>" not in html


def test_without_plots_the_numbers_stay(digits):
    html = render_report(digits)
    assert "<svg" not in html
    text = Page(html).text
    assert "Test accuracy 97.5 %" in text
    assert "0.01 (selected) 1.26 10⁻⁴ 0.03 0.0625 96 % 97.5 %" in text


def test_a_regression_task_shows_errors_and_no_accuracy(digits):
    rows = ridge_rows(selected=1e-2, accuracy=False)
    plots = ("accuracy", "error")
    html = render_report(replace(digits, regression=RegressionFacts(rows), plots=plots))
    text = Page(html).text
    assert (
        "Test error 0.0625 Mean squared error over 360 test examples, in squared target units; its root is 0.25" in text
    )
    assert "accuracy" not in text
    assert html.count("<svg") == 1  # no accuracies to plot


def test_a_local_kernel_has_no_error_bars(digits):
    facts = KernelFacts(
        kind="local",
        estimator="autodiff",
        estimator_reason="the only one",
        statistic="plugin",
        outputs="trace",
        num_train=30,
        num_test=10,
        num_parameters=7,
    )
    values = {"local": np.array([2.0, 1.0])}
    local = replace(digits, kernel=facts, standard_errors=None, eigenvalues=values, plots=("spectrum",))
    text = Page(render_report(local)).text
    assert "Kernel error none The local kernel comes from automatic differentiation, without sampling" in text
    for absent in ("Plugin bias", "Draws S", "Standard error of an entry", "inflated by noise", "Perturbations"):
        assert absent not in text


PROBES = ModelProbes(
    repeat_change=0.0,
    batch_change=2.5e-7,
    jump_residual=0.0031,
    jump_gradients=24,
    jump_size=0.0,
    change_size=0.5,
    noise_size=2e-7,
    noise_measured=True,
    training_modules=("2 BatchNorm2d", "1 Dropout"),
)


def test_probes_have_a_table_of_their_own(digits):
    text = Page(render_report(replace(digits, probes=PROBES))).text
    table = text.split("Probes of the model")[1].split("Spectrum")[0]
    for label, value, verdict in (
        ("Same again", "change 0", "deterministic"),
        ("Other batch", "change 2.5 × 10⁻⁷", "independent of its batch, to rounding"),
        ("Jumps in θ", "0.31 % missed; up to 24 gradients a segment", "locally Lipschitz: gradients may be used"),
        ("Noise floor", "4 × 10⁻⁵ %", "differences stand above rounding"),
        ("Training mode", "2 BatchNorm2d, 1 Dropout", "evaluated in eval mode"),
    ):
        assert re.search(f"{label} .*{re.escape(value)} {re.escape(verdict)}", table), label
    assert "Probes of the model" not in Page(render_report(digits)).text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"repeat_change": 1e-8}, "change 10⁻⁸ repeats to rounding, not to the bit"),
        ({"batch_change": None}, "not probed a single example has no other batch"),
        ({"jump_residual": 0.4}, "at least 40 % missed; up to 24 gradients a segment gradients are wrong"),
        ({"jump_size": 0.25}, "0.31 % missed; up to 24 gradients a segment; a jump of 25 % of the range jumps"),
        ({"jump_residual": None}, "no change of f; up to 24 gradients a segment no gradient to trust"),
        (dict.fromkeys(("jump_residual", "jump_gradients", "jump_size")), "not probed the choice of estimator does"),
        ({"noise_size": 0.01}, "2 % too high for differences; none are used"),
        ({"noise_size": 0.01, "cautions": ("rounding is 0.02 of it",)}, "2 % too high for differences Training mode"),
        ({"change_size": 0.0}, "nothing but noise too high for differences"),
        ({"noise_size": 1e-9, "noise_measured": False}, "2 × 10⁻⁷ % (estimated) differences stand above rounding"),
        ({"change_size": 0.0, "noise_size": 0.0}, "no change of f nothing to measure"),
        (dict.fromkeys(("change_size", "noise_size", "noise_measured")), "not probed no perturbations, not finite"),
        ({"training_modules": ()}, "no module that is known to differ eval mode, the same as training mode"),
    ],
)
def test_every_verdict_of_a_probe(changes, expected, digits):
    text = Page(render_report(replace(digits, probes=replace(PROBES, **changes)))).text
    assert expected in text.split("Probes of the model")[1]
    cautioned = "Rounding is 0.02 of it." in text.split("Probes of the model")[0]
    assert cautioned == bool(changes.get("cautions"))


def test_the_least_a_report_can_have(digits):
    least = ReportInputs(
        title="least", data="npz:x.npz", model="cnn", kernel=digits.kernel, provenance=digits.provenance
    )
    html = render_report(least)
    text = Page(html).text
    assert "<svg" not in html
    for absent in ("Spectrum", "Kernel ridge regression", "Time and resources"):
        assert absent not in text


def test_a_thumbnail_with_unwritten_entries_and_no_classes_is_drawn(digits):
    values = np.full((6, 6), np.nan)
    html = render_report(replace(digits, gram=Thumbnail(values, "as stored"), plots=("gram",)))
    assert "training example, as stored" in html


PLOT = """
from pipeline.report.plots.plot import PageSection, Plot

def note(inputs):
    return Plot(PageSection.FURTHER, "<svg><text>my own</text></svg>", f"Of {inputs.title}.")

def nothing(inputs):
    return None
"""


def test_a_plot_of_a_users_module(digits, html, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_plots.py").write_text(PLOT)
    chosen = ("python:my_plots:note", "python:my_plots:nothing", "spectrum")
    own = render_report(replace(digits, plots=chosen))
    assert own.count("<svg") == 2
    assert "Further plots my own Of digits <1437>." in Page(own).text
    assert "Further plots" not in Page(html).text
    with pytest.raises(
        NNTKError, match="plot is 'gramm'; allowed: gram, spectrum, accuracy, error, python:module:name"
    ):
        render_report(replace(digits, plots=("gramm",)))
