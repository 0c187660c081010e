"""The ordinary tangent kernel, and what a kernel made of many gradients costs beside it.

The network is an MLP 784-512-512-10, its ten outputs traced. `prepared` is the repeat of what was set up once (features
and all their products; the counterpart of a compiled function), `whole call` the public function, which probes the
model and checks its layers' rules every time. The recipe of torch.func follows its documentation: Jacobians of all
examples and their product, with one Jacobian if both row sets are the same.

Axes: n examples, S draws, R blocks, C outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from nntk_dist import local_kernel, nonlocal_kernel
from nntk_dist.kernels.tiles import HeldRows, whole_kernel
from nntk_dist.layers.sketches.sketch import AUTO_COLUMNS
from nntk_dist.models.builders import build_model
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.features import FeatureMap
from nntk_dist.products.wanted import Wanted
from nntk_dist.runtime.precision import full_precision
from nntk_dist.runtime.threads import torch_threads
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.standard_errors import Calibration
from nntk_dist.statistics.tile_estimates import tile_estimates
from scripts.benchmarks.figures import Figure, answer, best_seconds
from scripts.studies.cells import Answer, Cell

BLOCKS = 8
LOCAL = KernelSpec(kind="local", statistic="plugin")
NONLOCAL = KernelSpec(gamma=0.05, draws=BLOCKS, blocks=BLOCKS, statistic="plugin")
_JACOBIANS_AT_ONCE = 3  # one Jacobian, its parts, and the copy for the product
_SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Effort:
    """Sizes: widths of the network, n, rounds that take turns; n, widths and draws of the crossover."""

    widths: tuple[int, ...]
    num_inputs: int
    num_examples: int
    num_crossing: int
    rounds: int
    crossing_widths: tuple[int, ...]
    crossing_draws: tuple[int, ...]
    sketch_rows: int


FULL = Effort((512, 512), 784, 512, 256, 5, (32, 32), (8, 16, 32, 64, 128), 1024)
QUICK = Effort((16, 16), 20, 32, 16, 2, (8, 8), (8, 32), 32)


def cells(*, quick: bool, device: str = "cpu") -> list[Cell]:
    """Each question on one thread and on two; on one if it has to be quick, or if a GPU does the work."""
    effort = QUICK if quick else FULL
    questions: dict[str, Callable[[Effort, str], list[Figure]]] = {
        "local": _local,
        "nonlocal": _nonlocal,
        "crossover": _crossover,
        "sketch": _sketch,
    }
    result = []
    where = {} if device == "cpu" else {"device": device}
    for threads in (1,) if quick or device != "cpu" else (1, 2):
        for name, question in questions.items():
            settings = {"threads": threads, "effort": vars(effort), "blocks": BLOCKS} | where
            result.append(Cell(f"{name}, {threads} threads", settings, _on(threads, question, effort, device)))
    return result


def _on(
    threads: int, question: Callable[[Effort, str], list[Figure]], effort: Effort, device: str
) -> Callable[[], Answer]:
    def compute() -> Answer:
        with torch_threads(threads), full_precision():  # as in the public functions
            figures = question(effort, device)
        return answer(*(replace(figure, what=f"{figure.what}; {threads} thread(s)") for figure in figures))

    return compute


def problem(
    effort: Effort, n: int, widths: tuple[int, ...] | None = None, device: str = "cpu"
) -> tuple[nn.Module, Tensor]:
    """The network, prepared, and examples."""
    arguments = {"widths": list(effort.widths if widths is None else widths), "activation": "relu"}
    model = build_model("mlp", arguments, input_shape=(effort.num_inputs,), num_outputs=10, seed=0)
    x = torch.randn(n, effort.num_inputs, generator=torch.Generator().manual_seed(1))
    return prepare_model(model, dtype=torch.float32, device=device), x.to(device)


def prepared(model: nn.Module, x: Tensor, spec: KernelSpec) -> tuple[FeatureMap, Callable[[], Tensor]]:
    """The features of a kernel, and a function that computes them and the whole kernel anew."""
    features = make_feature_map(model, x, spec, decide(model, x, spec, batch=len(x)))
    ids, draws = torch.arange(len(x), device=x.device), range(features.num_draws)

    def compute() -> Tensor:
        rows = features.compute(x, ids, draws, features.columns)
        return whole_kernel(features, HeldRows(features, rows, None), spec)[0].plugin

    return features, compute


def recipe(model: nn.Module, x: Tensor) -> Tensor:
    """Σ_c ⟨∇f_c, ∇f'_c⟩ from the Jacobians of all examples, by torch.func."""
    parameters = dict(model.named_parameters())

    def one(values: Mapping[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, dict(values), (example[None],))[0]

    jacobians = vmap(jacrev(one), (None, 0))(parameters, x)
    products = [torch.einsum("Naf,Maf->NM", each.flatten(2), each.flatten(2)) for each in jacobians.values()]
    return torch.stack(products).sum(0)


def num_fitting(model: nn.Module, most: int) -> int:
    """Examples whose Jacobians fit into half of the memory that is free: a power of two times less than asked."""
    numbers = 10 * sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    allowed = _SHARE_OF_MEMORY * free / (4 * _JACOBIANS_AT_ONCE * numbers)
    fitting = most
    while fitting > 1 and fitting > allowed:
        fitting //= 2
    return fitting


def _local(effort: Effort, device: str) -> list[Figure]:
    """Against the recipe, at the largest n at which that fits into memory."""
    model, x = problem(effort, effort.num_examples, device=device)
    n = num_fitting(model, len(x))
    _, few = prepared(model, x[:n], LOCAL)
    _, all_of_them = prepared(model, x, LOCAL)
    actions = {
        "recipe": lambda: recipe(model, x[:n]),
        "prepared": few,
        "whole call": lambda: local_kernel(model, x[:n]),
        "prepared, all": all_of_them,
        "whole call, all": lambda: local_kernel(model, x),
    }
    distance = float((few() - recipe(model, x[:n])).norm() / few().norm())
    seconds = best_seconds(actions, rounds=effort.rounds)
    details: dict[str, Any] = {"n of the recipe": n, "n of all": len(x), "relative difference": distance}
    details |= {f"seconds {name}": value for name, value in seconds.items()}
    return [
        Figure("torch.func's Jacobian recipe / local kernel, prepared", seconds["recipe"] / seconds["prepared"], 50.0,
               details=details),
        Figure("torch.func's Jacobian recipe / local kernel, whole call", seconds["recipe"] / seconds["whole call"]),
    ]  # fmt: skip


def _nonlocal(effort: Effort, device: str) -> list[Figure]:
    """One draw a block: R times the features, and products of all pairs of blocks."""
    model, x = problem(effort, effort.num_examples, device=device)
    _, local = prepared(model, x, LOCAL)
    features, nonlocal_ = prepared(model, x, NONLOCAL)
    calls = {
        "local": local,
        "nonlocal": nonlocal_,
        "local, whole call": lambda: local_kernel(model, x),
        "nonlocal, whole call": lambda: nonlocal_kernel(
            model, x, gamma=0.05, draws=BLOCKS, blocks=BLOCKS, statistic="plugin", estimator="autodiff"
        ),
    }
    seconds = best_seconds(calls, rounds=max(1, effort.rounds // 2))
    details: dict[str, float] = {"n": len(x), "R": BLOCKS, "draws": features.num_draws}
    details |= {f"seconds {name}": value for name, value in seconds.items()}
    whole = seconds["nonlocal, whole call"] / seconds["local, whole call"]
    return [
        Figure("nonlocal kernel with standard errors / local kernel, prepared",
               seconds["nonlocal"] / seconds["local"], most=float(BLOCKS**2), details=details),
        Figure("nonlocal kernel with standard errors / local kernel, whole calls", whole, most=float(BLOCKS**2)),
    ]  # fmt: skip


def _crossover(effort: Effort, device: str) -> list[Figure]:
    """Tiles from layers and from means over a ladder of draws, of row sets that are ready, and which `auto` takes."""
    model, x = problem(effort, effort.num_crossing, effort.crossing_widths, device)
    figures = []
    for draws in effort.crossing_draws:
        actions, sites = {}, 0
        for contraction in ("layered", "means", "auto"):
            spec = replace(NONLOCAL, draws=draws, contraction=contraction)
            actions[contraction], sites = _tile(model, x, spec)
        seconds = best_seconds(actions, rounds=effort.rounds)
        best = min(seconds["layered"], seconds["means"])
        details: dict[str, float] = {"n": len(x), "layers that auto leaves in factors": sites}
        details |= {f"seconds {name}": value for name, value in seconds.items()}
        figures.append(Figure(f"tiles by auto / the better of layers and means, S = {draws}",
                              seconds["auto"] / best, most=1.2, details=details))  # fmt: skip
    return figures


def _tile(model: nn.Module, x: Tensor, spec: KernelSpec) -> tuple[Callable[[], object], int]:
    """What computes the tile of all rows with themselves, and how many layers are left in factors."""
    features = make_feature_map(model, x, spec, decide(model, x, spec, batch=len(x)))
    ids = torch.arange(len(x), device=x.device)
    rows = features.compute(x, ids, range(features.num_draws), features.columns)
    ready = features.prepare(rows, Wanted(stderr=True))
    calibration = Calibration(1.0, 0.1, 1)
    sites = sum(name.startswith("input_") for name in rows)
    return lambda: tile_estimates(features, [(ready, ready)], spec.meeting, calibration, spec.scale), sites


def _sketch(effort: Effort, device: str) -> list[Figure]:
    """The rate of sketching against a plain matrix product of the same operations, both sides of every layer."""
    widths = tuple(width // 2 for width in effort.widths)
    model, x = problem(effort, effort.sketch_rows, widths, device)
    spec = KernelSpec(gamma=0.05, draws=4, blocks=4, contraction="sketch", sketch=2 * AUTO_COLUMNS)
    features = make_feature_map(model, x, spec, decide(model, x, spec, batch=len(x)))
    ids, batch = torch.arange(len(x), device=x.device), min(512, len(x))
    sizes = [(p.shape[1], p.shape[0]) for p in model.parameters() if p.ndim == 2]
    # the layer before the readout is sketched from one number a unit
    inner = sum(i + (o if index == len(sizes) - 2 else 10 * o) for index, (i, o) in enumerate(sizes))
    left, right = torch.randn(len(x), inner).to(x), torch.randn(inner, 2 * AUTO_COLUMNS).to(x)
    seconds = best_seconds(
        {
            "product": lambda: left @ right,
            "features": lambda: features.compute(x, ids, range(4), features.columns, batch=batch),
        },
        rounds=max(1, effort.rounds // 2),
    )
    details = {"rows": len(x), "draws": 4, "k": 2 * AUTO_COLUMNS, "rows a second": len(x) / seconds["features"]}
    details |= {f"seconds {name}": value for name, value in seconds.items()}
    what = "four matrix products of the sketch's operations / features, passes and draws included"
    return [Figure(what, 4 * seconds["product"] / seconds["features"], details=details)]
