"""The estimator `weight` with control variates for noise in weights: its definition, its mean, its limits.

The oracle of the definition recomputes every draw by loops in NumPy from the same perturbations; those of the mean are
the plain estimator, and enumeration with quadrature.

Axes: S draws, R blocks, n examples, C outputs, P parameters.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from nntk_dist.errors import ModelError
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.estimators.weight_noise.noisy_weights import find_noisy_weights
from nntk_dist.estimators.weight_noise.weight_gradients import WeightGradients
from nntk_dist.models.evaluation import Evaluator, prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.decision import Decision
from nntk_dist.planning.plain import to_plain
from nntk_dist.sampling.streams import PILOT_WEIGHTS, Stream
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, assert_equal, calibration_of, estimates_of, prepared_features
from tests.library.estimators.weight_noise.quantised_models import MAKERS, STEP, quantised
from tests.library.noisy_models import Jitter
from tests.oracles import brute_force
from tests.oracles import quantised as exact_network
from tests.oracles.statistics import assert_agrees, assert_coverage, covered

OPTIONS: dict[str, Any] = {"gamma": 0.4, "estimator": "weight", "variance_reduction": "all", "draws": 32}


def features_of(model: nn.Module, x: Tensor, **options: Any) -> tuple[WeightGradients, KernelSpec, Decision]:
    spec = KernelSpec(**OPTIONS | options)
    features, decision = prepared_features(model, x, spec)
    assert isinstance(features, WeightGradients)
    return features, spec, decision


def made(model: nn.Module, x: Tensor, **options: Any) -> tuple[WeightGradients, KernelSpec]:
    """The same features whether a trial says that they pay or not."""
    spec = KernelSpec(**OPTIONS | {"draws": 32} | options)
    model = prepare_model(model, dtype=torch.float64, device="cpu")
    space = select_parameters(model)
    evaluator, drawing = Evaluator(model, space, stacked=True), spec.drawing("weight", space, model)
    weights = find_noisy_weights(evaluator, drawing, x)
    assert weights is not None
    columns = tuple(range(evaluator.base(x).shape[1]))
    return WeightGradients(evaluator, drawing, columns, weights=weights, num_pilots=10), spec


def _smooth(weight: np.ndarray, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """The mean of two bits and its derivative."""
    t = (weight[..., None] - STEP * np.array([-1.0, 0.0, 1.0])) / spread
    return STEP * (stats.norm.cdf(t).sum(-1) - 1.5), STEP * stats.norm.pdf(t).sum(-1) / spread


def _level(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values / STEP), -2, 1)


def _score(weight: np.ndarray, moved: np.ndarray, spread: float) -> np.ndarray:
    """E[n | the level that is reached]/spread, number by number."""
    level = _level(moved)
    low = np.where(level == -2, -math.inf, (STEP * level - weight) / spread)
    high = np.where(level == 1, math.inf, (STEP * (level + 1) - weight) / spread)
    return (stats.norm.pdf(low) - stats.norm.pdf(high)) / (stats.norm.cdf(high) - stats.norm.cdf(low)) / spread


def means_by_loops(features: WeightGradients, model: nn.Module, x: Tensor) -> np.ndarray:
    """g_r of every block, (n, R, C, P), of two quantised layers with biases and a tanh between them."""
    theta = [parameter.detach().numpy() for parameter in model.parameters()]
    drawing, size = features.drawing, features.drawing.draws_per_block
    gamma, scales = drawing.distribution.gamma, drawing.scales or (1.0,) * 4

    def split(z: np.ndarray) -> list[np.ndarray]:
        parts = np.split(z, np.cumsum([part.size for part in theta])[:-1])
        return [part.reshape(own.shape) for part, own in zip(parts, theta, strict=True)]

    def one(example: np.ndarray, z: list[np.ndarray], spreads: list[float]) -> dict[str, Any]:
        """One pass: what two layers compute, and what they deviate from their means."""
        w, b, v, c = (part + move for part, move in zip(theta, z, strict=True))
        w, v = STEP * (_level(w) + 0.5), STEP * (_level(v) + 0.5)
        h = np.tanh(w @ example + b)
        e1 = (w - _smooth(theta[0], spreads[0])[0]) @ example + z[1]
        e2 = (v - _smooth(theta[2], spreads[2])[0]) @ h + z[3]
        return {"f": v @ h + c, "h": h, "e1": e1, "e2": e2, "J1": v * (1.0 - h * h)}

    pilots = replace(drawing, stream=Stream.PILOT, design="iid")
    numbers = range(PILOT_WEIGHTS, PILOT_WEIGHTS + features.num_pilots)
    pilot_z = pilots.perturbations(numbers, dtype=torch.float64).numpy()
    every_z, count = drawing.perturbations(range(drawing.num_draws), dtype=torch.float64).numpy(), len(theta[3])
    mean_shrinkage = features.num_parameters / (features.num_parameters + 1)
    pilot_spreads = [gamma / math.sqrt(2) * mean_shrinkage * scale for scale in scales]
    scores = []
    for draw, z in enumerate(every_z):
        first = draw // size * size
        shrinkage = float(drawing.shrinkage(range(first, first + drawing.group_size))[0])
        spreads = [gamma / math.sqrt(2) * shrinkage * scale for scale in scales]
        moves = split(shrinkage * z)
        parts = [
            _score(own, own + move, spread) if own.ndim == 2 else move / spread**2
            for own, move, spread in zip(theta, moves, spreads, strict=True)
        ]
        scores.append((moves, spreads, np.concatenate([part.ravel() for part in parts])))
    result = []
    for example in x.numpy():
        found = [one(example, split(mean_shrinkage * z), pilot_spreads) for z in pilot_z]
        f, e1, e2, j1 = (np.mean([each[key] for each in found], axis=0) for key in ("f", "e1", "e2", "J1"))
        centre = f - j1 @ e1 - e2
        blocks = []
        for block in range(drawing.num_blocks):
            total = np.zeros((count, features.num_parameters))
            slopes = [_smooth(theta[k], scores[block * size][1][k])[1] for k in (0, 2)]
            for moves, spreads, score in scores[block * size : (block + 1) * size]:
                p = one(example, moves, spreads)
                residual = p["f"] - centre - j1 @ p["e1"] - p["e2"]
                for k in range(count):
                    own = np.eye(count)[k]
                    smooth = [slopes[0] * np.outer(j1[k], example), j1[k], slopes[1] * np.outer(own, p["h"]), own]
                    total[k] += residual[k] * score + np.concatenate([part.ravel() for part in smooth])
            blocks.append(total / size)
        result.append(np.stack(blocks))
    return np.stack(result)


@pytest.mark.parametrize("outputs", ["trace", "full", 1])
@pytest.mark.parametrize("design", ["iid", "antithetic", "orthogonal"])
def test_statistics_are_those_of_the_definition(outputs, design):
    model, x = quantised("own forward")
    features, spec, _ = features_of(model, x, outputs=outputs, design=design)
    means = means_by_loops(features, model, x)
    means = means[:, :, [1]] if outputs == 1 else means
    rows, others = all_rows(features, x), all_rows(features, x[:3])
    assert_equal(rows["dense"], means, 1e-12)
    means = means.transpose(1, 0, 2, 3)
    products = brute_force.block_products(means, means[:, :3], "full" if outputs == "full" else "trace")
    result = estimates_of(features, rows, others, spec)
    assert_equal(result["plugin"], products.mean((0, 1)))
    assert_equal(result["unbiased"], brute_force.unbiased(products))
    assert_equal(result["stderr"], brute_force.calibrated_stderr(products), relative=1e-9)


def test_relative_ranges_are_those_of_the_definition():
    model, x = quantised("own forward")
    features, _, _ = features_of(model, x, gamma_scale="relative", gamma=0.8)
    assert_equal(all_rows(features, x)["dense"], means_by_loops(features, model, x), 1e-12)


def test_what_is_done_is_said_and_kept():
    model, x = quantised("own forward")
    features, spec, decision = features_of(model, x)
    expected = (
        "control variates from 10 pilot draws for noise in 4 tensors, 2 of them quantised: in a trial they left 0."
    )
    assert expected in decision.explanation
    assert Decision.from_plain(to_plain(decision)) == decision
    assert features.num_pilots == 10
    plain, _ = prepared_features(model, x, replace(spec, variance_reduction="none"))
    assert isinstance(plain, DifferenceFeatures)


def test_draws_in_portions_have_the_same_bits():
    model, x = quantised("own forward")
    features, _, _ = features_of(model, x)
    whole, ids = all_rows(features, x), torch.arange(len(x))
    parts = [features.compute(x, ids, draws, features.columns) for draws in (range(16), range(16, 32))]
    for name, array in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), array), name
    some = features.compute(x[1:3], ids[1:3], range(32), features.columns, batch=3)
    again = features.compute(x[1:], ids[1:], range(32), features.columns, batch=3)
    one_output = features.compute(x, ids, range(32), (1,), batch=len(x))
    for name, array in some.items():
        assert torch.equal(array, again[name][:2]), name
        assert_equal(one_output[name], whole[name][:, :, [1]], 1e-12)


def test_models_and_kernels_that_it_is_not_for_are_computed_plainly():
    model, x = quantised("own forward")
    noisy = nn.Sequential(*model[:2], Jitter(), *model[2:])
    groups = {"parameters": {"first": "0.*", "last": "2.*"}, "group": "first"}
    weighted = {"weighting": {"name": "parameter", "temperature": 1.0}}
    for one, options in ((noisy, {}), (model, groups), (model, weighted), (model, {"distribution": "sphere"})):
        found, decision = prepared_features(one, x, KernelSpec(**OPTIONS | options))
        assert isinstance(found, DifferenceFeatures | DifferenceMeans)
        assert not isinstance(found, WeightGradients)
        assert "pilot draws" not in decision.explanation


class Branches(nn.Module):
    """Large inputs go through one more product."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = quantised("own forward")[0]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found @ torch.eye(2, dtype=x.dtype) if bool(x.abs().max() > 100.0) else found


def test_passes_must_have_the_calls_that_were_found():
    _, x = quantised("own forward")
    features, _ = made(Branches(), x)
    with pytest.raises(ModelError, match="a pass has 3 products of inputs and weights, and had 2 when it was planned"):
        all_rows(features, 1000.0 * x)


def test_entries_that_no_noise_changed_are_unresolved():
    """Far from all jumps, and without biases, no draw changes an output."""
    model, x = quantised("transposed")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 + 0.5 * torch.floor(2.0 * parameter))
    trial, spec, _ = features_of(model, x, gamma=0.4)
    features = replace(trial, drawing=replace(trial.drawing, distribution=type(trial.drawing.distribution)(0.01)))
    rows = all_rows(features, x)
    result = estimates_of(features, rows, rows, spec)
    assert bool(torch.isnan(result["stderr"]).all())
    assert not bool(torch.isnan(result["unbiased"]).any())
    rows = all_rows(trial, x)
    assert bool(torch.isfinite(estimates_of(trial, rows, rows, spec)["stderr"]).all())


def test_the_error_is_a_fifth_of_the_plain_one():
    model, x = quantised("own forward")
    errors = {}
    for reduction in ("all", "none"):
        features, _ = prepared_features(
            model, x, KernelSpec(**OPTIONS | {"variance_reduction": reduction, "draws": 64})
        )
        rows = all_rows(features, x)
        errors[reduction] = calibration_of(features, rows, rows, KernelSpec(**OPTIONS)).relative_error
    assert errors["all"] < 0.2 * errors["none"]


@pytest.mark.statistical
@pytest.mark.parametrize("design", ["iid", "antithetic", "orthogonal"])
def test_the_mean_is_the_enumerated_one(design):
    """Gradients, by example and parameter, against enumeration of the grid and quadrature over σ."""
    model = exact_network.QuantisedNetwork()
    x = torch.tensor([[0.8, -0.3], [-0.5, 1.1], [0.2, 0.4]], dtype=torch.float64)
    features, _ = made(model, x, gamma=0.6, design=design, draws=208)
    assert [each.name for each in features.weights.weights] == ["hidden", "readout"]
    parameters = (parameter.detach().numpy() for parameter in model.parameters())
    expected = exact_network.nonlocal_gradient(x.numpy(), *parameters, 0.6)
    means = []
    for seed in range(50):
        rows = all_rows(replace(features, drawing=replace(features.drawing, seed=seed)), x)
        means.append(rows["dense"].mean(1).numpy())
    found = np.stack(means)
    stderr = found.std(0, ddof=1) / math.sqrt(len(found))
    assert_agrees(found.mean(0), expected, stderr, len(found), rounding=1e-12)
    assert stderr.mean() < 0.02 * np.abs(expected).max()


@pytest.mark.statistical
@pytest.mark.parametrize("name", MAKERS)
def test_it_agrees_with_the_plain_estimator(name):
    """Means over 32 seeds of either, compared entry by entry at a corrected level of 0.1 %."""
    model, x = quantised(name)
    found: dict[str, list[np.ndarray]] = {"all": [], "none": []}
    features, spec = made(model, x, draws=512 if name == "leaking" else 32)
    alike = "own forward" if name == "function of autograd" else name  # the same function, which can be stacked
    evaluator = made(quantised(alike)[0], x)[0].evaluator
    plain = DifferenceMeans(evaluator, replace(features.drawing, num_draws=2048), features.columns)
    for kind, each in (("all", features), ("none", plain)):
        for seed in range(32):
            own = replace(each, drawing=replace(each.drawing, seed=seed))
            rows = all_rows(own, x)
            found[kind].append(estimates_of(own, rows, rows, spec)["unbiased"].numpy())
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    errors = {name: np.std(values, axis=0, ddof=1) / math.sqrt(32) for name, values in found.items()}
    both = np.hypot(errors["all"], errors["none"])
    count = len(x) * (len(x) + 1) // 2
    assert np.abs((means["all"] - means["none"]) / both).max() < stats.t.isf(0.0005 / count, 31)
    assert both.mean() < 0.02 * np.diag(means["none"]).mean()


@pytest.mark.statistical
@pytest.mark.parametrize(("draws", "blocks"), [(32, 4), (64, 8)])
def test_intervals_cover(draws, blocks):
    model, x = quantised("own forward")
    features, spec, _ = features_of(model, x, draws=draws, blocks=blocks)
    values, stderrs = [], []
    for seed in range(120):
        own = replace(features, drawing=replace(features.drawing, seed=seed))
        rows = all_rows(own, x)
        found = estimates_of(own, rows, rows, spec)
        values.append(found["unbiased"].numpy())
        stderrs.append(found["stderr"].numpy())
    exact, _, _ = features_of(model, x, draws=8192, seed=12345)
    rows = all_rows(exact, x)
    truth = estimates_of(exact, rows, rows, spec)["unbiased"].numpy()
    assert_coverage(covered(np.stack(values), truth, np.stack(stderrs), blocks))
