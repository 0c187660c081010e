"""Examples of README and docs: Python blocks run, commands and configurations name what exists.

Python blocks of a page run one after the other in one temporary folder, each in its own namespace. The folder holds a
small run on the digits as `runs/digits`. A block whose first line is `# NAME.py` is also saved under that name, so that
later ones can import it. Entry points in TOML blocks of a page are installed for it.
"""

import importlib.util
import linecache
import os
import shlex
import sys
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from nntk_dist.errors import NNTKWarning
from pipeline.cli.commands import app
from pipeline.config.schema import load_config
from scripts.documentation.configuration import EXAMPLE, all_keys, configuration_reference, explained_keys
from tests.docs.markdown import PAGES, REPOSITORY, Block, blocks, name_of

pytestmark = pytest.mark.docs

FREE_MAPPINGS = ("args", "options", "output")  # keys whose values are mappings that the schema does not list
SMALL_RUN = ("data.train=160", "data.test=40", "compute.executor=serial", "report.plots=false")


def pages_with(language: str) -> list[Any]:
    return [pytest.param(page, id=name_of(page)) for page in PAGES if any(blocks(page, language))]


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run on the digits."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    sets = [part for each in (f"run_dir={folder}", *SMALL_RUN) for part in ("--set", each)]
    invoke("run", str(REPOSITORY / "configs" / "digits.yaml"), *sets)
    return folder


def invoke(*arguments: str) -> None:
    """Run a verb of the command line in this process."""
    typer.main.get_command(app).main(list(arguments), prog_name="nntk", standalone_mode=False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the blocks of a page run in, first on the path for imports."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page: Path, place: Path, request: pytest.FixtureRequest) -> None:
    found = [block for block in blocks(page, "python") if block.reason is None]
    if any("runs/digits" in block.code for block in found):
        (place / "runs").mkdir()
        (place / "runs" / "digits").symlink_to(request.getfixturevalue("digits_run"))
    install_entry_points(page, place)
    for block in found:
        if block.file:
            (place / block.file).write_text(block.code)
        run_python(block)


def install_entry_points(page: Path, place: Path) -> None:
    """Install a package with the entry points that a page's TOML blocks declare."""
    groups: dict[str, dict[str, str]] = {}
    for block in blocks(page, "toml"):
        for group, points in tomllib.loads(block.code)["project"]["entry-points"].items():
            groups.setdefault(group, {}).update(points)
    metadata = place / "examples-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: examples\nVersion: 1.0\n")
    sections = (
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in points.items())])
        for group, points in groups.items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(sections))


def run_python(block: Block) -> None:
    """Run one block; a traceback shows the page's own lines."""
    linecache.cache[block.place] = (len(block.code), None, block.code.splitlines(keepends=True), block.place)
    name = Path(block.file).stem if block.file else "__main__"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NNTKWarning)
        exec(compile(block.code, block.place, "exec"), {"__name__": name})


@pytest.mark.parametrize("page", pages_with("console"))
def test_commands_exist(page: Path, place: Path) -> None:
    for block in blocks(page, "console"):
        if block.reason is not None:
            continue
        commands = [shlex.split(line, comments=True) for line in block.code.replace("\\\n", " ").splitlines()]
        for words in filter(None, commands):
            check_command(block, words)


def check_command(block: Block, words: list[str]) -> None:
    """Run `nntk plan` and `--help`; for other commands check that the verb, its options and its keys exist."""
    if words[:3] == ["python", "-m", "pipeline"]:
        words = ["nntk", *words[3:]]
    if words[0].startswith("./"):
        script = REPOSITORY / words[0]
        assert os.access(script, os.X_OK), f"{block.place}: there is no script {words[0]}"
        words = ["nntk", "run", *words[1:]] if words[0] == "./scripts/run" else []
    elif words[:2] == ["pip", "install"]:
        check_extras(block, words)
        words = []
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None, f"{block.place}: there is no module {words[2]}"
        words = []
    elif words[0] != "nntk":
        pytest.fail(f"{block.place}: '{words[0]}' is not checked; say '<!-- not run: why -->' below the block")
    if not words:
        return
    if "--help" in words or words[1] == "plan":
        invoke(*words[1:])
    else:
        check_verb(block, words[1], words[2:])


def check_verb(block: Block, verb: str, arguments: list[str]) -> None:
    """Parse a verb's arguments as the command line would, and load the configuration that they name."""
    verbs: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert verb in verbs, f"{block.place}: nntk has no verb '{verb}'"
    parsed = verbs[verb].make_context(verb, arguments).params
    if parsed.get("config") is not None:
        load_config(Path(parsed["config"]), parsed.get("overrides") or [])


def check_extras(block: Block, words: list[str]) -> None:
    """Check that the extras of `pip install '.[extra]'` are declared."""
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[2:]:
        extras = word.partition("[")[2].rstrip("]")
        unknown = set(filter(None, extras.split(","))) - set(declared)
        assert not unknown, f"{block.place}: no extra {unknown}"


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_keys_of_configurations_exist(page: Path) -> None:
    for block in blocks(page, "yaml"):
        if block.reason is None:
            unknown = set(keys_of(yaml.safe_load(block.code))) - set(all_keys())
            assert not unknown, f"{block.place}: {sorted(unknown)}"


def keys_of(document: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in document.items():
        if isinstance(value, Mapping) and key not in FREE_MAPPINGS:
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_block_that_does_not_run_says_why() -> None:
    reasons = [block.reason for page in PAGES for language in ("python", "console") for block in blocks(page, language)]
    assert all(reason is None or len(reason) > 10 for reason in reasons)
    assert sum(reason is None for reason in reasons) > len(reasons) / 2


def test_the_example_explains_every_key() -> None:
    explained = explained_keys(EXAMPLE.read_text())
    assert set(all_keys()) - set(explained) == set()
    assert set(explained) <= set(all_keys()) | {key.rpartition(".")[0] for key in all_keys()}


def test_the_reference_has_a_row_for_every_key() -> None:
    reference = configuration_reference()
    assert [key for key in all_keys() if f"| `{key}` |" not in reference] == []
