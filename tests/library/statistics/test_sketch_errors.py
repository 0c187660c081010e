"""The sketch's own error: unbiased over probes, and intervals that include it, whether it or the draws dominate.

The unit is φ(aᵀWx) with a matrix of parameters, whose gradient φ' a ⊗ x is one outer product: the worst case for a
sketch. With θ = vec W it is the unit of `closed_forms` at vec(a ⊗ x). Slopes of all draws are computed directly in one
step; probes, features' sums and statistics are the library's.

Axes: T seeds, S draws, R blocks, n examples, C outputs, k columns.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.layers.sketches.sketch import Sketch
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.decision import plan_for
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.block_sums import BlockSums, Meeting
from nntk_dist.products.wanted import Wanted
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.standard_errors import calibrate, estimate
from tests.harness.many_seeds import Problem, check
from tests.harness.tools import all_rows, assert_equal, draws_by_definition
from tests.oracles import brute_force, closed_forms
from tests.oracles.cases import case
from tests.oracles.statistics import assert_coverage, assert_mean_agrees, covered

Array = np.ndarray
BLOCKS = 8
PROBLEM = Problem("relu", 4)
OUTER = np.array([0.8, -0.6])
ONE, THREE = np.array([1.0]), np.array([0.48, -0.6, 0.64])


class MatrixUnit(nn.Module):
    """f_c = b_c relu(aᵀWx), W = a ⊗ θ, a and b of length 1: one outer product (b ⊗ a) ⊗ x for every C."""

    def __init__(self, outputs: Array) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.outer(OUTER, PROBLEM.theta)))
        self.outputs = torch.from_numpy(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu((x @ self.weight.T) @ torch.from_numpy(OUTER))[:, None] * self.outputs


def gradients(outputs: Array) -> Tensor:
    """B ⊗ A ⊗ x, (n, C, 2, 4)."""
    return torch.from_numpy(np.stack([np.multiply.outer(outputs, np.outer(OUTER, x)) for x in PROBLEM.x]))


def features_of(draws: int, sketch: int, outputs: Array = ONE) -> GradientFeatures:
    spec = KernelSpec(
        estimator="autodiff", gamma=PROBLEM.gamma, draws=draws, blocks=BLOCKS, contraction="sketch", sketch=sketch
    )
    model = prepare_model(MatrixUnit(outputs), dtype=torch.float64, device="cpu")
    x = torch.from_numpy(PROBLEM.x)
    features = make_feature_map(model, x, spec, plan_for("autodiff", model, x, spec))
    assert isinstance(features, GradientFeatures)
    return features


def reseeded(features: GradientFeatures, seed: int) -> GradientFeatures:
    assert features.drawing is not None
    assert features.sketch is not None
    return replace(features, drawing=replace(features.drawing, seed=seed), sketch=replace(features.sketch, seed=seed))


def filled_in(features: GradientFeatures) -> dict[str, Tensor]:
    """Compute what `compute` returns for the unit, for all draws in one step: (n, R, k)."""
    assert features.drawing is not None
    assert features.sketch is not None
    everything = range(features.num_draws)
    z = (
        features.drawing.perturbations(everything, dtype=torch.float64)
        * features.drawing.shrinkage(everything)[:, None]
    )
    model = features.evaluator.model
    assert isinstance(model, MatrixUnit)
    flat = gradients(ONE).flatten(1)
    theta = torch.from_numpy(np.outer(OUTER, PROBLEM.theta).ravel())
    slopes = (flat @ (theta + z).T > 0).double().unflatten(1, (BLOCKS, -1)).mean(2)
    sketched = features.sketch.of_gradient("weight", gradients(model.outputs.numpy()))
    return {"sketch": slopes[:, :, None] * sketched[:, None]}


def estimates(features: GradientFeatures, seeds: range) -> tuple[Array, Array]:
    """U and its standard error under each seed, (T, 9): all pairs of examples, as paired row sets."""
    own = [reseeded(features, seed) for seed in seeds]
    rows = torch.stack([filled_in(one)["sketch"] for one in own])  # (T, n, R, k)
    left, right = rows.repeat_interleave(3, 1).flatten(0, 1), rows.repeat(1, 3, 1, 1).flatten(0, 1)
    pair, meeting = ({"sketch": left}, {"sketch": right}), Meeting(paired=True)
    sums = features.block_sums(*pair, meeting, Wanted(stderr=True))
    products = features.block_products(*pair, meeting)
    results = []
    for part in torch.arange(len(left)).split(9):
        one = BlockSums(BLOCKS, *(a[..., part] for a in (sums.within, sums.between, sums.by_block, sums.by_group)))
        results.append(estimate(one, calibrate(products[..., part], pair_blocks=True, by_group=one.by_group)))
    return np.stack([np.asarray(r.unbiased) for r in results]), np.stack([np.asarray(r.stderr) for r in results])


@pytest.mark.statistical
@pytest.mark.parametrize(("draws", "sketch", "outputs"), [(256, 64, ONE), (256, 256, THREE), (64, 1024, THREE)])
def test_intervals_count_the_error_of_draws_and_of_the_sketch(draws, sketch, outputs):
    """1,000 seeds of draws and probes: the sketch dominates at k = 64, draws at k = 1024, both matter between."""
    features = features_of(draws, sketch, outputs)
    portions = [estimates(features, range(start, start + 100)) for start in range(0, 1000, 100)]
    values, errors = (np.concatenate(parts) for parts in zip(*portions, strict=True))
    flat = gradients(ONE).flatten(1).numpy()
    theta = np.outer(OUTER, PROBLEM.theta).ravel()
    exact = closed_forms.nonlocal_kernel("relu", theta, flat, flat, PROBLEM.gamma).ravel()
    assert_coverage(covered(values, exact, errors, BLOCKS), (0.92, 0.98))
    check(values, exact)


@pytest.mark.statistical
@pytest.mark.parametrize("outputs", [ONE, THREE])
def test_what_is_filled_in_is_what_the_library_computes(outputs):
    features = features_of(64, 64, outputs)
    own = reseeded(features, 5)
    assert_equal(all_rows(own, torch.from_numpy(PROBLEM.x))["sketch"], filled_in(own)["sketch"])


@pytest.mark.statistical
@pytest.mark.parametrize("outputs", [ONE, THREE])
def test_the_variance_of_one_outer_product_is_the_one_stated(outputs):
    """2/k ((2 − Σa⁴)(2 − Σb⁴) − 1) of |G|⁴, sides a and b of length 1: up to 6/k; 2,000 sketches know it to 5 %."""
    gradient = gradients(outputs)[:1]
    values = [
        float(Sketch(seed, 64, 8, ("weight",), joint=True).of_gradient("weight", gradient).square().sum())
        for seed in range(2000)
    ]
    size = float(gradient.square().sum())
    first, second = (2 - (side**4).sum() for side in (np.multiply.outer(outputs, OUTER), PROBLEM.x[0]))
    expected = 2 / 64 * (first * second - 1)
    assert abs(np.mean(values) / size - 1) < 4 * np.sqrt(expected / 2000)
    assert 0.85 < np.var(values) / size**2 / expected < 1.15


@pytest.mark.statistical
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["relu_mlp", "attention", "convnet", "embedding"])
def test_sketches_are_right_on_average(name, joint):
    """Over 500 sketches of the same draws, products of different blocks average to their exact contraction."""
    model, x = case(name).build(), case(name).inputs(3)
    spec = KernelSpec(estimator="autodiff", gamma=0.6, draws=4, blocks=4)
    draws = draws_by_definition(model, x, spec, "autodiff", ("*",))
    space = select_parameters(model)
    parts = torch.from_numpy(draws).flatten(0, 1)  # (R·n, C, P)
    named = [(name, part) for name, part in space.split(parts).items()]
    values = []
    for seed in range(500):
        sketch = Sketch(seed, 64, 8, space.names, joint=joint)
        sketched = torch.stack([sketch.of_gradient(name, part) for name, part in named]).sum(0)
        means = sketched.unflatten(0, draws.shape[:2]).flatten(2)
        total = means.sum(0)
        values.append((total @ total.T - torch.einsum("rnk,rmk->nm", means, means)).numpy() / 12)
    assert_mean_agrees(np.stack(values), brute_force.unbiased(brute_force.block_products(draws, draws)))
