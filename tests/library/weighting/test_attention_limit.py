"""The quantity that weighted kernels estimate: E[w Δ v]/E[w] of a unit of two parameters, by quadrature.

Blocks of 8,192 draws leave a bias of order 1/8192, below the required standard errors. Small blocks make the bias
visible, and its decrease with their size. Intervals refer to the mean estimate of blocks of their size.

Axes: n examples, P = 2 parameters, R blocks, B draws of a block, T seeds.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from nntk_dist import nonlocal_kernel
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream
from nntk_dist.spec import KernelSpec
from tests.harness.many_seeds import Problem
from tests.harness.tools import prepared_features, under_seeds
from tests.oracles import quadrature
from tests.oracles.statistics import assert_agrees, assert_coverage, assert_power, covered

Array = np.ndarray
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": lambda u: np.maximum(u, 0.0), "sign": np.sign}
TEMPERATURES = {"parameter": 0.25, "output": 1.0, "output, own": 2.0, "loss": 0.3}
TARGETS = np.array([[0.3], [0.8], [-0.5]])


def weighting(score: str) -> dict[str, Any]:
    options: dict[str, Any] = {"name": score.partition(",")[0], "temperature": TEMPERATURES[score]}
    if score == "output, own":
        options["per_example"] = True
    if score == "loss":
        options["targets"] = TARGETS
    return options


def log_weights(problem: Problem, score: str, z: Array) -> Array:
    """score/τ of perturbations (m, P): (m, 1), or (m, n) if each example has its own."""
    activation = ACTIVATIONS[problem.unit]
    base, moved = activation(problem.theta @ problem.x.T), activation((problem.theta + z) @ problem.x.T)
    if score == "parameter":
        rows = torch.arange(16)
        both = [normal(0, Stream.ATTENTION, rows, 0, 2, draw=draw).numpy() / np.sqrt(2.0) for draw in (0, 1)]
        scores = ((both[0] @ problem.theta) @ (both[1] @ (problem.theta + z).T) / 4.0)[:, None]
    elif score == "loss":
        scores = -((moved - TARGETS[:, 0]) ** 2).mean(1, keepdims=True)
    else:
        scores = -((moved - base) ** 2) / np.mean(base**2)
        scores = scores if score == "output, own" else scores.mean(1, keepdims=True)
    return scores / TEMPERATURES[score]


@cache
def limit(problem: Problem, score: str | None) -> Array:
    """E[w Δ v]/E[w] of every example, (n, P); w = 1 without a score."""
    activation, scale = ACTIVATIONS[problem.unit], problem.gamma / np.sqrt(2.0)
    base = activation(problem.theta @ problem.x.T)

    def integrand(normals: Array) -> Array:
        z = scale * normals
        change = activation((problem.theta + z) @ problem.x.T) - base
        logs = np.zeros((len(z), 1)) if score is None else log_weights(problem, score, z)
        weights = np.exp(logs) * np.ones_like(change)
        direction = len(problem.theta) * z / (z**2).sum(1, keepdims=True)
        products = (weights * change)[:, :, None] * direction[:, None, :]
        return np.concatenate([weights, products.reshape(len(z), -1)], axis=1)

    means = quadrature.gaussian_mean(integrand, 2, tolerance=1e-6)
    count = len(problem.x)
    return means[count:].reshape(count, 2) / means[:count, None]


@pytest.mark.statistical
@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("unit", ["relu", "sign"])
@pytest.mark.parametrize("score", TEMPERATURES)
def test_large_blocks_estimate_the_ratio(score: str, unit: str, design: str):
    """They do not estimate the fixed kernel, which lies ten standard errors away."""
    problem = Problem(unit, 2)
    exact, fixed = (gradients @ gradients.T for gradients in (limit(problem, score), limit(problem, None)))
    estimate = nonlocal_kernel(
        problem.model(),
        torch.from_numpy(problem.x),
        gamma=problem.gamma,
        weighting=weighting(score),
        draws=1 << 18,
        blocks=32,
        design=design,
    )
    assert_agrees(estimate.unbiased, exact, estimate.stderr, 32)
    assert_power(estimate.stderr, exact, fixed)


def test_the_quadrature_without_a_score_is_the_closed_form():
    for unit in ("relu", "sign"):
        problem, gradients = Problem(unit, 2), limit(Problem(unit, 2), None)
        np.testing.assert_allclose(gradients @ gradients.T, problem.exact(), rtol=0, atol=1e-6)


@pytest.mark.statistical
def test_the_bias_of_a_block_falls_like_one_over_its_draws():
    """2^20 draws in blocks of 4, 8 and 16; each bias is at least ten standard errors."""
    problem, draws = Problem("relu", 2), 1 << 20
    options = {"weighting": weighting("output, own"), "design": "antithetic", "draws": draws}
    exact, x = limit(problem, "output, own"), torch.from_numpy(problem.x)
    norms = []
    for size in (4, 8, 16):
        spec = KernelSpec(gamma=problem.gamma, **options, blocks=draws // size)
        means_of, _ = prepared_features(problem.model(), x, spec)
        assert isinstance(means_of, DifferenceMeans)
        features = DifferenceFeatures(means_of.evaluator, means_of.drawing, (0,), attention=means_of.attention)
        differences = features.compute(x, torch.arange(3), range(draws), (0,), batch=3)["differences"][:, :, 0]
        z = features.drawing.perturbations(range(draws), dtype=torch.float64)
        terms = differences[:, :, None] * features.drawing.directions(z)
        means = terms.unflatten(1, (-1, size)).mean(2).numpy()
        bias, stderr = means.mean(1) - exact, means.std(1, ddof=1) / np.sqrt(means.shape[1])
        norms.append(np.linalg.norm(bias))
        assert norms[-1] > 10 * np.linalg.norm(stderr), "the bias is not resolved"
    assert 1.6 < norms[0] / norms[1] < 2.5
    assert 1.6 < norms[1] / norms[2] < 2.5


@pytest.mark.statistical
@pytest.mark.parametrize(("score", "unit"), [("output", "relu"), ("output, own", "sign")])
def test_intervals_cover_the_mean_of_the_estimator(score: str, unit: str):
    problem, seeds = Problem(unit, 2), range(250)
    spec = KernelSpec(gamma=problem.gamma, weighting=weighting(score), draws=512)
    estimates = list(under_seeds(problem.model(), torch.from_numpy(problem.x), spec, seeds))
    centres, stderr = (np.stack([getattr(each, name).numpy() for each in estimates]) for name in ("unbiased", "stderr"))
    assert_coverage(covered(centres, centres.mean(0), stderr, 8))
