"""Section `end-to-end`: all of MNIST from configuration to report, with tiles and without, as a user starts it.

Absolute times, since what was asked is one; they are of two cores that other programs may use too.

Units: minutes, GiB.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from nntk_dist.errors import NNTKError
from scripts.benchmarks.figures import Figure, answer
from scripts.benchmarks.runs import ROOT, run_and_watch
from scripts.studies.cells import Answer, Cell

_MOST_GIB = 8.0


@dataclass(frozen=True)
class Case:
    """A configuration and what was asked of its run."""

    config: str
    most_minutes: float
    least_accuracy: float
    most_error: float | None


CASES = (
    Case("mnist-factored", most_minutes=12, least_accuracy=0.945, most_error=None),
    Case("mnist-full", most_minutes=45, least_accuracy=0.97, most_error=0.05),
)
_QUICK = ("data.train=1000", "data.test=200", "compute.tile=512")


def cells(*, quick: bool, data: str | None = None) -> list[Cell]:
    """A cell for each run; `data` is the source of MNIST, such as idx:/path/to/mnist."""
    return [
        Cell(case.config, {"quick": quick} | asdict(case), partial(_measure, case, data, quick=quick)) for case in CASES
    ]


def _measure(case: Case, data: str | None, *, quick: bool) -> Answer:
    if data is None:
        raise NNTKError("--data is missing; allowed: where MNIST lies, such as idx:/path/to/mnist")
    with tempfile.TemporaryDirectory() as folder:
        return answer(*_figures(case, data, Path(folder), quick=quick))


def _figures(case: Case, data: str, folder: Path, *, quick: bool) -> Iterator[Figure]:
    overrides = [f"data.source={data}", *(_QUICK if quick else ())]
    watched = run_and_watch(ROOT / "configs" / f"{case.config}.yaml", folder / "run", overrides)
    manifest = watched.manifest
    results, name = manifest["results"], case.config
    stages = {stage: record["seconds"] / 60 for stage, record in manifest["stages"].items()}
    minutes = {f"{stage} min": value for stage, value in stages.items() if value > 0}
    yield Figure(f"{name}: minutes from start to report", watched.seconds / 60, most=case.most_minutes, details=minutes)
    yield Figure(f"{name}: peak memory of all processes, GiB", watched.peak_bytes / 2**30, most=_MOST_GIB)
    yield Figure(f"{name}: test accuracy", results["test_accuracy"], least=case.least_accuracy)
    yield Figure(f"{name}: relative error", results["train_relative_error"], most=case.most_error)
