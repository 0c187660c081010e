"""The speed of the engine against the hardware and its peers: what `docs/performance.md` claims, measured and written.

    .venv/bin/python scripts/bench.py [--quick] [--only SECTION] [--again] [--data idx:/path/to/mnist] [--out PAGE]

Figures of speed are ratios within one run; whole runs, dispatching and memory are measured as they are. Each is kept in
a JSON file beside the page as soon as it is known, and measured again when its settings change, or with `--again`.
Without `--data` and without a GPU, what needs them is left out.
`--quick` takes small sizes, enough to see that everything works, and writes to build/ by default.
"""

import sys
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markdown import Markdown  # noqa: E402

from nntk_dist.errors import NNTKError, check_choice  # noqa: E402
from pipeline.driver.progress import make_progress  # noqa: E402
from scripts.benchmarks import NEEDS_DATA, NEEDS_GPU, SECTIONS  # noqa: E402
from scripts.benchmarks.page import page  # noqa: E402
from scripts.studies.cells import Answers, answer_all  # noqa: E402

Out = Annotated[Path | None, typer.Option(help="The page; the JSON file lies beside it.")]
Only = Annotated[list[str] | None, typer.Option(help=f"Measure this section alone: {', '.join(SECTIONS)}.")]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure again what is known.")] = False,
    only: Only = None,
    data: Annotated[str | None, typer.Option(help="MNIST for the section end-to-end: idx:/path/to/mnist.")] = None,
    out: Out = None,
) -> None:
    """Measure, print the table, and write the page and its JSON file."""
    console = Console(stderr=True)
    path = out or ROOT / ("build/performance.md" if quick else "docs/performance.md")
    answers = Answers(path.with_suffix(".json"))
    try:
        names = [_checked(name) for name in only] if only else _possible(console, data)
        try:
            for name in names:
                if again:
                    answers.sections.pop(name, None)
                options = {"data": data} if name in NEEDS_DATA else {}
                answer_all(answers, name, SECTIONS[name](quick=quick, **options), make_progress(console), threads=None)
        finally:  # write what was measured, also if a measurement fails
            text = page(answers)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except NNTKError as error:
        console.print(f"error: {error}", style="red")
        raise typer.Exit(2) from error
    console.print(Markdown(text))
    console.print(f"wrote {path}")


def _checked(name: str) -> str:
    """The requested section, if it exists and can be measured here."""
    check_choice("--only", name, SECTIONS)
    if name in NEEDS_GPU and not torch.cuda.is_available():
        raise NNTKError(f"--only is {name}, which needs a GPU, and torch sees none here")
    return name


def _possible(console: Console, data: str | None) -> list[str]:
    """All sections that can be measured here; what is left out is said."""
    gpu = torch.cuda.is_available()
    missing = {"--data says where MNIST lies": NEEDS_DATA if data is None else (), "no GPU": () if gpu else NEEDS_GPU}
    for why, names in missing.items():
        if names:
            console.print(f"left out: {', '.join(names)} ({why})")
    return [name for name in SECTIONS if not any(name in names for names in missing.values())]


if __name__ == "__main__":
    typer.run(main)
