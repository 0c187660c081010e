"""Help, version and completion: their output, and that they import nothing heavy."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pipeline.cli.commands import app
from tests.pipeline.tools import ROOT

VERBS = ("run", "plan", "status", "verify", "report")
HEAVY = ("torch", "numpy", "ray", "zarr", "pipeline.config", "pyarrow", "matplotlib", "sklearn", "scipy", "nntk_dist")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_shows_an_example(verb):
    result = CliRunner().invoke(app, [verb, "--help"], prog_name="nntk")
    assert result.exit_code == 0
    assert f"Example: nntk {verb} " in " ".join(result.output.split())


def test_the_help_lists_all_verbs():
    result = CliRunner().invoke(app, ["--help"], prog_name="nntk")
    assert result.exit_code == 0
    assert all(f" {verb} " in result.output for verb in VERBS)
    assert {command.callback.__name__ for command in app.registered_commands} == set(VERBS)


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("nntk ")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, monkeypatch):
    """The script that `--show-completion` prints, and the answer to a shell after `nntk v`."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "true")
    script = CliRunner().invoke(app, ["--show-completion", shell], prog_name="nntk")
    assert script.exit_code == 0, script.output
    assert "_NNTK_COMPLETE" in script.output
    asked = {"_NNTK_COMPLETE": f"complete_{shell}", "COMP_WORDS": "nntk v", "COMP_CWORD": "1"}
    answer = CliRunner().invoke(app, [], prog_name="nntk", env=asked | {"_TYPER_COMPLETE_ARGS": "nntk v"})
    assert "verify" in answer.output
    assert "report" not in answer.output


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['nntk', *{arguments}]\n"
        "try:\n    runpy.run_module('pipeline', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "heavy: []"
