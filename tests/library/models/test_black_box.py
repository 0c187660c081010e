"""Black boxes: plain NumPy functions of (params, x), against the definition written with the same functions."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeRegressor
from torch import nn

from nntk_dist import BlackBox, NNTKError, averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.spec import KernelSpec
from pipeline.config.schema import load_config
from pipeline.decisions.build import build_dataset
from tests.harness.tools import assert_equal, spec_perturbations
from tests.oracles import brute_force
from tests.pipeline.tools import arrays, config_file, finished

Array = np.ndarray
Function = Callable[[Array, Array], Array]


def inputs(n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(n, 3))


@dataclass(frozen=True)
class Example:
    """A function, its parameters, and a range at which some of its decisions change."""

    fn: Function
    params: Array
    gamma: float
    x1: Array
    x2: Array


def logistic_regression() -> Example:
    """A fitted scikit-learn model of three classes; params are its coefficients and intercepts."""
    x = inputs(60)
    fitted = LogisticRegression().fit(x, np.digitize(x[:, 0] + 0.3 * x[:, 1], [-0.5, 0.5]))

    def fn(params: Array, x: Array) -> Array:
        moved = copy.copy(fitted)
        moved.coef_, moved.intercept_ = params[:9].reshape(3, 3), params[9:]
        return moved.predict_proba(x)

    return Example(fn, np.concatenate([fitted.coef_.ravel(), fitted.intercept_]), 0.7, inputs(4, 1), inputs(3, 2))


def decision_tree() -> Example:
    """A fitted scikit-learn tree; params are its thresholds. Its output is a step function of them."""
    x = inputs(80)
    tree = DecisionTreeRegressor(max_leaf_nodes=7, random_state=0).fit(x, np.sin(2 * x[:, 0]) + x[:, 1])
    inner = tree.tree_.children_left >= 0

    def fn(params: Array, x: Array) -> Array:
        tree.tree_.threshold[inner] = params
        return tree.predict(x)

    return Example(fn, tree.tree_.threshold[inner].copy(), 0.8, inputs(5, 1), inputs(3, 2))


def decision_rule() -> Example:
    """True or false."""

    def fn(params: Array, x: Array) -> Array:
        return (x[:, 0] > params[0]) & (x[:, 1:] @ params[1:] < 0.5)

    return Example(fn, np.array([0.1, 1.0, -0.4]), 1.0, inputs(6, 1), inputs(4, 2))


def simulator() -> Example:
    """How many bounces a ball makes before it has lost its energy, and how far it gets; params: restitution, drag."""

    def fall(restitution: float, drag: float, height: float, speed: float) -> tuple[int, float]:
        bounces, distance = 0, 0.0
        while height > 0.05 and bounces < 50:
            distance += speed * np.sqrt(height)
            height, speed, bounces = restitution**2 * height, speed * (1 - drag), bounces + 1
        return bounces, distance

    def fn(params: Array, x: Array) -> Array:
        restitution, drag = np.clip(params, 0.05, 0.95)
        return np.array([fall(restitution, drag, abs(row[0]) + 0.1, row[1]) for row in x])

    return Example(fn, np.array([0.7, 0.2]), 0.2, inputs(4, 1), inputs(3, 2))


def look_up() -> Example:
    """A table indexed by whole numbers."""

    def fn(params: Array, x: Array) -> Array:
        assert x.dtype == np.int64
        return np.tanh(params.reshape(5, 2)[x].sum(1))

    tokens = np.random.default_rng(3).integers(0, 5, size=(7, 3))
    return Example(fn, np.linspace(-1.0, 1.0, 10), 0.5, tokens[:4], tokens[4:])


EXAMPLES = [logistic_regression, decision_tree, decision_rule, simulator, look_up]


def by_definition(example: Example, model: nn.Module, spec: KernelSpec) -> tuple[Array, Array, Array]:
    """(plugin, unbiased, stderr) from the function itself, called for one example at a time."""
    z, _ = spec_perturbations(spec, "weight", model)
    means = []
    for x in (example.x1, example.x2):

        def function(theta: Array, x: Array = x) -> Array:
            rows = [np.asarray(example.fn(theta.copy(), row[None]), dtype=float).reshape(-1) for row in x]
            return np.stack(rows)

        draws = brute_force.weight_draws(function, example.params, z)
        means.append(brute_force.block_means(draws, np.arange(len(z)) * spec.blocks // len(z)))
    products = brute_force.block_products(*means, spec.outputs)
    with np.errstate(divide="ignore", invalid="ignore"):
        stderr = brute_force.calibrated_stderr(products)
    return brute_force.plugin(*means, spec.outputs), brute_force.unbiased(products), stderr


@pytest.mark.parametrize("make", EXAMPLES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_black_boxes_have_the_kernel_of_the_definition(make, outputs):
    example = make()
    model = BlackBox(example.fn, example.params)
    spec = KernelSpec(gamma=example.gamma, draws=24, blocks=4, outputs=outputs, design="antithetic", seed=3)
    plugin, unbiased, stderr = by_definition(example, model, spec)
    assert np.abs(plugin).max() > 0, "no decision changes at this range: the test would compare zeros"
    estimate = nonlocal_kernel(
        model, torch.from_numpy(example.x1), torch.from_numpy(example.x2), distribution=spec.distribution,
        draws=spec.draws, blocks=spec.blocks, outputs=outputs, design=spec.design, seed=spec.seed,
    )  # fmt: skip
    assert (estimate.estimator, estimate.num_parameters) == ("weight", len(example.params))
    assert estimate.reason == "the model holds a black box, which can be evaluated and nothing else"
    assert_equal(estimate.plugin, plugin)
    assert_equal(estimate.unbiased, unbiased, scale=np.abs(plugin).max())
    assert_equal(estimate.stderr, stderr, relative=1e-8)


def test_a_black_box_is_the_network_that_it_computes():
    """A network's forward pass written in NumPy has the network's kernels, `covariance` included."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def fn(params: Array, x: Array) -> Array:
        first, bias, second, last = np.split(params, [12, 16, 24])
        return np.tanh(x @ first.reshape(4, 3).T + bias) @ second.reshape(2, 4).T + last

    params = torch.cat([p.detach().flatten() for p in network.parameters()])
    x = torch.from_numpy(inputs(5))
    for kernel, options in ((nonlocal_kernel, {"estimator": "weight"}), (covariance_kernel, {})):
        one = kernel(BlackBox(fn, params), x, gamma=0.3, draws=32, **options)
        assert_equal(one.kernel, kernel(network, x, gamma=0.3, draws=32, **options).kernel, relative=1e-9)


def seen_by_function(dtype: torch.dtype, x: torch.Tensor) -> tuple[Array, Array]:
    """The arguments of fn when the module is prepared and called at a dtype."""
    seen: list[Array] = []

    def fn(params: Array, x: Array) -> Array:
        seen.extend((params, x))
        return x.sum(1)

    prepared = prepare_model(BlackBox(fn, [1 / 3, 2 / 3]), dtype=dtype, device="cpu")
    assert prepared(x).dtype == torch.float64
    return seen[0], seen[1]


def test_parameters_stay_float64_in_a_float32_run():
    x = torch.ones(2, 3, dtype=torch.float32)
    params, given = seen_by_function(torch.float32, x)
    assert params.dtype == given.dtype == np.float64
    np.testing.assert_array_equal(params, [1 / 3, 2 / 3])
    _, whole = seen_by_function(torch.float32, torch.ones(2, 3, dtype=torch.int32))
    assert whole.dtype == np.int64


def test_a_function_may_change_its_arguments():
    def fn(params: Array, x: Array) -> Array:
        x *= params[0]
        params += 1.0
        return x.sum(1)

    model, x = BlackBox(fn, [2.0]), torch.ones(2, 3, dtype=torch.float64)
    assert model(x).tolist() == model(x).tolist() == [6.0, 6.0]
    assert (x == 1).all()
    assert model.state_dict()["params"].tolist() == [2.0]


def test_a_black_box_may_be_a_part_of_a_network():
    """After a torch layer, also with that layer's parameters left out."""
    model = nn.Sequential(nn.Linear(3, 2).double(), BlackBox(lambda params, h: np.sign(h @ params), np.ones(2)))
    estimate = nonlocal_kernel(model, torch.from_numpy(inputs(4)), gamma=1.0, draws=32, parameters=["1.params"])
    assert (estimate.estimator, estimate.num_parameters) == ("weight", 2)


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (nonlocal_kernel, {"gamma": 1.0, "estimator": "autodiff"},
         r"estimator is 'autodiff', but the model holds a black box, which can only be evaluated; allowed: auto, w"),
        (averaged_kernel, {"gamma": 1.0}, r"kind is 'averaged', which uses gradients, but .* black box"),
        (local_kernel, {}, r"kind is 'local', which uses gradients, .*; allowed: nonlocal, covariance"),
    ],
)  # fmt: skip
def test_gradients_of_black_boxes_are_refused(kernel, options, message):
    with pytest.raises(NNTKError, match=message):
        kernel(BlackBox(lambda params, x: x @ params, np.ones(3)), torch.from_numpy(inputs(3)), **options)


@pytest.mark.parametrize(
    ("fn", "params", "message"),
    [
        (3, [1.0], r"fn is a int; allowed: a function fn\(params, x\)"),
        (max, [[1.0]], r"params is shape \(1, 1\); allowed: finite numbers of shape \(P,\)"),
        (max, [], r"params is shape \(0,\); allowed: finite"),
        (max, 1.0, r"params is shape \(\); allowed: finite"),
        (max, [1.0, np.nan], r"params is not finite; allowed: finite"),
        (max, ["a"], r"params is a list; allowed: an array of real numbers"),
        (max, np.ones(2, complex), r"params is dtype complex128; allowed: an array of real numbers"),
        (max, [[1.0], [1.0, 2.0]], r"params is a list; allowed: an array of real numbers"),
    ],
)
def test_wrong_parameters(fn: Any, params: Any, message: str):
    with pytest.raises(NNTKError, match=message):
        BlackBox(fn, params)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda params, x: x[0], r"the black box returned shape \(3,\) for 4 examples; allowed: \(4,\) or \(4, C\)"),
        (lambda params, x: x[:, :, None], r"returned shape \(4, 3, 1\) for 4 examples"),
        (lambda params, x: x.sum(), r"returned shape \(\) for 4 examples"),
        (lambda params, x: x[:, :0], r"returned shape \(4, 0\) for 4 examples"),
        (lambda params, x: None, r"the black box's result is a NoneType; allowed: an array of real numbers"),
        (lambda params, x: np.array(["yes"] * len(x)), r"the black box's result is dtype <U3; allowed"),
        (lambda params, x: x.sum(1) * 1j, r"the black box's result is dtype complex128; allowed"),
        (
            lambda params, x: x @ params,
            r"fn failed on params of shape \(2,\) and x of shape \(4, 3\), float64: ValueErr",
        ),
        (lambda params, x: np.log(params[0] - 1.0) * x[:, 0], r"the model's output: NaN or infinity for 4 of 4"),
    ],
    ids=["rows", "axes", "number", "no_outputs", "none", "words", "complex", "raises", "nan"],
)
@pytest.mark.filterwarnings("ignore:.*encountered in log")
def test_wrong_results(fn: Function, message: str):
    with pytest.raises(NNTKError, match=message) as caught:
        nonlocal_kernel(BlackBox(fn, np.array([0.5, 1.0])), torch.from_numpy(inputs(4)), gamma=1.0)
    assert "\n" not in str(caught.value)


BUILDER = """
import numpy as np
from nntk_dist import BlackBox

def build(input_shape, num_outputs):
    size = int(np.prod(input_shape)) * num_outputs
    def fn(params, x):
        assert params.dtype == x.dtype == np.float64
        return np.sign(x.reshape(len(x), -1) @ params.reshape(-1, num_outputs))
    return BlackBox(fn, np.sin(np.arange(size)))
"""


def test_black_boxes_go_through_the_pipeline(tmp_path, monkeypatch):
    """Built by python:module:function in float32 and rebuilt by the worker, it gives the library's kernel."""
    (tmp_path / "own_black_box.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(tmp_path)
    sets = ("model.builder=python:own_black_box:build", "model.args={}", "data.train=19", "data.test=5")
    kernel = ("kernel.draws=32", "kernel.distribution.gamma=1.0", "kernel.statistic=plugin")
    stored = arrays(finished(tmp_path / "run", *sets, *kernel))

    def fn(params: Array, x: Array) -> Array:
        return np.sign(x.reshape(len(x), -1) @ params.reshape(-1, 10))

    dataset = build_dataset(load_config(config_file(tmp_path / "run"), ["run_dir=unused", *sets]))
    train, test = (torch.from_numpy(part.inputs) for part in (dataset.train, dataset.test))
    estimate = nonlocal_kernel(
        BlackBox(fn, np.sin(np.arange(640))), test, train, gamma=1.0, draws=32, dtype=torch.float32
    )
    assert_equal(stored["test/gram"], estimate.plugin, relative=1e-6)
