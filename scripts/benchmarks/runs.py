"""Whole runs as a user starts them, in a separate process, observed from outside.

Memory is the proportional set size summed over the process and all its descendants, Ray's among them: what the run
takes from the machine, shared pages counted once.

Units: seconds, bytes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nntk_dist.errors import NNTKError

ROOT = Path(__file__).parents[2]
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Watched:
    """What a finished run left behind, and what it took."""

    manifest: dict[str, Any]
    seconds: float
    peak_bytes: int


def run_and_watch(config: Path, run_dir: Path, overrides: Sequence[str] = ()) -> Watched:
    """Carry out a run from its configuration to its report. Raises: NNTKError if it fails."""
    settings = [f"run_dir={run_dir}", *overrides]
    command = [sys.executable, "-m", "pipeline", "run", str(config)]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    log = run_dir.with_suffix(".log")
    began, peak = time.perf_counter(), 0
    with log.open("w") as out, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out) as process:
        while process.poll() is None:
            peak = max(peak, proportional_bytes(process.pid))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise NNTKError(f"the run of {config.name} ended with {process.returncode}: {log.read_text().strip()[-500:]}")
    return Watched(json.loads((run_dir / "manifest.json").read_text()), seconds, peak)


def proportional_bytes(pid: int) -> int:
    """Proportional set size of a process and all its descendants; those that end meanwhile count nothing."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for each in processes:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total
