"""Section `end-to-end`: all of MNIST from configuration to report, with tiles and without, as a user starts it.

Absolute times, because the target is one; they are for two cores that other programs may use too. The distance of each
configuration's kernel from the local kernel is measured as well, on a few rows and with enough draws.

Units: minutes, GiB.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nntk_dist import local_kernel, nonlocal_kernel
from nntk_dist.errors import NNTKError
from pipeline.config.schema import load_config
from pipeline.decisions.build import build_dataset, build_model
from scripts.benchmarks.figures import Figure, answer
from scripts.benchmarks.runs import ROOT, run_and_watch
from scripts.studies.cells import Answer, Cell

_MOST_GIB = 8.0


@dataclass(frozen=True)
class Case:
    """A configuration and the target for its run."""

    config: str
    most_minutes: float
    least_accuracy: float
    most_error: float | None


CASES = (
    Case("mnist-factored", most_minutes=12, least_accuracy=0.945, most_error=None),
    Case("mnist-full", most_minutes=45, least_accuracy=0.97, most_error=0.05),
)
_QUICK = ("data.train=1000", "data.test=200", "compute.tile=512")
_COMPARED_ROWS, _COMPARED_DRAWS = 128, 128


def cells(*, quick: bool, data: str | None = None) -> list[Cell]:
    """Two cells for each run; `data` is the source of MNIST, such as idx:/path/to/mnist."""
    result = []
    for case in CASES:
        draws = _COMPARED_DRAWS // 8 if quick else _COMPARED_DRAWS
        compared = {"config": case.config, "rows": _COMPARED_ROWS, "draws": draws}
        result.append(Cell(case.config, {"quick": quick} | asdict(case), partial(_measure, case, data, quick=quick)))
        result.append(Cell(f"{case.config}, local", compared, partial(_compare, case.config, data, draws)))
    return result


def _measure(case: Case, data: str | None, *, quick: bool) -> Answer:
    with tempfile.TemporaryDirectory() as folder:
        return answer(*_figures(case, _given(data), Path(folder), quick=quick))


def _given(data: str | None) -> str:
    if data is None:
        raise NNTKError("--data is missing; allowed: where MNIST lies, such as idx:/path/to/mnist")
    return data


def _compare(name: str, data: str | None, draws: int) -> Answer:
    """‖Θ_γ − Θ‖/‖Θ‖ over the entries of a few train rows, Θ_γ by the unbiased statistic, and what is known of its
    error; the same after the best common factor, which says how far they differ in more than size. Of a kernel, only γ
    is taken from the configuration.
    """
    config = load_config(_path(name), [f"data.source={_given(data)}"])
    dataset = build_dataset(config)
    model, x = build_model(config, dataset), torch.from_numpy(dataset.train.inputs[:_COMPARED_ROWS])
    gamma = config.kernel.distribution.gamma
    estimate = nonlocal_kernel(model, x, gamma=gamma, draws=draws, blocks=16, statistic="unbiased")
    distant, local = estimate.kernel, local_kernel(model, x)
    factor = float((distant * local).sum() / local.square().sum())
    details = {
        "γ": gamma,
        "rows": len(x),
        "draws": draws,
        "relative error of the nonlocal kernel": estimate.relative_error,
        "distance after the best factor": _distance(distant, factor * local),
        "the factor": factor,
    }
    what = f"{name}: relative distance of the nonlocal kernel from the local one"
    return answer(Figure(what, _distance(distant, local), details=details))


def _distance(kernel: Tensor, other: Tensor) -> float:
    return float((kernel - other).norm() / other.norm())


def _path(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


def _figures(case: Case, data: str, folder: Path, *, quick: bool) -> Iterator[Figure]:
    overrides = [f"data.source={data}", *(_QUICK if quick else ())]
    watched = run_and_watch(_path(case.config), folder / "run", overrides)
    manifest = watched.manifest
    results, name = manifest["results"], case.config
    stages = {stage: record["seconds"] / 60 for stage, record in manifest["stages"].items()}
    minutes = {f"{stage} min": value for stage, value in stages.items() if value > 0}
    yield Figure(f"{name}: minutes from start to report", watched.seconds / 60, most=case.most_minutes, details=minutes)
    yield Figure(f"{name}: peak memory of all processes, GiB", watched.peak_bytes / 2**30, most=_MOST_GIB)
    yield Figure(f"{name}: test accuracy", results["test_accuracy"], least=case.least_accuracy)
    yield Figure(f"{name}: relative error", results["train_relative_error"], most=case.most_error)
