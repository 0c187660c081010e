"""Limits that are known: small ranges give the ordinary kernel, scales differ by the square of P, and weights of draws
at a high temperature are equal.

Gradients reach the local kernel to rounding for any draws; differences reach it within their noise, which a smaller
range does not reduce, so they are judged by Student's t.

Axes: n examples, S draws, P parameters.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nntk_dist import KernelEstimate, averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel
from scripts.studies.cells import Answer, Cell
from tests.oracles.cases import case
from tests.oracles.statistics import critical_value

RANGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TEMPERATURES = (1.0, 1e1, 1e2, 1e4, 1e6, 1e8, math.inf)
MODELS = ("tanh_mlp", "relu_mlp", "convnet", "attention", "batch_norm", "embedding")
_BLOCKS, _DIFFERENCES = 16, 4096
DIFFERENCE_RANGE, FEW_DRAWS = 1e-3, 8


def cells(*, quick: bool) -> list[Cell]:
    """Two cells for each model: its small ranges, its scales."""
    models = MODELS[:2] if quick else MODELS
    small = [
        Cell(f"small ranges, {name}", {"model": name, "ranges": list(RANGES)}, partial(_small, name)) for name in models
    ]
    scales = [Cell(f"scales, {name}", {"model": name}, partial(_scales, name)) for name in models]
    names = ["relu_mlp"] if quick else ["relu_mlp", "deep_sign_mlp"]
    tried = [f"{temperature:g}" for temperature in TEMPERATURES]
    high = [
        Cell(f"temperatures, {name}", {"model": name, "temperatures": tried}, partial(_high, name)) for name in names
    ]
    return small + scales + high


def _small(name: str) -> Answer:
    """Distances from the local kernel by range, and t of differences at one range."""
    model, x = case(name).build(), case(name).inputs(4)
    local = local_kernel(model, x, outputs="full").numpy()
    few: dict[str, Any] = {"draws": FEW_DRAWS, "blocks": 4, "outputs": "full"}

    def distance(kernel: Tensor) -> float:
        return float(np.linalg.norm(kernel.numpy() - local) / np.linalg.norm(local))

    gradients = {
        "autodiff": [
            distance(nonlocal_kernel(model, x, gamma=gamma, estimator="autodiff", statistic="plugin", **few).kernel)
            for gamma in RANGES
        ],
        "averaged": [distance(averaged_kernel(model, x, gamma=gamma, **few).kernel) for gamma in RANGES],
    }
    trace = local_kernel(model, x).numpy()
    many: dict[str, Any] = {"gamma": DIFFERENCE_RANGE, "draws": _DIFFERENCES, "blocks": _BLOCKS}
    differences = {
        "weight": _student(nonlocal_kernel(model, x, estimator="weight", variance_reduction="none", **many), trace),
        "covariance": _student(covariance_kernel(model, x, **many), trace),
    }
    limit = critical_value(trace.size, _BLOCKS - 1)
    return {"distances": gradients, "differences": differences, "limit": limit, "draws": _DIFFERENCES}


def _student(estimate: KernelEstimate, local: np.ndarray) -> dict[str, float]:
    """The largest |t| against the local kernel, and the largest standard error by its mean diagonal."""
    centre = estimate.kernel if estimate.unbiased is None else estimate.unbiased
    assert estimate.stderr is not None
    stderr = estimate.stderr.numpy()
    t = np.abs(centre.numpy() - local) / stderr
    return {"t": float(t.max()), "largest_error": float(stderr.max() / np.diag(local).mean())}


def _scales(name: str) -> Answer:
    """What is raw, times P², against what is localized: the largest difference by the largest entry, for every kind."""
    model, x = case(name).build(), case(name).inputs(4)
    kinds: dict[str, Callable[..., KernelEstimate]] = {
        "nonlocal": nonlocal_kernel,
        "covariance": covariance_kernel,
        "averaged": averaged_kernel,
    }
    result = {}
    for kind, function in kinds.items():
        options: dict[str, Any] = {"gamma": 0.5, "draws": 8, "blocks": 4}
        localized, raw = (function(model, x, scale=scale, **options) for scale in ("localized", "raw"))
        difference = (raw.kernel * localized.num_parameters**2 - localized.kernel).abs().max()
        result[kind] = float(difference / localized.kernel.abs().max())
    return {"num_parameters": sum(p.numel() for p in model.parameters()), "differences": result}


def _high(name: str) -> Answer:
    """‖K_τ − K‖/‖K‖ of weighted and fixed kernels with the same draws, by score and temperature."""
    model, x = case(name).build(), case(name).inputs(6)
    options: dict[str, Any] = {"gamma": 0.5, "estimator": "weight", "variance_reduction": "none", "draws": 256}
    fixed = nonlocal_kernel(model, x, statistic="plugin", **options).kernel

    def distance(score: dict[str, object], temperature: float) -> float:
        weighting = score | {"temperature": temperature}
        kernel = nonlocal_kernel(model, x, statistic="plugin", weighting=weighting, **options).kernel
        return float((kernel - fixed).norm() / fixed.norm())

    labels = torch.arange(len(x)) % model(x).shape[1]
    scores: dict[str, dict[str, object]] = {
        "parameter": {"name": "parameter"},
        "output": {"name": "output"},
        "output, per example": {"name": "output", "per_example": True},
        "loss": {"name": "loss", "targets": labels},
    }
    return {label: [distance(score, temperature) for temperature in TEMPERATURES] for label, score in scores.items()}
