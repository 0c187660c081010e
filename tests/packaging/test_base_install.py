"""The library works with its own dependencies alone: the packages of the extras are hidden from a fresh interpreter."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from tests.packaging.test_dependencies import DISTRIBUTIONS, declared

REPOSITORY = Path(__file__).parents[2]
MODULES = {distribution: module for module, distribution in DISTRIBUTIONS.items()}
# Always installed with the library, as dependencies of PyTorch and Zarr.
INDIRECT = {"google-crc32c", "jinja2", "markupsafe", "numcodecs", "pyyaml"}


def run_without_extras(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter that finds no package of an extra."""
    extras = declared("pipeline", "sklearn", "analysis") - declared() - INDIRECT
    hidden = {MODULES.get(name, name.replace("-", "_")) for name in extras}
    prelude = f"""
    import importlib.abc, sys

    class Hide(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {hidden!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Hide())
    """
    program = textwrap.dedent(prelude) + textwrap.dedent(code)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.process
def test_kernels_are_computed_and_the_reader_is_imported() -> None:
    result = run_without_extras(
        """
        import torch, nntk_dist, nntk_dist.analysis
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        assert nntk_dist.nonlocal_kernel(model, torch.randn(4, 3), gamma=0.1).kernel.shape == (4, 4)
        assert callable(nntk_dist.open_kernel)
        """
    )
    assert result.returncode == 0, result.stderr


def test_the_command_line_names_the_extra_that_it_needs() -> None:
    result = run_without_extras("import runpy; sys.argv = ['nntk']; runpy.run_module('pipeline', run_name='__main__')")
    assert result.returncode == 2
    assert result.stderr == "error: nntk needs the package 'typer'; run: pip install 'nntk-dist[pipeline]'\n"


def test_the_version_is_stated_once() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}\n" in (REPOSITORY / "CHANGELOG.md").read_text()
    sources = [*(REPOSITORY / "nntk_dist").rglob("*.py"), *(REPOSITORY / "pipeline").rglob("*.py")]
    assert not [path for path in sources if f'"{version}"' in path.read_text()]
