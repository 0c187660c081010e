"""Section `memory`: the peak of a worker as measured, over the peak that the plan projected before launch.

Every case is a whole run with one worker on Ray, on random data; peaks are measured in the worker's process, in the
stages that the projection covers.

Units: bytes.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.planning.projection import BASE_BYTES
from scripts.benchmarks.figures import Figure, answer
from scripts.benchmarks.runs import run_and_watch
from scripts.studies.cells import Answer, Cell

_TILED = ("features", "metric", "calibration", "gram", "test")
_WITHIN = 0.25
_GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A run: how many examples of what shape, and the sections of its configuration."""

    name: str
    train: int
    shape: tuple[int, ...]
    model: Mapping[str, Any]
    kernel: Mapping[str, Any]
    compute: Mapping[str, Any] = field(default_factory=dict)


def _mlp(*widths: int, activation: str = "relu") -> dict[str, Any]:
    return {"builder": "mlp", "args": {"widths": list(widths), "activation": activation}}


_IMAGES = (3, 32, 32)
_QUICK = Case("layered, tile 256", 512, (64,), _mlp(32), {"contraction": "layered"}, {"tile": 256})
_WIDE_SKETCH = {"contraction": "sketch", "sketch": 8192, "blocks": 4}
_CASES = (
    Case("weight, 4,096 draws", 2048, (64,), _mlp(64), {"estimator": "weight", "draws": 4096}),
    Case("weight, 512 draws, tile 4096", 6144, (64,), _mlp(64), {"estimator": "weight", "draws": 512}, {"tile": 4096}),
    Case("weight, images", 1024, _IMAGES, {"builder": "resnet"}, {"estimator": "weight", "draws": 8}),
    Case("layered, tile 2048", 4096, (784,), _mlp(256, 256), {"contraction": "layered", "blocks": 4}, {"tile": 2048}),
    Case("means, tile 1024", 2048, (256,), _mlp(64), {"contraction": "means"}),
    Case("sketch of 4,096, tile 1024", 2048, (784,), _mlp(256, 256), {"contraction": "sketch", "sketch": 4096}),
    Case("sketch of 8,192, tile 2048", 4096, (256,), _mlp(128), _WIDE_SKETCH, {"tile": 2048, "stderr": "sample"}),
    Case("activation, tile 1024", 2048, (64,), _mlp(32, activation="sign"), {"draws": 64}),
    Case("outputs full, tile 256", 1024, (64,), _mlp(64), {"outputs": "full"}, {"tile": 256}),
    Case("averaged, tile 2048", 4096, (256,), _mlp(64), {"kind": "averaged", "draws": 16}, {"tile": 2048}),
    Case("local, tile 2048", 4096, (784,), _mlp(512, 512), {"kind": "local", "statistic": "plugin"}, {"tile": 2048}),
)


def cells(*, quick: bool) -> list[Cell]:
    """A cell for each run."""
    return [Cell(case.name, asdict(case), partial(_measure, case)) for case in ((_QUICK,) if quick else _CASES)]


def _measure(case: Case) -> Answer:
    with tempfile.TemporaryDirectory() as folder:
        manifest = run_and_watch(_configuration(case, Path(folder)), Path(folder) / "run").manifest
    peak = max(manifest["stages"][name]["results"]["peak_bytes"] for name in _TILED if name in manifest["stages"])
    projected = manifest["projection"]["worker_bytes"]
    details = {
        "projected GiB": projected / _GIB,
        "measured GiB": peak / _GIB,
        "measured above the baseline GiB": (peak - BASE_BYTES) / _GIB,
    }
    return answer(Figure(case.name, peak / projected, least=1 - _WITHIN, most=1 + _WITHIN, details=details))


def _configuration(case: Case, folder: Path) -> Path:
    """The configuration of a case, as a file beside its data."""
    rng = np.random.default_rng(0)
    rows = case.train + 256
    x, y = rng.standard_normal((rows, *case.shape), dtype=np.float32), rng.integers(0, 10, rows)
    np.savez(folder / "data.npz", x=x, y=y)
    config = {
        "name": "memory",
        "run_dir": "unset",
        "data": {"source": f"npz:{folder / 'data.npz'}", "train": case.train, "test": 256},
        "model": dict(case.model),
        "kernel": dict(case.kernel),
        "compute": {"workers": 1} | dict(case.compute),
        "spectrum": {"top_k": 1},  # as little of what is not measured as can be
        "regression": {"ridge": [1.0]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
