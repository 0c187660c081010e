"""Variance reduction: the error of the same draws with it and without, and the passes that either takes for 5 %.

Networks with jumps on handwritten digits, `trace`, 256 draws in 8 blocks under several seeds. The error is the standard
deviation over seeds, relative to the mean kernel with variance reduction, both as Frobenius norms of the whole kernel.
The draws at 5 % follow from a law error² = a²/S² + b²/S through two numbers of draws. Forward equivalents are
evaluations of the network on all examples: S + 1 without variance reduction, and with it as many as the costs of the
features say: pilot passes with two more for each output, and what it takes to set units to their other values.

Axes: S draws, C outputs, T seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nntk_dist.models.builders import build_model
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.block_sums import Meeting
from nntk_dist.products.wanted import Wanted
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.tile_estimates import tile_estimates
from scripts.studies.cells import Answer, Cell
from scripts.studies.cost import digits
from tests.harness.tools import all_rows

DRAWS, FEW_DRAWS, BLOCKS, TARGET = 256, 32, 8, 0.05
GAMMAS = (0.01, 0.05, 0.2)
EXAMPLES = 32
_SEEDS, _QUICK_SEEDS = 5, 2


def _perceptron(widths: Sequence[int], outputs: int) -> nn.Module:
    arguments = {"widths": list(widths), "activation": "sign"}
    return build_model("mlp", arguments, input_shape=(64,), num_outputs=outputs, seed=0)


def _convnet() -> nn.Module:
    arguments = {"channels": [8, 16], "activation": {"name": "quantize", "levels": 16}}
    return build_model("cnn", arguments, input_shape=(1, 8, 8), num_outputs=10, seed=0)


NETWORKS: MappingProxyType[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "sign, 64-256-256-10": partial(_perceptron, (256, 256), 10),
        "sign, 64-96-96-96-5": partial(_perceptron, (96, 96, 96), 5),
        "sign, 64-300-300-1": partial(_perceptron, (300, 300), 1),
        "4-bit activations, convnet": _convnet,
    }
)


def cells(*, quick: bool) -> list[Cell]:
    """A cell for each network and range."""
    seeds = _QUICK_SEEDS if quick else _SEEDS
    result = []
    for name in list(NETWORKS)[1:2] if quick else NETWORKS:
        for gamma in GAMMAS[1:2] if quick else GAMMAS:
            settings = {
                "network": name, "gamma": gamma, "draws": [FEW_DRAWS, DRAWS], "blocks": BLOCKS, "seeds": seeds,
                "examples": EXAMPLES,
            }  # fmt: skip
            result.append(Cell(f"{name}, γ = {gamma}", settings, partial(_study, name, gamma, seeds)))
    return result


def _study(name: str, gamma: float, seeds: int) -> Answer:
    """Everything about one network and range."""
    model, x = prepare_model(NETWORKS[name](), dtype=torch.float32, device="cpu"), digits(EXAMPLES)
    x = x.reshape(-1, 1, 8, 8) if "convnet" in name else x
    kernels: dict[tuple[str, int], Tensor] = {}
    passes: dict[tuple[str, int], float] = {}
    done = ""
    for reduction in ("auto", "none"):
        for draws in (FEW_DRAWS, DRAWS):
            contraction = "means" if "convnet" in name else "layered"  # exact, and the faster one for few examples
            options: dict[str, Any] = {"estimator": "activation", "statistic": "unbiased", "contraction": contraction}
            spec = KernelSpec(gamma=gamma, draws=draws, blocks=BLOCKS, variance_reduction=reduction, **options)
            decision = decide(model, x, spec, batch=len(x))
            features: Any = make_feature_map(model, x, spec, decision)
            done = decision.contraction if reduction == "auto" else done
            per_draw = features.costs(Meeting(), Wanted(stderr=False)).passes_per_draw
            passes[reduction, draws] = 1.0 + draws * per_draw
            found = []
            for seed in range(seeds):
                own = replace(features, drawing=replace(features.drawing, seed=seed))
                rows = all_rows(own, x)
                found.append(tile_estimates(own, [(rows, rows)], spec.meeting, None, spec.scale)["unbiased"])
            kernels[reduction, draws] = torch.stack(found)
    reference = kernels["auto", DRAWS].mean(0)
    errors = {key: _scatter(each, reference) for key, each in kernels.items()}
    distance = float((kernels["none", DRAWS].mean(0) - reference).norm() / reference.norm())
    return {
        "done": done,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "errors": {f"{reduction} {draws}": error for (reduction, draws), error in errors.items()},
        "passes": {f"{reduction} {draws}": count for (reduction, draws), count in passes.items()},
        "forwards_at_target": {reduction: _forwards(reduction, errors, passes) for reduction in ("auto", "none")},
        "distance": distance,
        "expected_distance": math.hypot(errors["none", DRAWS], errors["auto", DRAWS]) / math.sqrt(seeds),
    }


def _scatter(kernels: Tensor, reference: Tensor) -> float:
    """The standard deviation over seeds, relative to the reference."""
    square = (kernels - kernels.mean(0)).square().sum((1, 2)).mean() * len(kernels) / (len(kernels) - 1)
    return float(square.sqrt() / reference.norm())


def _forwards(reduction: str, errors: dict[tuple[str, int], float], passes: dict[tuple[str, int], float]) -> float:
    """Forward equivalents at 5 %, by the law through both numbers of draws and the passes of a draw at the nearer."""
    few, many = errors[reduction, FEW_DRAWS], errors[reduction, DRAWS]
    # a²/S² + b²/S through two points
    matrix = np.array([[FEW_DRAWS**-2.0, 1.0 / FEW_DRAWS], [DRAWS**-2.0, 1.0 / DRAWS]])
    noise, signal = np.maximum(np.linalg.solve(matrix, [few**2, many**2]), 0.0)
    draws = (signal + math.sqrt(signal**2 + 4 * TARGET**2 * noise)) / (2 * TARGET**2)
    unit = BLOCKS * math.ceil(max(draws, 1.0) / BLOCKS)
    nearer = FEW_DRAWS if unit <= FEW_DRAWS else DRAWS
    return 1.0 + unit * (passes[reduction, nearer] - 1.0) / nearer
