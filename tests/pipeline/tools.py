"""Helpers of the pipeline's tests: a small configuration, the command line in this process or in a new one, stores read
back with plain zarr, run directories compared file by file.

It does not depend on stages.
"""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import zarr

from pipeline.cli import commands as cli

ROOT = Path(__file__).resolve().parents[2]
# Primes, so that no tile, batch or shard divides them.
NUM_TRAIN, NUM_TEST = 149, 41
# Replaces itself by a command that has the default action of SIGINT: an ignored signal stays ignored through `exec`.
WITH_DEFAULT_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
CONFIG = f"""
name: small
run_dir: unset
data: {{source: "sklearn:digits", train: {NUM_TRAIN}, test: {NUM_TEST}}}
model: {{builder: mlp, args: {{widths: [32, 32]}}}}
compute: {{executor: serial, tile: 64}}
spectrum: {{top_k: 5}}
report: {{plots: false}}
"""


@dataclass(frozen=True)
class Result:
    """The exit code of a command and its output."""

    code: int | str | None
    out: str
    err: str


def nntk(*arguments: object) -> Result:
    """Call the command line in this process; errors other than user errors propagate unchanged."""
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["nntk", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            return Result(ended.code, out.getvalue(), err.getvalue())
    raise AssertionError("main() returned")


def config_file(run_dir: Path) -> Path:
    """Write the small configuration beside the run directory."""
    path = run_dir.parent / "config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONFIG)
    return path


def arguments(verb: str, run_dir: Path, *sets: str, resume: bool = False) -> list[str]:
    """The arguments of `nntk run` or `nntk plan` for the small configuration with changes."""
    changes = [part for change in (f"run_dir={run_dir}", *sets) for part in ("--set", change)]
    return [verb, str(config_file(run_dir)), *changes, *(["--resume"] if resume else [])]


def run(run_dir: Path, *sets: str, resume: bool = False) -> Result:
    """Call `nntk run` on the small configuration with changes, in this process."""
    return nntk(*arguments("run", run_dir, *sets, resume=resume))


def finished(run_dir: Path, *sets: str, resume: bool = False) -> Path:
    """Make a run that must succeed and return its directory."""
    result = run(run_dir, *sets, resume=resume)
    assert result.code == 0, result.err
    return run_dir


def start(*command: str, prelude: str = "") -> "subprocess.Popen[str]":
    """Start `python -m pipeline …` in a new process and process group, as a shell does in the foreground.

    It obeys Ctrl-C even if the tests run with SIGINT ignored, as in a shell's background jobs.

    Args:
        command: Arguments of the command line.
        prelude: Python code to run first.
    """
    program = ["-c", f"{prelude}\nfrom pipeline.cli.commands import main\nmain()"] if prelude else ["-m", "pipeline"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", WITH_DEFAULT_SIGINT, sys.executable, *program, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def arrays(run_dir: Path) -> dict[str, np.ndarray]:
    """Every array of the store by its path."""
    root = zarr.open_group(run_dir / "kernel.zarr", mode="r")
    return {
        path: np.asarray(member[...]) for path, member in root.members(max_depth=None) if isinstance(member, zarr.Array)
    }


def ledger(run_dir: Path) -> dict[tuple[str, str], dict]:
    """The ledger's rows by (stage, tile), the last one if there are several; read without the pipeline's reader."""
    folder = run_dir / "ledger"
    files = sorted(folder.glob("[0-9]*[0-9].parquet"))
    if indices := sorted(folder.glob("_*.json")):
        listed = [run_dir / path for path in json.loads(indices[-1].read_text())["files"]]
        files = [*listed, *(path for path in files if path.stem > indices[-1].stem[1:])]
    tables = [pa.dataset.dataset(path).to_table() for path in files]
    return {(row["stage"], row["tile"]): row for table in tables for row in table.to_pylist()}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its modification time and content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_same_bits(first: Path, second: Path) -> None:
    """Check that both stores hold the same arrays, bit for bit (a NaN equals itself)."""
    left, right = arrays(first), arrays(second)
    assert left.keys() == right.keys()
    different = [path for path in left if left[path].tobytes() != right[path].tobytes()]
    assert different == []
