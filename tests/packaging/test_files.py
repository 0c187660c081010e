"""Files that other tools read: they parse, and name only what exists."""

import re
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["CITATION.cff", ".pre-commit-config.yaml", ".github/workflows/checks.yml"])
def test_yaml_parses(name: str) -> None:
    assert isinstance(yaml.safe_load((REPOSITORY / name).read_text()), dict)


def test_workflow_calls_scripts_that_exist() -> None:
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/checks.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["./.ci/run", "./scripts/docs"]
    assert all((REPOSITORY / command).is_file() for command in commands)


@pytest.mark.parametrize("package", ["nntk_dist", "pipeline"])
def test_contributing_says_what_every_package_is_for(package: str) -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    table = text.split(f"| `{package}.` | answers |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    own = {path.stem for path in (REPOSITORY / package).iterdir() if not path.name.startswith(("_", "."))}
    assert listed == own - {"py"}
