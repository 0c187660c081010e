"""Code blocks of Markdown pages: their place, their language, and whether they are meant to run.

A block that cannot run is followed by a comment that says why: `<!-- not run: needs a GPU -->`. One that runs only if a
package is there names it: `<!-- runs with: timm -->`.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# Pages written by scripts/studies and scripts/benchmarks hold no examples.
PAGES = tuple(
    path
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
    if path.name not in ("estimators.md", "performance.md")
)
_BLOCK = re.compile(
    r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```[ \t]*\n"
    r"(?:\s*<!-- (?:not run: (?P<reason>[^\n]*?)|runs with: (?P<package>\w+)) -->)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One code block; `reason` says why it does not run, None if it does."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def place(self) -> str:
        """The page and line, as a traceback would name them."""
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The module name under which to save a block, if its first line is `# NAME.py` (text may follow)."""
        found = re.match(r"# (\w+\.py)\b", self.code)
        return found.group(1) if found else None


def blocks(page: Path, language: str) -> Iterator[Block]:
    """Iterate over the blocks of a page in one language."""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        if match.group("language") == language:
            line = text[: match.start()].count("\n") + 2
            reason, package = match.group("reason", "package")
            if package is not None and importlib.util.find_spec(package) is None:
                reason = f"{package} is not installed"
            yield Block(page, line, language, match.group("code"), reason)


def name_of(page: Path) -> str:
    """The name of a page for test ids."""
    return str(page.relative_to(REPOSITORY))
