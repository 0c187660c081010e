"""Weighted kernels against the definition: every score, design and statistic, by loops over draws and blocks in NumPy.

Axes: S draws, R blocks, n examples, C outputs, P parameters, d numbers of a query or key.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nntk_dist.estimators.weight
import nntk_dist.sampling.draws
from nntk_dist import BlackBox, nonlocal_kernel
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream
from nntk_dist.spec import KernelSpec
from nntk_dist.weighting.options import Weighting
from nntk_dist.weighting.scores.parameter import key_of_query
from tests.harness.grids import pairwise
from tests.harness.tools import all_rows, assert_equal, prepared_features, spec_perturbations
from tests.oracles import attention, brute_force
from tests.oracles.cases import Case, case

Array = np.ndarray
DIMENSION = 3
SEED = 5


def nearness(theta: Tensor, moved: Tensor, base: Tensor, outputs: Tensor) -> Tensor:
    """A score for each example that uses all the arguments of a score function."""
    return -(outputs - base).abs().sum(2) - (moved - theta).square().sum(1, keepdim=True)


def mean_nearness(theta: Tensor, moved: Tensor, base: Tensor, outputs: Tensor) -> Tensor:
    return nearness(theta, moved, base, outputs).mean(1)


@dataclass(frozen=True)
class Problem:
    """A model with inputs, a reference batch and its targets; the perturbations are the library's own."""

    model: nn.Module
    x1: Tensor
    x2: Tensor
    reference: Tensor
    labels: Tensor
    numbers: Tensor

    def scores(self, score: str, spec: KernelSpec, x: Tensor) -> Array:
        """Scores of all draws, (S,), or (S, n) for the examples x."""
        function, theta = brute_force.function_of_parameters(self.model, self.reference)
        own, _ = brute_force.function_of_parameters(self.model, x)
        z, _ = spec_perturbations(spec, "weight", self.model)
        match score:
            case "parameter":
                rows = torch.arange(DIMENSION)
                both = [normal(SEED, Stream.ATTENTION, rows, 0, len(theta), draw=draw).numpy() for draw in (0, 1)]
                query, key = (matrix / np.sqrt(len(theta)) for matrix in both)
                return attention.parameter_scores(query, key, theta, z)
            case "output":
                return attention.output_scores(function, theta, z)
            case "output, own":
                return attention.output_scores(function, theta, z, own)
            case "labels" | "numbers":
                targets = self.labels if score == "labels" else self.numbers
                return attention.loss_scores(function, theta, z, targets.numpy())
        examined = own if score == "function, own" else function
        moved = np.array([-np.abs(examined(theta + each) - examined(theta)).sum(1) - each @ each for each in z])
        return moved if score == "function, own" else moved.mean(1)

    def weighting(self, score: str, temperature: float | None) -> dict[str, Any]:
        options: dict[str, Any] = {"temperature": temperature, "reference": self.reference}
        return (
            options
            | {
                "parameter": {"name": "parameter", "dimension": DIMENSION},
                "output": {"name": "output"},
                "output, own": {"name": "output", "per_example": True},
                "labels": {"name": "loss", "targets": self.labels},
                "numbers": {"name": "loss", "targets": self.numbers},
                "function": {"name": mean_nearness},
                "function, own": {"name": nearness, "per_example": True},
            }[score]
        )


# Temperatures at which weights differ by small factors and none is nearly 0.
SCORES = {
    "parameter": 0.05,
    "output": 0.3,
    "output, own": 0.5,
    "labels": 0.3,
    "numbers": 0.5,
    "function": 4.0,
    "function, own": 4.0,
}


def small() -> nn.Module:
    """Four parameters, two outputs."""
    return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh())


def problem(name: str = "tanh_mlp") -> Problem:
    entry = Case("small", small, (2,), 2) if name == "small" else case(name)
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(max(1, entry.num_outputs), (5,), generator=generator)
    numbers = torch.randn(5, entry.num_outputs, generator=generator, dtype=torch.float64)
    return Problem(entry.build(), entry.inputs(3), entry.inputs(2, seed=7), entry.inputs(5, seed=9), labels, numbers)


def assert_is_the_definition(one: Problem, score: str, spec: KernelSpec, temperature: float, estimate: Any) -> None:
    z, _ = spec_perturbations(spec, "weight", one.model)
    block = np.arange(len(z)) * spec.blocks // len(z)
    means = []
    for x in (one.x1, one.x2):
        function, theta = brute_force.function_of_parameters(one.model, x)
        scores = one.scores(score, spec, x)
        ratios = np.exp((scores.max(0) - scores.min(0)) / temperature)
        assert ratios.max() > 1.5, "the weights of a block all but agree"
        draws = attention.weighted(brute_force.weight_draws(function, theta, z), scores, block, temperature)
        means.append(brute_force.block_means(draws, block))
    products = brute_force.block_products(means[0], means[1], spec.outputs)
    assert_equal(estimate.plugin, brute_force.plugin(means[0], means[1], spec.outputs))
    assert_equal(estimate.unbiased, brute_force.unbiased(products))
    assert_equal(estimate.stderr, brute_force.calibrated_stderr(products), scale=float(estimate.plugin.abs().max()))


@pytest.mark.parametrize(
    ("score", "design", "outputs"), pairwise(SCORES, ["iid", "antithetic", "orthogonal"], ["trace", "full", 1])
)
def test_weighted_kernels_are_the_definition(score, design, outputs):
    """The two draws ±z of a pair have separate weights: the definition does not involve pairs."""
    one, temperature = problem(), SCORES[score]
    options = {"gamma": 0.6, "design": design, "draws": 16, "blocks": 4, "outputs": outputs, "seed": SEED}
    estimate = nonlocal_kernel(one.model, one.x1, one.x2, weighting=one.weighting(score, temperature), **options)
    assert estimate.estimator == "weight"
    assert_is_the_definition(one, score, KernelSpec(**options), temperature, estimate)


@pytest.mark.parametrize(
    ("score", "per_chunk"), [*((score, 1) for score in SCORES), ("output", 3), ("output, own", 3), ("function", 1000)]
)
def test_means_of_few_parameters_are_the_definition_however_draws_are_chunked(score, per_chunk, monkeypatch):
    one, temperature = problem("small"), SCORES[score]
    monkeypatch.setattr(nntk_dist.estimators.weight, "METRIC_DRAWS", 0)
    monkeypatch.setattr(nntk_dist.sampling.draws, "DRAW_ELEMENTS", 10 * per_chunk)
    options = {"gamma": 1.0, "draws": 32, "blocks": 4, "seed": SEED}
    weighting = one.weighting(score, temperature)
    features, _ = prepared_features(one.model, one.x1, KernelSpec(weighting=weighting, estimator="weight", **options))
    assert isinstance(features, DifferenceMeans)
    estimate = nonlocal_kernel(one.model, one.x1, one.x2, weighting=weighting, **options)
    assert_is_the_definition(one, score, KernelSpec(**options), temperature, estimate)


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("score", ["output", "function", "function, own"])
def test_differences_do_not_depend_on_how_draws_are_chunked(score, per_chunk, monkeypatch):
    one = problem()
    options = {"gamma": 0.6, "draws": 16, "blocks": 4, "weighting": one.weighting(score, SCORES[score])}
    whole = nonlocal_kernel(one.model, one.x1, **options)
    monkeypatch.setattr(nntk_dist.sampling.draws, "DRAW_ELEMENTS", 51 * per_chunk)
    assert_equal(nonlocal_kernel(one.model, one.x1, **options).plugin, whole.plugin, 1e-12)


@pytest.mark.parametrize("score", ["output", "output, own", "labels", "function, own"])
@pytest.mark.parametrize("name", ["deep_sign_mlp", "convnet", "embedding"])
def test_any_model_can_be_weighted(name, score):
    one, temperature = problem(name), SCORES[score]
    options = {"gamma": 0.6, "draws": 16, "blocks": 4, "seed": SEED}
    estimate = nonlocal_kernel(one.model, one.x1, one.x2, weighting=one.weighting(score, temperature), **options)
    assert_is_the_definition(one, score, KernelSpec(**options), temperature, estimate)


@pytest.mark.parametrize("law", ["sphere", "student", "lowrank"])
@pytest.mark.parametrize("score", ["parameter", "output, own"])
def test_laws_and_relative_ranges_are_weighted_alike(score, law):
    """Scores use θ + z with the scales of the tensors; directions come from the law."""
    one = problem()
    options = {"gamma": 0.6, "distribution": law, "gamma_scale": "relative", "draws": 16, "blocks": 4, "seed": SEED}
    spec = KernelSpec(weighting=one.weighting(score, SCORES[score]), estimator="weight", **options)
    weighted, _ = prepared_features(one.model, one.x1, spec)
    plain, _ = prepared_features(one.model, one.x1, KernelSpec(estimator="weight", **options))
    assert isinstance(weighted, DifferenceFeatures)
    scores = one.scores(score, spec, one.x1)
    ones = attention.weighted(np.ones((16, 3, 1, 1)), scores, np.arange(16) // 4, SCORES[score])[..., 0]
    before, after = (all_rows(features, one.x1)["differences"].numpy() for features in (plain, weighted))
    assert_equal(after, before * ones.swapaxes(0, 1))
    assert_equal(weighted.make_metric(), plain.make_metric(), 0)


def test_a_black_box_is_weighted_as_the_module_is():
    model, one = nn.Linear(4, 2).double(), problem("affine")
    flat = torch.cat([model.weight.detach().reshape(-1), model.bias.detach()]).numpy()
    box = BlackBox(lambda params, x: x @ params[:8].reshape(2, 4).T + params[8:], flat)
    for weighting in (
        {"name": "output", "temperature": 0.2, "reference": one.reference},
        {"name": "output", "temperature": 0.2, "per_example": True},
        {"name": "loss", "temperature": 0.2, "reference": one.reference, "targets": one.numbers[:, :2]},
        {"name": "parameter", "temperature": 0.05},
    ):
        options = {"gamma": 0.6, "draws": 32, "blocks": 4, "weighting": weighting}
        estimates = [nonlocal_kernel(each, one.x1, **options) for each in (model, box)]
        assert estimates[1].estimator == "weight"
        assert_equal(estimates[1].unbiased, estimates[0].unbiased)


# The limit of equal weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "design", "means"), pairwise(SCORES, ["iid", "antithetic"], [False, True]))
def test_an_infinite_temperature_is_the_fixed_kernel(score, design, means, monkeypatch):
    """Bit for bit; and large temperatures approach it."""
    one = problem("small" if means else "tanh_mlp")
    if means:
        monkeypatch.setattr(nntk_dist.estimators.weight, "METRIC_DRAWS", 0)
    # 7 draws a block in float32: 1/7·7 is not 1
    options = {"gamma": 0.6, "design": design, "draws": 56, "blocks": 4, "dtype": torch.float32}
    fixed = nonlocal_kernel(one.model, one.x1, one.x2, estimator="weight", **options)
    for temperature in (None, math.inf):
        weighting = one.weighting(score, temperature)
        equal = nonlocal_kernel(one.model, one.x1, one.x2, weighting=weighting, **options)
        for name in ("plugin", "unbiased", "stderr"):
            torch.testing.assert_close(getattr(equal, name), getattr(fixed, name), rtol=0, atol=0, equal_nan=True)
    hot = nonlocal_kernel(one.model, one.x1, one.x2, weighting=one.weighting(score, 1e9), **options)
    assert_equal(hot.plugin, fixed.plugin, 1e-5)
    cold = nonlocal_kernel(one.model, one.x1, one.x2, weighting=one.weighting(score, SCORES[score]), **options)
    assert float((cold.plugin - fixed.plugin).abs().max()) > 1e-3 * float(fixed.plugin.abs().max())


def test_at_a_vanishing_temperature_the_best_draw_of_a_block_is_all():
    """Differences of scores over τ overflow, and weights are 0 and 1."""
    one = problem()
    spec = KernelSpec(gamma=0.6, draws=16, blocks=4, weighting=one.weighting("output", 1e-320))
    features, _ = prepared_features(one.model, one.x1, spec)
    differences = all_rows(features, one.x1)["differences"]
    best = one.scores("output", spec, one.x1).reshape(4, 4).argmax(1)
    kept = differences.abs().amax((0, 2)).reshape(4, 4)
    assert ((kept > 0) == torch.eye(4, dtype=torch.bool)[best]).all()


@pytest.mark.parametrize("weighting", [None, "fixed", {"name": "fixed"}, Weighting()])
def test_fixed_is_no_weighting(weighting):
    one = problem()
    options = {"gamma": 0.6, "draws": 16, "blocks": 4}
    plain = nonlocal_kernel(one.model, one.x1, **options)
    assert torch.equal(nonlocal_kernel(one.model, one.x1, weighting=weighting, **options).plugin, plain.plugin)
    assert plain.estimator == "autodiff"


# What weights can depend on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_weights_of_an_example_do_not_depend_on_what_is_beside_it(score):
    one = problem()
    spec = KernelSpec(gamma=0.6, draws=16, blocks=4, weighting=one.weighting(score, SCORES[score]))
    features, _ = prepared_features(one.model, one.x1, spec)
    x = case("tanh_mlp").inputs(7)
    whole = all_rows(features, x)["differences"]
    for draws, rows in ((range(16), slice(2, 3)), (range(4, 12), slice(0, 5))):
        names = torch.arange(len(x[rows]))
        part = features.compute(x[rows], names, draws, features.columns, batch=2)["differences"]
        assert_equal(part, whole[rows, draws.start : draws.stop], 1e-12)
    some = features.compute(x, torch.arange(7), range(16), (2,), batch=7)["differences"]
    assert_equal(some, whole[:, :, 2:], 1e-12)  # scores use all outputs, whichever are computed


def test_shared_scores_are_made_once(monkeypatch):
    one, calls = problem(), []

    def counted(*given: Tensor) -> Tensor:
        calls.append(len(given[1]))
        return mean_nearness(*given)

    spec = KernelSpec(gamma=0.6, draws=16, blocks=4, weighting={"name": counted, "reference": one.reference})
    features, _ = prepared_features(one.model, one.x1, spec)
    assert sum(calls) == 1  # the trial
    for _ in range(3):
        features.compute(one.x1, torch.arange(3), range(16), features.columns, batch=1)
    assert sum(calls) == 17


def test_the_reference_batch_is_the_first_examples_unless_given():
    one = problem()
    options = {"gamma": 0.6, "draws": 16, "blocks": 4}
    x = case("tanh_mlp").inputs(6)
    targets = torch.tensor([0, 2, 1, 1, 0, 2])

    def kernel(**weighting: Any) -> Any:
        weighting = {"name": "loss", "temperature": 0.3, **weighting}
        return nonlocal_kernel(one.model, x, weighting=weighting, **options).plugin

    first = kernel(targets=targets, reference=4)
    assert torch.equal(first, kernel(targets=targets[:4], reference=x[:4]))
    assert torch.equal(first, kernel(targets=targets[:4].numpy(), reference=x[:4].numpy()))
    assert torch.equal(kernel(targets=targets), kernel(targets=targets, reference=x))
    assert not torch.allclose(first, kernel(targets=targets))
    given = Weighting("loss", temperature=0.3, reference=4, targets=targets)
    assert torch.equal(first, nonlocal_kernel(one.model, x, weighting=given, **options).plugin)


def test_a_long_reference_batch_is_passed_in_parts():
    one = problem()
    reference = case("tanh_mlp").inputs(71, seed=11)
    one = Problem(one.model, one.x1, one.x2, reference, one.labels, one.numbers)
    options = {"gamma": 0.6, "draws": 16, "blocks": 4, "seed": SEED}
    estimate = nonlocal_kernel(one.model, one.x1, one.x2, weighting=one.weighting("output", 0.3), **options)
    assert_is_the_definition(one, "output", KernelSpec(**options), 0.3, estimate)


def test_queries_and_keys_are_made_in_slices(monkeypatch):
    """They do not depend on the width of the slices; another seed gives others."""
    theta = torch.linspace(-1, 2, 1000, dtype=torch.float64)
    whole = key_of_query(theta, 16, 3)
    monkeypatch.setattr("nntk_dist.weighting.scores.parameter._SLICE_ELEMENTS", 1)
    torch.testing.assert_close(key_of_query(theta, 16, 3), whole, rtol=1e-12, atol=1e-14)
    assert float((key_of_query(theta, 16, 4) - whole).abs().max()) > 0.1 * float(whole.abs().max())


def test_the_reason_names_the_weighting_and_that_it_is_a_ratio():
    one = problem()
    estimate = nonlocal_kernel(one.model, one.x1, gamma=0.6, weighting=one.weighting("output, own", 0.5))
    assert "softmax of the score output at temperature 0.5, separate for each example" in estimate.reason
    assert "consistent but not unbiased" in estimate.reason
    named = nonlocal_kernel(one.model, one.x1, gamma=0.6, weighting=mean_nearness)
    assert "score mean_nearness at temperature 1, shared by all examples" in named.reason
    parameter = nonlocal_kernel(one.model, one.x1, gamma=0.6, weighting="parameter", estimator="weight")
    assert "score parameter (d_k 16) at" in parameter.reason
