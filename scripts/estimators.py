"""Evidence for the estimators: measures what `docs/estimators.md` claims, and writes that page.

    python scripts/estimators.py [--quick] [--only SECTION] [--out docs/estimators.md]

Every figure comes from seeds fixed in `scripts/studies`, is kept in a JSON file beside the page as soon as it is known,
and is not computed again while its settings stay the same: a run that is stopped continues. `--quick` takes
small samples, enough to see that everything works, and writes to build/ by default.
"""

import sys
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from nntk_dist.errors import NNTKError, check_choice  # noqa: E402
from pipeline.driver.progress import make_progress  # noqa: E402
from scripts.studies import SECTIONS  # noqa: E402
from scripts.studies.cells import Answers, answer_all  # noqa: E402
from scripts.studies.page import write_page  # noqa: E402

Out = Annotated[Path | None, typer.Option(help="The page; figures, plots and JSON lie beside it.")]
Only = Annotated[list[str] | None, typer.Option(help=f"Measure this section alone: {', '.join(SECTIONS)}.")]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small samples.")] = False,
    only: Only = None,
    out: Out = None,
) -> None:
    """Measure the estimators and write the page."""
    console = Console(stderr=True)
    page = out or ROOT / ("build/estimators.md" if quick else "docs/estimators.md")
    answers = Answers(page.with_suffix(".json"))
    try:
        for name in only or SECTIONS:
            check_choice("--only", name, SECTIONS)
        for name in only or SECTIONS:
            answer_all(answers, name, SECTIONS[name](quick=quick), make_progress(console))
    except NNTKError as error:
        console.print(f"error: {error}", style="red")
        raise typer.Exit(2) from error
    write_page(answers, page)
    console.print(f"wrote {page}")


if __name__ == "__main__":
    typer.run(main)
