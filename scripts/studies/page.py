"""The page: Markdown and plots from the answers alone, so that no number on it was typed by hand.

It formats and counts, and only decides whether a figure meets its target. Nothing is measured here.

Axes: none.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.studies.cells import Answer, Answers
from scripts.studies.facts import (
    accuracy_facts,
    agreement_facts,
    cost_facts,
    coverage_facts,
    limits_facts,
    reduction_facts,
)
from scripts.studies.plots import error_plot

_FACTS: Mapping[str, Callable[[dict[str, Answer]], Answer]] = MappingProxyType(
    {
        "agreement": agreement_facts,
        "coverage": coverage_facts,
        "cost": cost_facts,
        "reduction": reduction_facts,
        "accuracy": accuracy_facts,
        "limits": limits_facts,
    }
)
_MOST_COMMITS = 3


def write_page(answers: Answers, path: Path) -> None:
    """Write the page at `path` and its plots into the folder `images` beside it."""
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for key, cell in answers.sections.get("cost", {}).items():
        error_plot(cell["answer"], images / image_name(key))
    path.write_text(page(answers))


def image_name(key: str) -> str:
    """The file of a network's plot."""
    return f"estimators-{key}.svg"


def page(answers: Answers) -> str:
    """The text of the page; sections that were not measured are left out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=False,
        autoescape=False,  # Markdown
        keep_trailing_newline=True,
    )
    facts: dict[str, Any] = {
        name: make(answers.sections[name]) if answers.sections.get(name) else None for name, make in _FACTS.items()
    }
    if facts["cost"]:
        for network in facts["cost"]["networks"]:
            network["image"] = f"images/{image_name(network['key'])}"
    text = environment.get_template("estimators.md.j2").render(
        provenance=[
            _provenance(name, answers.sections[name], answers.path.name)
            for name in _FACTS
            if answers.sections.get(name)
        ],
        versions=", ".join(f"{name} {version}" for name, version in answers.versions.items()),
        json_name=answers.path.name,
        **facts,
    )
    return text.rstrip("\n") + "\n"


def _provenance(name: str, cells: dict[str, Answer], json_name: str) -> dict[str, str]:
    """Where a section's figures come from."""
    commits = sorted({(cell["commit"] or "unknown")[:10] for cell in cells.values()})
    return {
        "section": name,
        "cells": str(len(cells)),
        "seconds": f"{sum(cell['seconds'] for cell in cells.values()):.0f}",
        "commits": ", ".join(commits) if len(commits) <= _MOST_COMMITS else f"{len(commits)}, see `{json_name}`",
        "machines": "; ".join(sorted({cell["machine"] for cell in cells.values()})),
    }
