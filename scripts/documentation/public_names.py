"""The public names of a package for the API reference: in the sections that comments in its `__all__` make."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NAME = re.compile(r'^\s+"(?P<name>\w+)",')
_COMMENT = re.compile(r"^\s+# (?P<text>.+)$")


def public_names(package: str) -> str:
    """Return Markdown that asks mkdocstrings for each public name of a package, under the headings of `__all__`."""
    return "\n".join(_entries(package, ROOT / package.replace(".", "/") / "__init__.py"))


def _entries(package: str, path: Path) -> Iterator[str]:
    for line in _lines_of_all(path.read_text()):
        if found := _COMMENT.match(line):
            yield f"## {found.group('text').rstrip('.')}\n"
        elif found := _NAME.match(line):
            yield f"::: {package}.{found.group('name')}\n    options: {{heading_level: 3}}\n"


def _lines_of_all(source: str) -> list[str]:
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return source.splitlines()[node.lineno : node.end_lineno]
    raise ValueError("the package has no __all__")
