"""The benchmarks behind docs/performance.md: turns and best times, the text of figures, the page and its figures.

Axes: none.
"""

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from scripts import bench
from scripts.benchmarks import NEEDS_DATA, NEEDS_GPU, SECTIONS, end_to_end
from scripts.benchmarks.figures import Figure, answer, best_seconds
from scripts.benchmarks.page import SECTION_ORDER, page
from scripts.benchmarks.runs import proportional_bytes
from scripts.studies.cells import Answers

REPOSITORY = Path(__file__).parents[2]
APP = typer.Typer()
APP.command()(bench.main)
COMMIT = "0123456789abcdef0-dirty"
PAGE = REPOSITORY / "docs" / "performance.md"


def kept(tmp_path: Path, *figures: Figure) -> Answers:
    """Answers of one cell, as a run stores them."""
    cell = {"settings": {}, "answer": answer(*figures), "seconds": 1.0, "commit": COMMIT, "machine": "m"}
    path = tmp_path / "performance.json"
    path.write_text(json.dumps({"versions": {"torch": "2"}, "sections": {"perturb": {"one": cell}}}))
    return Answers(path)


def test_a_page_tells_what_was_missed(tmp_path):
    text = page(
        kept(
            tmp_path,
            Figure("fast", 0.95, least=0.9),
            Figure("slow", 0.85, least=0.9, details={"seconds": 0.123456}),
            Figure("large", 1.3, least=0.75, most=1.25),
            Figure("free", 12345.6),
        )
    )
    assert "| fast | 0.95 | ≥ 0.9 |  |" in text
    assert "| slow | **0.85** | ≥ 0.9, missed | seconds 0.123 |" in text
    assert "| large | **1.3** | ≥ 0.75, ≤ 1.25, missed |" in text
    assert "| free | 12,346 |  |" in text
    assert "commits 0123456789abcdef-dirty." in text


def test_actions_take_turns_and_the_best_time_counts(monkeypatch):
    order: list[str] = []
    now = 0.0

    def action(name: str, seconds: list[float]) -> None:
        nonlocal now
        order.append(name)
        now += seconds.pop(0)

    monkeypatch.setattr("scripts.benchmarks.figures.time", SimpleNamespace(perf_counter=lambda: now))
    first, second = [1.0, 4.0, 8.0], [32.0, 16.0, 2.0]
    best = best_seconds({"a": lambda: action("a", first), "b": lambda: action("b", second)}, rounds=2)
    assert order == ["a", "b"] * 3
    assert best == {"a": 4.0, "b": 2.0}  # neither the first round's nor the slower of the others


def test_every_section_has_its_place_on_the_page(tmp_path):
    assert sorted(SECTION_ORDER) == sorted(SECTIONS)
    one = kept(tmp_path, Figure("a figure", 1.0))
    one.sections = dict.fromkeys(SECTIONS, one.sections["perturb"])
    assert page(one).count("| a figure | 1 |") == len(SECTIONS)


def test_the_page_is_rendered_from_its_figures():
    assert PAGE.read_text() == page(Answers(PAGE.with_suffix(".json")))


@pytest.mark.bench
def test_a_quick_run_measures_prints_and_keeps(tmp_path):
    out = tmp_path / "page.md"
    done = CliRunner().invoke(APP, ["--quick", "--only", "perturb", "--out", str(out)])
    assert done.exit_code == 0, done.output
    measured = Answers(out.with_suffix(".json")).sections["perturb"].values()
    figures = [figure for cell in measured for figure in cell["answer"]["figures"]]
    assert len(figures) >= 2
    assert all(figure["value"] > 0 for figure in figures)
    assert out.read_text().count("| mlp") == len(figures)


def test_what_is_not_a_section_and_what_lacks_its_data_is_refused(tmp_path):
    wrong = CliRunner().invoke(APP, ["--only", "perturbed", "--out", str(tmp_path / "page.md")])
    assert wrong.exit_code == 2
    assert "allowed: " + ", ".join(SECTIONS) in " ".join(wrong.output.split())
    lacking = CliRunner().invoke(APP, ["--only", "end-to-end", "--out", str(tmp_path / "page.md")])
    assert lacking.exit_code == 2
    assert "--data is missing" in lacking.output


def test_without_data_or_a_gpu_what_needs_them_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SECTIONS", {name: (lambda **_: []) for name in SECTIONS})
    measured = []
    monkeypatch.setattr(bench, "answer_all", lambda answers, name, *_, **__: measured.append(name))
    arguments = ["--out", str(tmp_path / "page.md")]
    for gpu, data in itertools.product((False, True), repeat=2):
        measured.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        done = CliRunner().invoke(APP, [*arguments, *(["--data", "idx:mnist"] if data else [])])
        assert done.exit_code == 0, done.output
        missing = {*(() if data else NEEDS_DATA), *(() if gpu else NEEDS_GPU)}
        assert measured == [name for name in SECTIONS if name not in missing]
        assert all(name in done.output for name in missing)


@pytest.mark.bench
def test_how_far_a_kernel_is_from_the_local_one(monkeypatch, tmp_path):
    """On digits: hardly at a tiny γ, and by much more than its error at a large one."""
    config = tmp_path / "configs" / "digits.yaml"
    config.parent.mkdir()
    text = (REPOSITORY / "configs" / "digits.yaml").read_text()
    monkeypatch.setattr(end_to_end, "ROOT", tmp_path)
    figures = []
    for gamma in ("1.0e-5", "0.2"):
        config.write_text(text.replace("gamma: 0.05", f"gamma: {gamma}"))
        figures += end_to_end._compare("digits", "sklearn:digits", 64)["figures"]
    near, far = figures
    assert near["value"] < 1e-3
    assert far["value"] > 5 * far["details"]["relative error of the nonlocal kernel"]
    assert far["details"]["distance after the best factor"] < far["value"]


@pytest.mark.parametrize("case", end_to_end.CASES)
def test_configurations_of_whole_runs_are_there(case):
    assert (REPOSITORY / "configs" / f"{case.config}.yaml").exists()


def test_memory_of_a_process_is_counted_with_its_children_and_of_none_is_nothing():
    assert proportional_bytes(os.getpid()) > 1 << 20
    assert proportional_bytes(2**22 + 1) == 0
