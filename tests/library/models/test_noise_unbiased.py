"""Kernels of units with noise against enumeration of masks and closed forms: unbiased, with the stated coverage.

Features of all draws are computed directly in one step, as in `many_seeds`. With dropout they equal the library's, as a
test checks; with Brownian paths, draws use the paths of different units instead of different groups.

Axes: T seeds, S draws, R blocks, n examples, P parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import BrownianActivation, Dropout, fixed_noise, nonlocal_kernel
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import plan_for
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.philox import uniform
from nntk_dist.sampling.streams import Stream
from nntk_dist.spec import KernelSpec
from tests.harness.many_seeds import SLOPES, Problem, Runs, check
from tests.harness.tools import all_rows, estimates_of
from tests.oracles import closed_forms, noise
from tests.oracles.cases import UNIT_ACTIVATIONS, Activate
from tests.oracles.statistics import assert_agrees, assert_coverage, assert_power, covered

P, DROPOUT, GAMMA = 5, 0.5, 1.5
BOUNDS = (0.92, 0.98)


@dataclass(frozen=True)
class Thinned:
    """φ(θ·(m∘x)/(1 − p)): a unit whose inputs drop out."""

    unit: str
    kind: str = "nonlocal"

    @property
    def num_parameters(self) -> int:
        """The number of parameters: fewer if the closed form of a mask is slow."""
        return P if self.kind == "nonlocal" else P - 1

    @property
    def problem(self) -> Problem:
        return Problem(self.unit, self.num_parameters, gamma=GAMMA)

    @property
    def x(self) -> Tensor:
        return torch.from_numpy(self.problem.x)

    def model(self) -> nn.Module:
        layer = nn.Linear(self.num_parameters, 1, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.problem.theta)[None])
        return nn.Sequential(Dropout(DROPOUT), layer, Activate(UNIT_ACTIVATIONS[self.unit])).eval()

    @cache  # noqa: B019 — of a few frozen values
    def exact(self) -> np.ndarray:
        return noise.dropout_kernel(self.kind, self.unit, self.problem.theta, self.problem.x, GAMMA, DROPOUT)

    def without_noise(self) -> np.ndarray:
        """The same kernel of the unit with all of its inputs."""
        return replace(self.problem, kind=self.kind).exact()

    def local(self) -> np.ndarray:
        return noise.dropout_local_kernel(self.unit, self.problem.theta, self.problem.x, DROPOUT)


def feature_map(thinned: Thinned, spec: KernelSpec, estimator: str) -> Any:
    """The library's feature map of the model for an estimator."""
    model = prepare_model(thinned.model(), dtype=torch.float64, device="cpu")
    assert isinstance(spec.draws, int)
    return make_feature_map(model, thinned.x, spec, plan_for(estimator, model, thinned.x, spec))


def filled_in(thinned: Thinned, drawing: Drawing, features: Any) -> dict[str, Tensor]:
    """Compute what the features' `compute` returns for all draws in one step; masks are made as the contract says."""
    everything = range(drawing.num_draws)
    groups = torch.arange(drawing.num_draws // drawing.group_size)
    kept = uniform(drawing.seed, Stream.MODEL, groups, thinned.num_parameters, draw=0) > DROPOUT
    masks = kept.repeat_interleave(drawing.group_size, 0).double() / (1 - DROPOUT)
    inputs, theta = thinned.x[:, None] * masks, torch.from_numpy(thinned.problem.theta)
    z = drawing.perturbations(everything, dtype=torch.float64)
    if isinstance(features, DifferenceFeatures):
        unit = UNIT_ACTIVATIONS[thinned.unit]
        changes = unit((inputs * (theta + z)).sum(2)) - unit((inputs * theta).sum(2))
        return {"differences": changes[:, :, None]}
    shrunk = z * drawing.shrinkage(everything)[:, None]
    gradients = SLOPES[thinned.unit]((inputs * (theta + shrunk)).sum(2))[:, :, None] * inputs
    means = gradients.unflatten(1, (-1, features.draws_per_slot)).mean(2)
    return {"dense": means[:, :, None]}


Fill = Callable[[Drawing], dict[str, Tensor]]


def spec_of(thinned: Thinned, estimator: str, design: str, seed: int = 0) -> KernelSpec:
    contraction = "means" if estimator == "autodiff" else "auto"
    words = {} if thinned.kind != "nonlocal" else {"estimator": estimator}
    draws = 280 if design == "orthogonal" else 256
    return KernelSpec(thinned.kind, GAMMA, design=design, draws=draws, seed=seed, contraction=contraction, **words)


def runs(features: Any, spec: KernelSpec, fill: Fill, num_seeds: int) -> Runs:
    """The kernel under each of the seeds."""
    results = []
    for seed in range(num_seeds):
        drawing = replace(features.drawing, seed=seed)
        rows = fill(drawing)
        result = estimates_of(replace(features, drawing=drawing), rows, rows, replace(spec, seed=seed))
        results.append((result.get("unbiased", result["plugin"]), result["stderr"], result["plugin"]))
    return Runs(*(torch.stack(parts).numpy() for parts in zip(*results, strict=True)))


CASES = [
    ("nonlocal", "sign", "weight", "iid", 1000),
    ("nonlocal", "relu", "autodiff", "iid", 1000),
    ("nonlocal", "relu", "weight", "antithetic", 700),
    ("nonlocal", "relu", "weight", "orthogonal", 400),
    ("covariance", "sign", "weight", "antithetic", 200),
    ("averaged", "relu", "autodiff", "iid", 200),
]


@pytest.mark.statistical
@pytest.mark.parametrize(("kind", "unit", "estimator", "design", "num_seeds"), CASES)
def test_dropout_against_all_masks(kind: str, unit: str, estimator: str, design: str, num_seeds: int):
    """Unbiased for the mean function; nominal 95 % intervals contain its kernel as often as they should.

    The test has the power to reject both that kernel's local version and the kernel without noise.
    """
    thinned = Thinned(unit, kind)
    spec = spec_of(thinned, estimator, design)
    features = feature_map(thinned, spec, estimator)
    result = runs(features, spec, lambda drawing: filled_in(thinned, drawing, features), num_seeds)
    stderr = check(result.centre, thinned.exact())
    for other in (thinned.local(), thinned.without_noise()):
        assert_power(stderr, thinned.exact(), other)
    if num_seeds == 1000:
        assert_coverage(covered(result.centre, thinned.exact(), result.stderr, 8), BOUNDS)


@pytest.mark.parametrize(("kind", "unit", "estimator", "design", "num_seeds"), CASES)
def test_features_filled_in_are_those_of_the_library(kind: str, unit: str, estimator: str, design: str, num_seeds: int):
    thinned = Thinned(unit, kind)
    features = feature_map(thinned, spec_of(thinned, estimator, design, seed=num_seeds), estimator)
    ours, filled = all_rows(features, thinned.x), filled_in(thinned, features.drawing, features)
    assert ours.keys() == filled.keys()
    for name, values in filled.items():
        torch.testing.assert_close(values, ours[name], rtol=1e-13, atol=1e-13)


@pytest.mark.statistical
def test_activation_with_dropout():
    """One run of 1,024 draws, whose error is a seventh of the mean diagonal: enough to detect masks that are missing or
    shared by draws. Another test checks exactly that draws have the masks of their groups.
    """
    thinned = Thinned("sign")
    estimate = nonlocal_kernel(
        thinned.model(), thinned.x, gamma=GAMMA, estimator="activation", draws=1024, blocks=32, design="antithetic"
    )
    assert_agrees(estimate.unbiased, thinned.exact(), estimate.stderr, 32)
    for other in (thinned.local(), thinned.without_noise()):
        with pytest.raises(AssertionError, match="standard errors"):
            assert_agrees(estimate.unbiased, other, estimate.stderr, 32)


SIGMA = 0.4


@pytest.mark.statistical
@pytest.mark.parametrize(("kind", "num_seeds"), [("nonlocal", 500), ("covariance", 200)])
def test_brownian_units_against_closed_forms(kind: str, num_seeds: int):
    """relu(θ·x) + σB(θ·x): the mean function is the relu, so the nonlocal kernel is the relu's, however rough a draw
    is. The covariance kernel adds the part of the paths.
    """
    problem = Problem("relu", P, kind, GAMMA)
    theta, x, activation = torch.from_numpy(problem.theta), torch.from_numpy(problem.x), BrownianActivation(SIGMA)
    spec = KernelSpec(kind, GAMMA, draws=256)
    layer = nn.Linear(P, 1, bias=False).double()
    model = prepare_model(nn.Sequential(layer, activation), dtype=torch.float64, device="cpu")
    features = make_feature_map(model, x, spec, plan_for("weight", model, x, spec))

    def fill(drawing: Drawing) -> dict[str, Tensor]:
        z = drawing.perturbations(range(256), dtype=torch.float64)
        base = (x @ theta)[:, None].expand(-1, 256)
        with fixed_noise(activation.eval(), drawing.seed):
            changes = activation(base + x @ z.T) - activation(base)
        return {"differences": changes[:, :, None]}

    result = runs(features, spec, fill, num_seeds)
    relu = problem.exact()
    exact = noise.brownian_covariance(problem.theta, problem.x, GAMMA, SIGMA) if kind == "covariance" else relu
    stderr = check(result.centre, exact)
    assert_power(stderr, exact, relu if kind == "covariance" else problem.local())
    assert_coverage(covered(result.centre, exact, result.stderr, 8))


@pytest.mark.statistical
def test_quadrature_of_brownian_paths_agrees_with_the_closed_form():
    problem = Problem("relu", P, gamma=GAMMA)
    paths = noise.brownian_covariance(problem.theta, problem.x, GAMMA, 1.0)
    paths -= closed_forms.covariance_kernel("relu", problem.theta, problem.x, problem.x, GAMMA)
    np.testing.assert_allclose(np.diag(paths), noise.brownian_diagonal(problem.x, GAMMA), rtol=1e-4)
