"""The studies behind docs/estimators.md: their arithmetic, what they store, and that the page contains only its
figures.

Axes: S draws.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.driver.progress import SilentProgress
from scripts import estimators
from scripts.studies import SECTIONS, agreement, cost, coverage
from scripts.studies.cells import Answers, Cell, answer_all
from scripts.studies.facts import factors
from scripts.studies.page import page

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "estimators.md"


def ladder(law: cost.ErrorLaw, reference_error: float = 0.0) -> list[dict]:
    return [{"draws": s, "seeds": 4, "error": math.hypot(law.error(s), reference_error)} for s in (8, 16, 64, 256)]


def test_an_error_law_is_found_again_and_solved():
    law = cost.ErrorLaw(noise=30.0, signal=0.7)
    found = cost.fit_error(ladder(law, 0.01), 0.01, with_signal=True)
    assert (found.noise, found.signal) == pytest.approx((30.0, 0.7))
    assert law.error(law.draws_at(0.05)) == pytest.approx(0.05)
    pure = cost.fit_error(ladder(cost.ErrorLaw(30.0, 0.0)), 0.0, with_signal=False)
    assert (pure.noise, pure.signal) == (pytest.approx(30.0), 0.0)
    assert pure.draws_at(0.05) == pytest.approx(600.0)


def test_forward_equivalents_count_backward_passes_and_the_unperturbed_network():
    assert cost.forwards("autodiff", 16, 1) == 48
    assert cost.forwards("autodiff", 16, 10) == 336
    assert cost.forwards("activation", 16, 10) == cost.forwards("weight", 16, 10) == 17


def test_factors_compare_the_same_statistic_by_design_and_the_best_of_each():
    """Laws without a signal term: S = noise/error, here in multiples of 16, forward equivalents 3·S and S + 1."""

    def method(estimator, statistic, design, noise):
        law = {"noise": noise, "signal": 0.0}
        return {"estimator": estimator, "statistic": statistic, "design": design, "law": law}

    methods = [
        method("autodiff", "unbiased", "iid", 1.6),
        method("autodiff", "unbiased", "antithetic", 3.2),
        method("weight", "unbiased", "iid", 480.0),
        method("weight", "unbiased", "antithetic", 320.0),
        method("weight", "plugin", "iid", 48_000.0),
        method("weight", "plugin", "antithetic", 64_000.0),
    ]
    found = factors({"methods": methods}, 1, "unbiased", 0.1)
    assert found == {"iid": 4801 / 48, "antithetic": 3201 / 96, "best": 3201 / 48}
    assert factors({"methods": methods}, 1, "plugin", 0.1)["best"] == 480_001 / 48


def test_answers_are_kept_until_their_settings_change(tmp_path: Path):
    asked: list[int] = []

    def cell(number: int, draws: int) -> Cell:
        def compute() -> dict:
            if draws < 0:
                raise RuntimeError("cut off")
            asked.append(number)
            return {"value": draws}

        return Cell(f"cell {number}", {"draws": draws}, compute)

    path = tmp_path / "answers.json"
    with pytest.raises(RuntimeError, match="cut off"):
        answer_all(Answers(path), "some", [cell(0, 1), cell(1, -1)], SilentProgress())
    answer_all(Answers(path), "some", [cell(0, 1), cell(1, 2)], SilentProgress())
    assert asked == [0, 1]
    answer_all(Answers(path), "some", [cell(1, 3), cell(0, 1)], SilentProgress())
    assert asked == [0, 1, 1]
    kept = json.loads(path.read_text())["sections"]["some"]
    assert {key: one["answer"]["value"] for key, one in kept.items()} == {"cell 1": 3, "cell 0": 1}
    answer_all(Answers(path), "some", [cell(0, 1)], SilentProgress())
    assert list(Answers(path).sections["some"]) == ["cell 0"]


def test_every_question_has_a_key_and_settings_of_its_own():
    for section, cells in SECTIONS.items():
        whole = cells(quick=False)
        assert len({cell.key for cell in whole}) == len(whole), section
        assert {cell.key for cell in cells(quick=True)} <= {cell.key for cell in whole}
        json.dumps([dict(cell.settings) for cell in whole])


def test_the_table_of_agreement_holds_every_law_estimator_and_design():
    methods = {(n, law, *pair) for n in agreement.NAMES for law in agreement.LAWS for pair in agreement.valid(n, law)}
    assert {law for _, law, _, _ in methods} == set(agreement.LAWS)
    assert {estimator for _, _, estimator, _ in methods} == {"weight", "autodiff", "activation"}
    assert {design for *_, design in methods} == set(agreement.DESIGNS)
    assert ("sign network", "sphere", "activation", "iid") not in methods
    assert ("relu unit", "lowrank", "autodiff", "iid") not in methods


@pytest.mark.bench
def test_a_comparison_that_should_fail_fails():
    """Against a reference that is 5 % off, and against a correct one."""
    truth = agreement.reference("quantised network", "gaussian")
    right = agreement.examine("quantised network", "gaussian", "weight", "orthogonal", truth)
    assert right["agrees"]
    assert right["powerful"]
    wrong = agreement.Reference(1.05 * truth.kernel, truth.stderr, truth.kind, truth.local)
    assert not agreement.examine("quantised network", "gaussian", "weight", "orthogonal", wrong)["agrees"]
    near = agreement.Reference(truth.kernel, truth.stderr, truth.kind, 0.999 * truth.kernel)
    assert not agreement.examine("quantised network", "gaussian", "weight", "orthogonal", near)["powerful"]


@pytest.mark.bench
def test_coverage_of_too_narrow_intervals_is_seen():
    question = coverage.Question("relu unit", "nonlocal", "autodiff", "iid")
    centre, stderr, exact = coverage._unit(question, range(60))
    assert 0.9 < coverage.covered(centre, exact, stderr, coverage.BLOCKS).mean() < 0.99
    assert coverage.covered(centre, exact, 0.5 * stderr, coverage.BLOCKS).mean() < 0.85


def test_the_page_is_its_figures_and_nothing_else():
    """Regenerated from the JSON file beside it, character for character."""
    answers = Answers(PAGE.with_suffix(".json"))
    assert set(answers.sections) == set(SECTIONS)
    assert page(answers) == PAGE.read_text()


@pytest.mark.bench
def test_the_command_measures_a_section_keeps_it_and_writes_the_page(tmp_path: Path, monkeypatch):
    cells = {"agreement": lambda *, quick: SECTIONS["agreement"](quick=quick)[:1]}
    monkeypatch.setattr(estimators, "SECTIONS", cells)
    app = estimators.typer.Typer()
    app.command()(estimators.main)
    out = tmp_path / "page.md"
    first = CliRunner().invoke(app, ["--quick", "--only", "agreement", "--out", str(out)])
    assert first.exit_code == 0, first.output
    assert "6 of 6 comparisons agree" in out.read_text()
    assert "## Limits" not in out.read_text()
    kept = json.loads(out.with_suffix(".json").read_text())["sections"]["agreement"]
    assert all(np.isfinite(cell["seconds"]) for cell in kept.values())
    wrong = CliRunner().invoke(app, ["--only", "agreements", "--out", str(out)])
    assert wrong.exit_code == 2
    assert "--only is 'agreements'; allowed: agreement" in " ".join(wrong.output.split())
