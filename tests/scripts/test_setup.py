"""The set-up script, run with a fake Python that records the calls of pip: nothing is downloaded.

Legend: `root` is a copy of what the script reads, in a folder whose name holds a space.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[2]
PIN = next(line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))

# Answers the script's calls of an interpreter. `-m venv` copies it into place; TORCH exists once torch is installed.
STAND_IN = r"""#!/usr/bin/env bash
state="@STATE@"
case "$*" in
    *version_info*) [[ ! -e "$state/old" ]] ;;
    *"import ensurepip, venv"*) [[ ! -e "$state/no-venv" ]] ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >>"$state/log" ;;
    "-m pip --version") ;;
    "-m pip install "*)
        echo "$*" >>"$state/log"
        [[ -e "$state/no-cpu-build" && "$*" == *" torch=="*"+cpu" && "$*" != *"!="* ]] && exit 1
        [[ -e "$state/broken" && "$*" == *--editable* ]] && exit 1
        [[ "$*" != *" torch=="* ]] || touch "$state/torch"
        ;;
    *"import torch") [[ -e "$state/torch" ]] ;;
    *'m.version("torch")'*) echo "2.0.0+local" ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


class Place:
    """A fake checkout, the fake interpreter and the recorded calls of pip."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a check out"
        self.state = folder / "state"
        self.programs = folder / "programs"
        for path in (self.root / "scripts", self.state, self.programs):
            path.mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup"):
            shutil.copy(REPOSITORY / name, self.root / name)
        self.python = self.program("python-stand-in", STAND_IN.replace("@STATE@", str(self.state)))
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def program(self, name: str, text: str) -> Path:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def mark(self, name: str) -> None:
        (self.state / name).touch()

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, "PATH": path, "PYTHON": str(self.python), **environment}
        command = [str(self.root / "scripts" / "setup"), *arguments]
        return subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, check=False, timeout=180)

    def log(self) -> list[str]:
        """Return the calls recorded since the last time, one line each."""
        path = self.state / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def torch_requests(log: list[str]) -> list[str]:
    return [line.split()[-1] for line in log if " torch" in line]


def test_first_start_makes_everything_and_second_does_nothing(place: Place) -> None:
    first = place.setup()
    assert first.returncode == 0, first.stderr
    log = place.log()
    assert log[0] == "venv"
    assert torch_requests(log) == [f"{PIN}+cpu"]
    assert log[-1].endswith(f"--editable {place.root}[all,test]")
    second = place.setup()
    assert (second.returncode, second.stderr, place.log()) == (0, "", [])


def test_torch_is_asked_for_by_exact_version_when_there_is_no_cpu_build(place: Place) -> None:
    place.mark("no-cpu-build")
    result = place.setup()
    assert result.returncode == 0
    assert "has no CPU-only build" in result.stderr
    assert torch_requests(place.log()) == [f"{PIN}+cpu", PIN]


def test_torch_for_a_gpu_is_not_the_cpu_build(place: Place) -> None:
    place.program("nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert place.setup().returncode == 0
    assert torch_requests(place.log()) == [f"{PIN},!={PIN.removeprefix('torch==')}+cpu"]


def test_a_torch_that_works_is_kept_at_its_version(place: Place) -> None:
    place.mark("torch")
    assert place.setup().returncode == 0
    assert torch_requests(place.log()) == []
    assert "torch==2.0.0+local\n" in (place.root / ".venv" / ".constraints.txt").read_text()


def test_changed_constraints_install_again_in_the_same_environment(place: Place) -> None:
    place.setup()
    place.log()
    with (place.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert place.setup().returncode == 0
    log = place.log()
    assert len(log) == 1
    assert "--editable" in log[0]


def test_documentation_tools_are_added_to_the_same_environment_once(place: Place) -> None:
    place.setup()
    place.log()
    assert place.setup("docs").returncode == 0
    log = place.log()
    assert len(log) == 1
    assert log[0].endswith(f"--editable {place.root}[all,test,docs]")
    assert place.setup("docs").returncode == 0
    assert place.setup().returncode == 0
    assert place.log() == []


def test_an_unknown_argument_is_refused(place: Place) -> None:
    result = place.setup("doc")
    assert (result.returncode, place.log()) == (2, [])
    assert result.stderr == "setup: takes no argument, or 'docs'; got: doc\n"


def test_half_made_environment_is_made_anew(place: Place) -> None:
    place.mark("broken")
    assert place.setup().returncode == 1
    (place.state / "broken").unlink()
    leftover = place.root / ".venv" / "leftover"
    leftover.touch()
    place.log()
    assert place.setup().returncode == 0
    assert place.log()[0] == "venv"
    assert not leftover.exists()


def test_environment_of_a_moved_checkout_is_made_anew(place: Place) -> None:
    place.setup()
    place.log()
    place.root = place.root.rename(place.root.with_name("moved"))
    assert place.setup().returncode == 0
    assert place.log()[0] == "venv"


def test_starts_at_the_same_time_install_once(place: Place) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: place.setup(), range(4)))
    assert [result.returncode for result in results] == [0] * 4
    log = place.log()
    assert log.count("venv") == 1
    assert sum("--editable" in line for line in log) == 1


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("old", "which is no Python 3.11 or newer; name one that is"),
        ("no-venv", "lacks its venv module; install it"),
    ],
)
def test_python_that_will_not_do_is_refused_in_one_line(place: Place, mark: str, message: str) -> None:
    place.mark(mark)
    result = place.setup()
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_python_that_does_not_exist_is_refused(place: Place) -> None:
    result = place.setup(PYTHON="/nowhere/python3")
    assert result.returncode == 2
    assert "PYTHON is '/nowhere/python3', which is no Python 3.11 or newer" in result.stderr


@pytest.mark.parametrize("name", ["scripts/setup", "scripts/run", "scripts/test", "scripts/docs", ".ci/run"])
def test_scripts_are_executable_and_parse(name: str) -> None:
    assert os.access(REPOSITORY / name, os.X_OK)
    assert subprocess.run(["bash", "-n", REPOSITORY / name], check=False).returncode == 0
