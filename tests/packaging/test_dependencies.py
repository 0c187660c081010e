"""`pip install .` and its extras install exactly what the packages import.

Imports are read from the source, those inside functions included; the table below lists the distributions whose name
differs from their module's.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
OWN = {"nntk_dist", "pipeline"}
DISTRIBUTIONS = {"PIL": "pillow", "google_crc32c": "google-crc32c", "sklearn": "scikit-learn", "yaml": "pyyaml"}
PARTS_OF_OTHERS = {"pydantic_core"}  # installed by a declared package, and not to be declared itself


def declared(*extras: str) -> set[str]:
    """Names of the distributions that an installation with these extras requires."""
    requirements = list(PROJECT["dependencies"])
    for extra in extras:
        requirements += PROJECT["optional-dependencies"][extra]
    names = {re.split(r"[\[<>=!~; ]", each)[0] for each in requirements}
    return names - {PROJECT["name"]}


def imported(package: str) -> Iterator[tuple[str, str]]:
    """The distribution of every third-party import, and the file that imports it."""
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {each.partition(".")[0] for each in names}:
                if name not in sys.stdlib_module_names and name not in OWN | PARTS_OF_OTHERS:
                    yield DISTRIBUTIONS.get(name, name), str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize(
    ("package", "extras"), [("nntk_dist", ("sklearn", "analysis", "hf")), ("pipeline", ("pipeline", "analysis"))]
)
def test_every_import_is_declared(package: str, extras: tuple[str, ...]) -> None:
    undeclared = {(name, path) for name, path in imported(package) if name not in declared(*extras)}
    assert not undeclared


def test_every_declared_dependency_is_imported() -> None:
    used = {name for package in OWN for name, _ in imported(package)}
    assert declared("pipeline", "sklearn", "analysis") - used <= {"pandas"}  # xarray and the tables need it
    library = {name for name, _ in imported("nntk_dist")}
    assert declared() <= library


def test_everything_is_in_all_but_what_is_large() -> None:
    (everything,) = PROJECT["optional-dependencies"]["all"]
    extras = set(re.search(r"\[(.*)\]", everything).group(1).split(","))
    assert extras == set(PROJECT["optional-dependencies"]) - {"all", "cluster", "docs", "hf", "test"}
