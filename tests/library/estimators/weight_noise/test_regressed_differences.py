"""The estimator `weight` with linear control variates fitted on other blocks: its definition, its mean, its limits.

The oracle of the definition fits every pair of blocks by loops in NumPy, from the same perturbations; that of the mean
is the plain estimator.

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

from nntk_dist import BlackBox
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.estimators.weight_noise.regressed_differences import RegressedMeans
from nntk_dist.models.evaluation import Evaluator, prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.decision import Decision
from nntk_dist.planning.plain import to_plain
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, assert_equal, calibration_of, estimates_of, prepared_features
from tests.oracles import brute_force
from tests.oracles.cases import case
from tests.oracles.statistics import assert_coverage, covered

OPTIONS: dict[str, Any] = {"gamma": 0.4, "estimator": "weight", "variance_reduction": "all", "draws": 64}
WEIGHTS = np.random.default_rng(0).normal(size=(4, 5)) / 2.0


def votes(params: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The mean vote of four halfspaces in four dimensions, and the vote of the first one."""
    weights = params.reshape(4, 5)
    found = np.sign(x @ weights[:, :4].T + weights[:, 4])
    return np.stack([found.mean(1), found[:, 0]], axis=1)


class Votes(nn.Module):
    """The same as a module, many of which are evaluated in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.Parameter(torch.from_numpy(WEIGHTS.ravel()))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.params.reshape(4, 5)
        found = torch.sign(x @ weights[:, :4].T + weights[:, 4])
        return torch.stack([found.mean(1), found[:, 0]], dim=1)


def decision_rule() -> tuple[nn.Module, Tensor]:
    inputs = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return BlackBox(votes, WEIGHTS.ravel()), inputs


def made(model: nn.Module, x: Tensor, **options: Any) -> tuple[RegressedMeans, KernelSpec]:
    """The features whether a trial says that they pay or not."""
    spec = KernelSpec(**OPTIONS | options)
    model = prepare_model(model, dtype=torch.float64, device="cpu")
    space = select_parameters(model)
    evaluator = Evaluator(model, space, stacked=True)
    columns = tuple(range(evaluator.base(x).shape[1])) if not isinstance(spec.outputs, int) else (spec.outputs,)
    return RegressedMeans(evaluator, spec.drawing("weight", space, model), columns, ridge=0.7), spec


def gradients_by_loops(features: RegressedMeans, model: nn.Module, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """g_r for all pairs of blocks, (R, R, n, C, P), 0 for a block with itself; and ĝ, (n, C, P)."""
    function, theta = brute_force.function_of_parameters(model, x)
    drawing, num_parameters = features.drawing, features.num_parameters
    z = drawing.perturbations(range(drawing.num_draws), dtype=torch.float64).numpy()
    base = function(theta)
    differences = np.stack([function(theta + each) - base for each in z])[:, :, list(features.columns)]
    sizes = features.evaluator.space.sizes
    scale = np.repeat(drawing.scales or (1.0,) * len(sizes), sizes)
    u = z / scale
    weights = num_parameters / (u**2).sum(1)
    if drawing.distribution.name == "lowrank":
        weights = np.full(len(u), 2.0 / drawing.distribution.gamma**2)
    constant = drawing.distribution.gamma / math.sqrt(2)
    regressors = np.concatenate([u, np.full((len(u), 1), constant)], axis=1)
    blocks, size = drawing.num_blocks, drawing.draws_per_block
    block = np.arange(len(u)) // size

    def gradient(r: int, left_out: set[int]) -> np.ndarray:
        fitted = ~np.isin(block, list(left_out))
        penalty = np.append(np.full(num_parameters, features.ridge * num_parameters / fitted.sum()), 0.0)
        normal, right = np.zeros((num_parameters + 1,) * 2), np.zeros((num_parameters + 1, *differences.shape[1:]))
        for s in np.flatnonzero(fitted):
            normal += weights[s] * np.outer(regressors[s], regressors[s])
            right += weights[s] * np.multiply.outer(regressors[s], differences[s])
        flat = right.reshape(len(right), -1) / fitted.sum()
        fit = np.linalg.solve(normal / fitted.sum() + np.diag(penalty), flat).reshape(right.shape)
        total = np.zeros((*differences.shape[1:], num_parameters))
        for s in np.flatnonzero(block == r):
            residual = differences[s] - np.tensordot(regressors[s], fit, 1)
            total += residual[..., None] * weights[s] * u[s]
        return (total / size + np.moveaxis(fit[:-1], 0, -1)) / scale

    zero = np.zeros((*differences.shape[1:], num_parameters))
    pairs = np.stack(
        [np.stack([gradient(r, {r, q}) if q != r else zero for q in range(blocks)]) for r in range(blocks)]
    )
    return pairs, np.mean([gradient(r, {r}) for r in range(blocks)], axis=0)


def products_by_loops(pairs: np.ndarray, mean: np.ndarray, others: int, outputs: str) -> np.ndarray:
    """H_rr' for the first `others` examples as columns; blocks with themselves give `plugin`."""
    blocks = range(len(pairs))
    products = np.stack(
        [np.stack([brute_force.kernel_of(pairs[r, q], pairs[q, r, :others], outputs) for q in blocks]) for r in blocks]
    )
    count = len(pairs)
    rest = count * brute_force.kernel_of(mean, mean[:others], outputs) - products.sum((0, 1)) / count
    for r in blocks:
        products[r, r] = rest
    return products


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"outputs": "full"},
        {"outputs": 1},
        {"design": "antithetic"},
        {"design": "orthogonal"},
        {"distribution": {"name": "student", "nu": 5}},
        {"distribution": "sphere"},
        {"distribution": {"name": "lowrank", "rank": 2}},
        {"gamma_scale": "relative"},
        {"blocks": 4},
    ],
    ids=str,
)
def test_statistics_are_those_of_the_definition(options):
    model, x = case("deep_sign_mlp").build(), case("deep_sign_mlp").inputs(5)
    features, spec = made(model, x, **options)
    pairs, mean = gradients_by_loops(features, model, x)
    products = products_by_loops(pairs, mean, 3, "full" if spec.outputs == "full" else "trace")
    rows, others = all_rows(features, x), all_rows(features, x[:3])
    result = estimates_of(features, rows, others, spec)
    assert_equal(result["plugin"], brute_force.kernel_of(mean, mean[:3], "full" if spec.outputs == "full" else "trace"))
    assert_equal(result["plugin"], products.mean((0, 1)))
    assert_equal(result["unbiased"], brute_force.unbiased(products))
    assert_equal(result["stderr"], brute_force.calibrated_stderr(products), relative=1e-9)
    assert_equal(features.pair_gradients(rows["dense"]).permute(1, 2, 0, 3, 4), pairs, 1e-12)


def test_the_module_is_the_decision_rule():
    model, x = decision_rule()
    assert torch.equal(model(x), Votes()(x))


def test_a_linear_function_has_no_noise():
    model = nn.Linear(6, 2).double()
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    features, spec = made(model, x)
    rows = all_rows(replace(features, ridge=0.0), x)
    result = estimates_of(replace(features, ridge=0.0), rows, rows, spec)
    extended = torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], dim=1)
    for name in ("plugin", "unbiased"):
        assert_equal(result[name], 2.0 * extended @ extended.T, 1e-12)
    assert float(result["stderr"].nan_to_num().max()) < 1e-10


def test_what_is_done_is_said_and_kept():
    model, x = decision_rule()
    spec = KernelSpec(**OPTIONS | {"draws": 256})
    features, decision = prepared_features(model, x, spec)
    assert isinstance(features, RegressedMeans)
    assert "linear control variates fitted on other blocks: in a trial they left 0." in decision.explanation
    assert Decision.from_plain(to_plain(decision)) == decision
    plain, _ = prepared_features(model, x, replace(spec, variance_reduction="none"))
    assert isinstance(plain, DifferenceFeatures)


def test_models_and_kernels_that_it_is_not_for_are_computed_plainly():
    model, x = decision_rule()
    weighted = {"weighting": {"name": "parameter", "temperature": 1.0}}
    few = {"draws": 16}  # no more than the parameters
    even = BlackBox(lambda params, x: ((x @ params) ** 2 > 1.0).astype(float), np.zeros(4))  # nothing of it is linear
    for one, options in ((model, weighted), (model, few), (even, {"draws": 256})):
        found, decision = prepared_features(one, x, KernelSpec(**OPTIONS | options))
        assert isinstance(found, DifferenceFeatures | DifferenceMeans)
        assert not isinstance(found, RegressedMeans)
        assert "control variates" not in decision.explanation


def test_draws_in_portions_have_the_same_bits():
    model, x = decision_rule()
    features, _ = made(model, x)
    whole, ids = all_rows(features, x), torch.arange(len(x))
    parts = [features.compute(x, ids, draws, features.columns) for draws in (range(32), range(32, 64))]
    for name, array in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), array), name


def test_entries_that_no_draw_changed_are_unresolved():
    model, x = decision_rule()
    features, spec = made(model, torch.cat([x, 100.0 * x[:1]]), gamma=1e-3)
    rows = all_rows(features, x)
    result = estimates_of(features, rows, rows, spec)
    assert bool(torch.isnan(result["stderr"]).all())
    assert bool((result["unbiased"] == 0).all())


def test_the_error_is_less_than_six_tenths_of_the_plain_one():
    """A decision rule of 20 parameters, at the same number of passes."""
    model, x = decision_rule()
    features, spec = made(model, x, draws=256)
    rows = all_rows(features, x)
    plain = DifferenceMeans(features.evaluator, features.drawing, features.columns)
    errors = [
        calibration_of(each, own, own, spec).relative_error
        for each, own in ((features, rows), (plain, {**rows, "dense": rows["dense"][..., :-1]}))
    ]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.statistical
@pytest.mark.parametrize("design", ["iid", "antithetic", "orthogonal"])
def test_it_agrees_with_the_plain_estimator(design):
    """Means over 100 seeds and the plain one at many draws, compared entry by entry at a corrected level of 0.1 %."""
    model, x = Votes(), decision_rule()[1]
    features, spec = made(model, x, design=design, draws=320)
    plain = DifferenceMeans(features.evaluator, features.drawing, features.columns)
    found: dict[str, list[np.ndarray]] = {"fitted": [], "plain": []}
    for seed in range(100):
        drawing = replace(features.drawing, seed=seed)
        rows = all_rows(replace(features, drawing=drawing), x)
        own = {**rows, "dense": rows["dense"][..., :-1]}
        for name, each, values in (("fitted", features, rows), ("plain", plain, own)):
            result = estimates_of(replace(each, drawing=drawing), values, values, spec)
            found[name].append(result["unbiased"].numpy())
    difference = np.stack(found["fitted"]) - np.stack(found["plain"])
    stderr = difference.std(0, ddof=1) / math.sqrt(len(difference))
    count = len(x) * (len(x) + 1) // 2
    assert np.abs(difference.mean(0) / stderr).max() < stats.t.isf(0.0005 / count, len(difference) - 1)
    assert stderr.mean() < 0.02 * np.mean(found["plain"], axis=0).diagonal().mean()


@pytest.mark.statistical
@pytest.mark.parametrize(("draws", "blocks"), [(128, 4), (128, 8)])
def test_intervals_cover(draws, blocks):
    model, x = Votes(), decision_rule()[1]
    features, spec = made(model, x, draws=draws, blocks=blocks)
    values, stderrs = [], []
    for seed in range(200):
        own = replace(features, drawing=replace(features.drawing, seed=seed))
        rows = all_rows(own, x)
        found = estimates_of(own, rows, rows, spec)
        values.append(found["unbiased"].numpy())
        stderrs.append(found["stderr"].numpy())
    exact, _ = made(model, x, draws=1 << 17, seed=12345)
    rows = all_rows(exact, x)
    truth = estimates_of(exact, rows, rows, spec)["unbiased"].numpy()
    assert_coverage(covered(np.stack(values), truth, np.stack(stderrs), blocks))
