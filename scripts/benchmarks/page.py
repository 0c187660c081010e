"""The page on performance: Markdown from the answers alone, so that no number on it was typed by hand.

It formats, and only decides whether a figure meets its target. Nothing is measured here.

Axes: none.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.studies.cells import Answer, Answers

SECTION_ORDER = (
    "perturb",
    "perturb-gpu",
    "tile",
    "tile-gpu",
    "local",
    "local-gpu",
    "peers",
    "solvers",
    "end-to-end",
    "scaling",
    "memory",
)


def page(answers: Answers) -> str:
    """The text of the page; sections that were not measured are left out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown
        keep_trailing_newline=True,
    )
    kept = answers.sections
    sections = {name: [_cell(cell) for cell in kept[name].values()] for name in SECTION_ORDER if kept.get(name)}
    text = environment.get_template("performance.md.j2").render(
        sections=sections,
        versions=", ".join(f"{name} {version}" for name, version in answers.versions.items()),
        json_name=answers.path.name,
    )
    return text.rstrip("\n") + "\n"


def _cell(cell: Answer) -> dict[str, Any]:
    """A cell's figures as the template needs them, with their origin."""
    return {
        "figures": [_figure(figure) for figure in cell["answer"]["figures"]],
        "machine": cell["machine"],
        "commit": _short(cell["commit"]),
        "seconds": f"{cell['seconds']:.0f}",
    }


def _short(commit: str | None) -> str:
    """A commit by its first digits, and whether the code differed from it."""
    digits, _, changed = (commit or "unknown").partition("-")
    return digits[:16] + (f"-{changed}" if changed else "")


def _figure(figure: Answer) -> dict[str, str]:
    value, least, most = figure["value"], figure["least"], figure["most"]
    bounds = {"≥": least, "≤": most}
    asked = ", ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)
    short = (least is not None and value < least) or (most is not None and value > most)
    details = ", ".join(f"{name} {number(entry)}" for name, entry in figure["details"].items())
    return {
        "what": figure["what"],
        "value": f"**{number(value)}**" if short else number(value),
        "asked": f"{asked}, missed" if short else asked,
        "details": details,
    }


def number(value: Any) -> str:
    """Three digits of a number; other values unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
