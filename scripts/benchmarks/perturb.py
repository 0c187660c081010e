"""Section `perturb`: features of shards of 8,192 rows under perturbed parameters, against plain inference on them.

The rate of a perturbed pass is the rate of the public feature map, including drawing and storing, with the pipeline's
batches; plain inference is the model under `no_grad` at the fastest of several batch sizes. One thread, as workers
have, or a GPU.

Units: seconds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nntk_dist.models.builders import build_model
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.features import FeatureMap
from nntk_dist.runtime.precision import full_precision
from nntk_dist.runtime.threads import torch_threads
from nntk_dist.spec import KernelSpec
from pipeline.decisions.layout import automatic_batch
from scripts.benchmarks.figures import Figure, answer, as_a_worker, best_seconds
from scripts.studies.cells import Answer, Cell

_BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_ROWS_TO_CHOOSE_BY = {"cpu": 2048, "cuda": 8192}
_OUTPUTS = 10
_BLOCKS = 4
_SHORT, _ROUNDS = 16, (3, 8)  # models with this many draws or more have short passes, and take more turns
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "iid": {},
    "antithetic": {"design": "antithetic"},
    "orthogonal": {"design": "orthogonal"},
    "low rank": {"distribution": {"name": "lowrank", "rank": 4}},
}


@dataclass(frozen=True)
class Case:
    """A built-in model, the shape of its examples, and the number of draws to time: fewer if passes are long."""

    name: str
    builder: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    draws: int
    options: tuple[str, ...] = ("iid", "antithetic")
    asked: bool = True


_CASES = (
    Case("mlp 784-512-512-10", "mlp", {"widths": [512, 512]}, (784,), 16, tuple(_OPTIONS)),
    Case("cnn, 3×32×32", "cnn", {}, (3, 32, 32), 4),
    Case("resnet, 3×32×32", "resnet", {}, (3, 32, 32), 2),
    Case("transformer, 64 tokens of 32", "transformer", {}, (64, 32), 4),
    Case("mlp 64-16-10, small", "mlp", {"widths": [16]}, (64,), 16, asked=False),
)


def cells(*, quick: bool, device: str = "cpu") -> list[Cell]:
    """A cell for each model."""
    rows = 64 if quick else 8192
    where = {} if device == "cpu" else {"device": device}
    measure = _measure if quick else partial(as_a_worker, _measure)
    return [
        Cell(case.name, {"rows": rows} | asdict(case) | where, partial(measure, case, rows, device))
        for case in _CASES
        if not quick or case is _CASES[-1]
    ]


def _measure(case: Case, rows: int, device: str) -> Answer:
    with torch_threads(1), full_precision():  # as in workers
        return answer(*_figures(case, rows, device))


def _figures(case: Case, rows: int, device: str) -> Iterator[Figure]:
    built = build_model(case.builder, case.arguments, input_shape=case.shape, num_outputs=_OUTPUTS, seed=0)
    model = prepare_model(built, dtype=torch.float32, device=device)
    x = torch.randn(rows, *case.shape, generator=torch.Generator().manual_seed(0)).to(device)
    best_batch = _fastest_batch(model, x)
    passes = case.draws + 1  # the unperturbed one is made too
    for label in case.options:
        spec = KernelSpec(estimator="weight", draws=_BLOCKS * case.draws, blocks=_BLOCKS, **_OPTIONS[label])
        batch = automatic_batch(model, x[:32], rows, "float32")
        decision = decide(model, x[:32], spec, batch=batch)
        features = make_feature_map(model, x[:32], spec, decision)
        best = best_seconds(
            {
                "plain": partial(_infer, model, x, best_batch, passes=passes),
                "perturbed": partial(_features, features, x, range(case.draws), batch),
            },
            rounds=_ROUNDS[case.draws >= _SHORT],
        )
        yield Figure(
            f"{case.name}, {label}",
            best["plain"] / best["perturbed"],
            least=0.9 if case.asked else None,
            details={
                "parameters": decision.num_parameters,
                "rows": rows,
                "batch": batch,
                "plain batch": best_batch,
                "plain s a pass": best["plain"] / passes,
                "perturbed s a pass": best["perturbed"] / passes,
                "stacked": "yes" if decision.stacked else "no",
            },
        )


def _features(features: FeatureMap, x: Tensor, draws: range, batch: int) -> object:
    return features.compute(x, torch.arange(len(x), device=x.device), draws, features.columns, batch=batch)


def _infer(model: nn.Module, x: Tensor, batch: int, *, passes: int = 1) -> None:
    with torch.no_grad():
        for _ in range(passes):
            torch.cat([model(rows) for rows in x.split(batch)])


def _fastest_batch(model: nn.Module, x: Tensor) -> int:
    """Batch of the fastest plain inference."""
    x = x[: _ROWS_TO_CHOOSE_BY[x.device.type]]
    sizes = [size for size in _BATCHES if size <= len(x)]
    seconds = best_seconds({str(size): partial(_infer, model, x, size) for size in sizes}, rounds=4)
    return min(sizes, key=lambda size: seconds[str(size)])
