"""Helpers for several tests of the library: features of a kernel made step by step, and its definition by brute force.

Everything goes through the library's own steps (decide, feature map, rows, calibration, tile), so that a test can vary
one of them. The oracle takes the library's perturbations as arrays and uses nothing else from the library.

Axes: S draws, R blocks, n (n1, n2) examples, C outputs, P parameters, N (N1, N2) rows of a kernel.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nntk_dist.kernels.estimate import KernelEstimate
from nntk_dist.kernels.prepared import Placement, prepare
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.decision import Decision, decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.features import FeatureMap, Rows, slice_rows
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.standard_errors import Calibration, sample_entries
from nntk_dist.statistics.tile_estimates import calibrate_sample, tile_estimates
from tests.oracles import brute_force
from tests.oracles.cases import case

Array = np.ndarray
KINDS = [("nonlocal", "weight"), ("nonlocal", "autodiff"), ("covariance", "auto"), ("averaged", "auto")]


def prepared_features(model: nn.Module, x: Tensor, spec: KernelSpec) -> tuple[Any, Decision]:
    """The feature map that the public functions would use, in float64; `Any`, as tests read fields of its class."""
    prepared = prepare_model(model, dtype=torch.float64, device="cpu")
    decision = decide(prepared, x, spec, batch=len(x))
    return make_feature_map(prepared, x, spec, decision), decision


def under_seeds(
    model: nn.Module, x: Tensor, spec: KernelSpec, seeds: Iterable[int]
) -> Iterator[KernelEstimate[Tensor]]:
    """The estimates of the public functions under each seed; what does not depend on it is decided once."""
    placement = Placement.of(model, x)
    inputs = [placement.take(x, "x1")]
    prepared = prepare(model, inputs, spec, placement)
    private = prepare_model(model, dtype=placement.dtype, device=placement.device)
    for seed in seeds:
        own = replace(spec, seed=seed)
        features = make_feature_map(private, inputs[0], own, prepared.decision)
        yield replace(prepared, spec=own, features=features).estimate(inputs)


def all_rows(features: FeatureMap, x: Tensor) -> dict[str, Tensor]:
    """Features of these inputs under all draws."""
    return features.compute(x, torch.arange(len(x)), range(features.num_draws), features.columns, batch=len(x))


def small(kind: str, estimator: str, outputs: str | int = "trace", name: str = "tanh_mlp") -> tuple[KernelSpec, Any]:
    """A kernel of 16 draws in 4 blocks over five examples: its settings and its features."""
    design = "antithetic" if kind == "nonlocal" else "iid"
    spec = KernelSpec(kind=kind, estimator=estimator, outputs=outputs, gamma=0.6, design=design, draws=16, blocks=4)
    return spec, prepared_features(case(name).build(), case(name).inputs(5), spec)[0]


def two_row_sets(features: FeatureMap, name: str = "tanh_mlp") -> tuple[Rows, Rows]:
    """Five examples and four others."""
    return all_rows(features, case(name).inputs(5)), all_rows(features, case(name).inputs(4, seed=7))


def calibration_of(features: FeatureMap, rows: Rows, others: Rows, spec: KernelSpec) -> Calibration:
    """The calibration of a whole kernel."""
    sizes = [len(next(iter(part.values()))) for part in (rows, others)]
    first, second = sample_entries(spec.seed, *sizes)
    sampled = slice_rows(rows, first), slice_rows(others, second)
    return calibrate_sample(features, [sampled], spec.meeting)


def estimates_of(features: FeatureMap, rows: Rows, others: Rows, spec: KernelSpec) -> dict[str, Tensor]:
    """`plugin`, `unbiased` and `stderr` of a whole kernel as one tile."""
    calibration = calibration_of(features, rows, others, spec)
    return tile_estimates(features, [(rows, others)], spec.meeting, calibration, spec.scale)


def spec_perturbations(spec: KernelSpec, estimator: str, model: nn.Module) -> tuple[Array, Array]:
    """z_s as `weight` uses them and U^{1/P} z_s as `autodiff` does, (S, P) each."""
    drawing = spec.drawing(estimator, select_parameters(model, spec.parameters), model)
    everything = range(drawing.num_draws)
    z = drawing.perturbations(everything, dtype=torch.float64)
    return z.numpy(), (z * drawing.shrinkage(everything)[:, None]).numpy()


@dataclass(frozen=True)
class Definition:
    """A kernel and its error by definition, computed from the draws."""

    plugin: Array
    unbiased: Array | None
    stderr: Array
    products: Array


def draws_by_definition(
    model: nn.Module, x: Tensor, spec: KernelSpec, estimator: str, patterns: tuple[str, ...]
) -> Array:
    """g_s(x) of every draw, (S, n, C, P)."""
    function, theta = brute_force.function_of_parameters(model, x, patterns)
    z, shrunk = spec_perturbations(spec, estimator, model)
    if estimator == "weight":
        return brute_force.weight_draws(function, theta, z)
    return brute_force.gradient_draws(model, x, shrunk, patterns)


def by_definition(model: nn.Module, x1: Tensor, x2: Tensor, spec: KernelSpec, estimator: str) -> Definition:
    """Compute a kernel and its error by loops over draws, blocks and entries."""
    first = draws_by_definition(model, x1, spec, estimator, spec.parameters)
    second = draws_by_definition(model, x2, spec, estimator, spec.parameters)
    block = np.arange(len(first)) * spec.blocks // len(first)
    if spec.kind == "nonlocal":
        means = brute_force.block_means(first, block), brute_force.block_means(second, block)
        products = brute_force.block_products(*means, spec.outputs)
        plugin = brute_force.plugin(*means, spec.outputs)
        stderr = _stderr(products, estimator)
        return Definition(plugin, brute_force.unbiased(products), stderr, products)
    # Each draw with itself: ⟨g_s, g_s'⟩ = P² Δ Δ'/|z|², which has one factor P too many for the covariance.
    share = 1.0 / first.shape[-1] if spec.kind == "covariance" else 1.0
    each = np.stack([share * brute_force.kernel_of(a, b, spec.outputs) for a, b in zip(first, second, strict=True)])
    kernels = np.stack([each[block == r].mean(0) for r in range(spec.blocks)])
    return Definition(each.mean(0), None, kernels.std(0, ddof=1) / np.sqrt(spec.blocks), kernels)


def _stderr(products: Array, estimator: str) -> Array:
    """The calibrated standard error. If all blocks agree: NaN for differences (unknown), 0 for gradients (exact)."""
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 for a kernel without any noise
        stderr = brute_force.calibrated_stderr(products)
    return stderr if estimator == "weight" else np.nan_to_num(stderr, nan=0.0)


def assert_equal(
    ours: Tensor | Array, expected: Tensor | Array, relative: float = 1e-10, *, scale: float | None = None
) -> None:
    """Equal within `relative` times the largest expected entry (or `scale`); NaN in exactly the expected entries."""
    expected = np.asarray(expected)
    scale = float(np.nanmax(np.abs(expected))) if scale is None else scale
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=relative * scale)
