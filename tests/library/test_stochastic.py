"""Models with noise: which noise a pass has, that a draw is one random function, and what is decided and refused.

Axes: n examples, S draws, C outputs.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import (
    BlackBox,
    BrownianActivation,
    Dropout,
    NNTKError,
    StochasticModule,
    averaged_kernel,
    covariance_kernel,
    fixed_noise,
    local_kernel,
    nonlocal_kernel,
)
from nntk_dist.batches import compute_outputs, compute_rows
from nntk_dist.difference_means import DifferenceMeans
from nntk_dist.evaluation import prepare_model
from nntk_dist.feature_maps import make_feature_map
from nntk_dist.parameters import select_parameters
from nntk_dist.philox import Stream, normal
from nntk_dist.probes import probe_jumps
from nntk_dist.resolution import resolve
from nntk_dist.spec import KernelSpec
from nntk_dist.stochastic import MEAN_FUNCTIONS
from tests.library.tools import all_rows, prepared_features
from tests.oracles import brute_force
from tests.oracles.statistics import assert_agrees

P_DROP = 0.4


class Jitter(StochasticModule):
    """As a user would write it: additive noise, two requests a call, one of each kind."""

    def forward(self, u: Tensor) -> Tensor:
        shape = u.shape[1:]
        return u * (1 + 0.2 * self.normals(shape, like=u)) + self.uniforms(shape, like=u).to(u.dtype)


class ByExample(StochasticModule):
    """Wrong: its noise has the examples' axis."""

    def forward(self, u: Tensor) -> Tensor:
        return u + self.normals(tuple(u.shape), like=u)


class Unseeded(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return nn.functional.dropout(u, 0.5, training=True)


class Twice(nn.Module):
    """One module of noise behind both layers."""

    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last, self.noise = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2), noise

    def forward(self, x: Tensor) -> Tensor:
        h = self.noise(torch.tanh(self.first(x)))
        return self.last(self.noise(torch.tanh(self.second(h))))


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def network(*noise: nn.Module, activation: nn.Module | None = None) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 5), activation or nn.Tanh(), *noise, nn.Linear(5, 2)))


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NOISE = {"dropout": Dropout(P_DROP), "jitter": Jitter(), "both": nn.Sequential(Dropout(P_DROP), Jitter())}


@pytest.fixture(params=NOISE.values(), ids=NOISE)
def noisy(request):
    return network(copy.deepcopy(request.param))


def test_a_pass_is_one_function_of_seed_and_group(noisy):
    with fixed_noise(noisy, seed=5, group=7):
        here = noisy(X)
        assert torch.equal(noisy(X), here)
        torch.testing.assert_close(noisy(X[2:3]), here[2:3], rtol=1e-13, atol=1e-13)
    with fixed_noise(copy.deepcopy(noisy), seed=5, group=7):
        assert torch.equal(noisy(X), noisy(X))
    others = []
    for seed, group in ((5, 8), (6, 7), (5 + (1 << 32), 7), (5, 7)):
        with fixed_noise(noisy, seed=seed, group=group):
            others.append(noisy(X))
    assert [torch.equal(other, here) for other in others] == [False, False, False, True]


def test_numbers_are_those_that_the_contract_names():
    """Normals of (seed, model stream, group, module) at request · 2^32, in the order of `model.modules()`."""
    model = nn.Sequential(Jitter(), Jitter()).eval()
    u = torch.zeros(2, 4, dtype=torch.float64)
    with fixed_noise(model, seed=3, group=11):
        ours = [model[k].normals((4,), like=u) for k in (0, 1, 1)]
    for values, module, request in zip(ours, (0, 1, 1), (0, 0, 1), strict=True):
        start = request << 32
        expected = normal(3, Stream.MODEL, torch.tensor([11]), start, start + 4, draw=module)[0]
        assert torch.equal(values, expected)


def test_every_request_of_a_pass_has_numbers_of_its_own():
    """A module called twice has fresh noise, the same in the next pass; a Brownian path is one path."""
    model, seen = Twice(Dropout(0.5)), []
    model.noise.register_forward_hook(lambda module, args, out: seen.append(out / args[0]))
    with fixed_noise(model.double().eval()):
        for _ in range(2):
            model(X)
    assert not torch.equal(seen[0][0], seen[1][0])
    for first, second in ((0, 2), (1, 3)):
        torch.testing.assert_close(seen[first], seen[second])
    path = BrownianActivation().eval()
    with fixed_noise(path):
        assert torch.equal(path(X), path(X))


def test_outside_it_is_one_function_too_and_noise_is_put_back(noisy):
    assert torch.equal(noisy(X), noisy(X))
    before = noisy(X)
    with fixed_noise(noisy, seed=9):
        inside = noisy(X)
        with fixed_noise(noisy, seed=10):
            assert not torch.equal(noisy(X), inside)
        assert torch.equal(noisy(X), inside)
    assert torch.equal(noisy(X), before)
    assert not noisy._forward_pre_hooks


def test_training_mode_draws_from_torch():
    for model in (network(Jitter()), network(Dropout(0.5))):
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first = model(X)
            assert not torch.equal(model(X), first)
            torch.manual_seed(0)
            assert torch.equal(model(X), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_func_takes_a_fixed_pass(noisy, dtype):
    model, x = prepare_model(noisy, dtype=dtype, device="cpu"), X.to(dtype)
    parameters = dict(model.named_parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    with fixed_noise(model, seed=2, group=3):
        expected = model(x)
        each = torch.func.vmap(lambda row: torch.func.functional_call(model, parameters, (row[None],))[0])(x)
        torch.testing.assert_close(each, expected, rtol=tolerance, atol=tolerance)
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        slope = torch.autograd.grad(torch.func.functional_call(model, leaves, (x,))[1, 0], list(leaves.values()))
    for ours, truth in zip((part[1, 0] for part in jacobian.values()), slope, strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


# What a draw is: the same network without noise, its masks written out as constants.


class Mask(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, u: Tensor) -> Tensor:
        return u * self.values


def mask_of(seed: int, group: int) -> Mask:
    layer, seen = Dropout(P_DROP).eval(), torch.ones(1, 5, dtype=torch.float64)
    with fixed_noise(layer, seed, group):
        return Mask(layer(seen)[0])


SPECS = {
    "weight": {"estimator": "weight"},
    "covariance": {"kind": "covariance"},
    "averaged": {"kind": "averaged"},
    "autodiff": {"estimator": "autodiff", "contraction": "layered"},
    "activation": {"estimator": "activation", "contraction": "layered"},
}


@pytest.mark.parametrize(
    ("name", "design"),
    [
        (name, design)
        for name in SPECS
        for design in ("iid", "antithetic", "orthogonal")
        if (name, design) != ("activation", "orthogonal")  # which is refused
    ],
)
def test_a_draw_is_the_network_with_the_mask_of_its_group(name, design):
    """Features of every draw, both evaluations in it, against those of a network without noise, which has that mask."""
    spec = KernelSpec(gamma=0.5, design=design, draws=8, blocks=4, seed=13, **SPECS[name])
    model = network(Dropout(P_DROP))
    features, resolution = prepared_features(model, X, spec)
    assert not resolution.stacked
    ours = all_rows(features, X)
    size = features.drawing.group_size
    assert size == {"iid": 1, "antithetic": 2, "orthogonal": 2}[design]
    masks = []
    for draw in range(8):
        masks.append(mask_of(13, draw // size))
        twin = prepare_model(network(masks[-1]), dtype=torch.float64, device="cpu")
        expected = all_rows(make_feature_map(twin, X, spec, resolution), X)
        by_draw = {array: values for array, values in ours.items() if values.shape[1] == 8}
        assert by_draw
        for array, values in by_draw.items():
            torch.testing.assert_close(values[:, draw], expected[array][:, draw], rtol=1e-12, atol=1e-12)
    assert len({tuple(mask.values.tolist()) for mask in masks}) > 2


@pytest.mark.parametrize(("design", "size"), [("iid", 1), ("antithetic", 2), ("orthogonal", 4)])
def test_groups_of_consecutive_draws(design, size):
    model = network()
    drawing = KernelSpec(gamma=0.5, design=design, draws=16, blocks=4).drawing(
        "weight", select_parameters(model), model
    )
    assert drawing.group_size == size
    for draws in (range(16), range(4, 12), range(size, 4 * size), range(3, 6)):
        members = [(draw, group) for group, part in drawing.by_group(draws) for draw in part]
        assert members == [(draw, draw // size) for draw in draws]


def test_a_brownian_draw_is_one_set_of_paths_in_both_evaluations():
    """Differences of every draw from plain passes of the network itself."""
    spec = KernelSpec(gamma=0.5, estimator="weight", design="antithetic", draws=8, blocks=4, seed=13)
    model = network(activation=BrownianActivation(0.3))
    features, _ = prepared_features(model, X, spec)
    ours, z = all_rows(features, X)["differences"], features.drawing.perturbations(range(8), dtype=torch.float64)
    space = select_parameters(model)
    for draw in range(8):
        moved = space.moved(space.values(model), z[draw])
        with fixed_noise(model, 13, draw // 2), torch.no_grad():
            expected = torch.func.functional_call(model, moved, (X,)) - model(X)
        torch.testing.assert_close(ours[:, draw], expected, rtol=1e-12, atol=1e-12)


def test_formed_means_are_the_differences_of_the_same_draws():
    spec = KernelSpec(gamma=0.5, estimator="weight", design="antithetic", draws=16, blocks=4)
    features, _ = prepared_features(network(Dropout(P_DROP)), X, spec)
    means = DifferenceMeans(features.evaluator, features.drawing, features.columns)
    z = features.drawing.perturbations(range(16), dtype=torch.float64)
    products = all_rows(features, X)["differences"][..., None] * features.drawing.directions(z)[:, None]
    expected = products.unflatten(1, (4, 4)).mean(2)
    torch.testing.assert_close(all_rows(means, X)["dense"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("words", SPECS.values(), ids=SPECS)
def test_features_do_not_depend_on_batches_or_chunks_of_draws(words):
    spec = KernelSpec(gamma=0.5, design="antithetic", draws=16, blocks=4, **words)
    features, _ = prepared_features(network(Dropout(P_DROP), Jitter()), X, spec)
    whole, ids = all_rows(features, X), torch.arange(len(X))
    chunks = [compute_rows(features, X, ids, range(start, start + 8), features.columns, batch=2) for start in (0, 8)]
    for name, values in whole.items():
        together = torch.cat([chunk[name] for chunk in chunks], dim=1)
        torch.testing.assert_close(together, values, rtol=1e-12, atol=1e-12)


def test_unbiased_and_plugin_are_those_of_the_draws():
    """The whole way of `weight`: perturbations and masks handed to brute force."""
    spec = KernelSpec(gamma=0.5, estimator="weight", draws=16, blocks=4, seed=3)
    model = network(Dropout(P_DROP))
    drawing = spec.drawing("weight", select_parameters(model), model)
    z, draws = drawing.perturbations(range(16), dtype=torch.float64).numpy(), []
    for draw in range(16):
        function, theta = brute_force.function_of_parameters(network(mask_of(3, draw)), X, ("*",))
        draws.append(brute_force.weight_draws(function, theta, z[draw : draw + 1])[0])
    means = brute_force.block_means(np.stack(draws), np.arange(16) // 4)
    products = brute_force.block_products(means, means, "trace")
    ours = nonlocal_kernel(model, X, gamma=0.5, estimator="weight", draws=16, blocks=4, seed=3, statistic="both")
    np.testing.assert_allclose(ours.unbiased, brute_force.unbiased(products), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.plugin, brute_force.plugin(means, means, "trace"), rtol=1e-9, atol=1e-9)


def test_estimators_agree_on_a_network_with_dropout():
    """Within their standard errors; the network without noise is another one (dropout right before a linear readout
    would not change the mean function, so it is behind both layers).
    """
    model, options = seeded(Twice(Dropout(P_DROP))), {"gamma": 0.6, "blocks": 16, "design": "antithetic"}
    draws = {"weight": 2048, "autodiff": 512, "activation": 512}
    found = {name: nonlocal_kernel(model, X, estimator=name, draws=count, **options) for name, count in draws.items()}
    reference = found.pop("autodiff")
    for estimate in found.values():
        stderr = torch.hypot(estimate.stderr, reference.stderr)
        assert_agrees(estimate.unbiased, reference.unbiased, stderr, 16)
    without = nonlocal_kernel(seeded(Twice(nn.Identity())), X, estimator="autodiff", draws=512, **options)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_agrees(without.unbiased, reference.unbiased, torch.hypot(without.stderr, reference.stderr), 16)


# What is decided, stored and refused.


def test_outputs_are_means_over_fixed_functions_that_no_draw_has(noisy):
    spec = KernelSpec(gamma=0.5, estimator="weight", draws=8, blocks=4, seed=6)
    features, _ = prepared_features(noisy, X, spec)
    values = []
    for group in MEAN_FUNCTIONS:
        with fixed_noise(noisy, 6, group):
            values.append(noisy(X).detach())
    expected = torch.stack(values).mean(0)
    torch.testing.assert_close(compute_outputs(features, X, batch=4), expected, rtol=1e-12, atol=1e-12)
    assert len(MEAN_FUNCTIONS) == 64
    assert MEAN_FUNCTIONS.start > 65536


def test_choices_and_reasons():
    text = "the noise of 1 module is part of the expectation"
    dropout = nonlocal_kernel(network(Dropout(P_DROP)), X, gamma=0.5)
    assert dropout.estimator == "autodiff"
    assert text in dropout.reason
    assert "the noise of 2 modules is" in nonlocal_kernel(network(Dropout(0.1), Jitter()), X, gamma=0.5).reason
    assert "noise" not in nonlocal_kernel(network(), X, gamma=0.5).reason
    rough = nonlocal_kernel(network(activation=BrownianActivation(0.01)), X, gamma=0.5, draws=16)
    assert rough.estimator == "activation"
    assert rough.reason.startswith("the noise of module '1' makes the model nowhere differentiable; of 32 parameters")
    layer = nn.Sequential(nn.Conv1d(1, 2, 2), BrownianActivation(0.01), nn.Flatten(), nn.Linear(4, 1, bias=False))
    assert nonlocal_kernel(seeded(layer), X[:, None], gamma=0.5, draws=16).estimator == "weight"


def test_the_jump_probe_passes_dropout_at_its_fixed_function():
    """(That it sees Brownian paths is tested with the other activations.)"""
    model = prepare_model(network(Dropout(P_DROP)), dtype=torch.float64, device="cpu")
    space = select_parameters(model)
    for gamma in (1e-3, 1.0):
        drawing = KernelSpec(gamma=gamma, draws=8).drawing("autodiff", space, model)
        assert probe_jumps(model, space, drawing, X).differentiable


def test_a_readout_that_noise_touches_is_none():
    """Noise behind the last layer: its gradient is not its input."""
    noisy_end = seeded(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), Jitter()))
    estimate = nonlocal_kernel(noisy_end, X, gamma=0.5, estimator="activation", draws=16)
    assert "0 lie in the readout" in estimate.reason


def test_noise_with_a_black_box():
    box = BlackBox(lambda params, x: x @ params.reshape(3, 2), np.linspace(-1, 1, 6))
    estimate = nonlocal_kernel(nn.Sequential(box, Jitter()), X, gamma=0.5, draws=16)
    assert estimate.estimator == "weight"
    assert estimate.kernel.isfinite().all()


def test_local_kernels_are_refused():
    with pytest.raises(
        NNTKError, match=r"kind is 'local', but the model draws noise \(module '2'\), .*; use kind: averaged, which is"
    ):
        local_kernel(network(Dropout(0.1)), X)


def test_gradients_of_rough_noise_are_refused():
    model = network(activation=BrownianActivation())
    with pytest.raises(
        NNTKError,
        match=r"kind is 'averaged', .*but the noise of module '1' makes the model nowhere.*use kind: nonlocal",
    ):
        averaged_kernel(model, X, gamma=0.5)
    with pytest.raises(
        NNTKError, match=r"estimator is 'autodiff', but the noise of module '1' .*; use estimator: weight, activation"
    ):
        nonlocal_kernel(model, X, gamma=0.5, estimator="autodiff")
    assert covariance_kernel(model, X, gamma=0.5, draws=16).estimator == "weight"


def test_noise_of_an_example_s_own_is_refused():
    with pytest.raises(NNTKError, match=r"output for one example depends on the other examples of its batch"):
        nonlocal_kernel(network(ByExample()), X, gamma=0.5)


def test_unseeded_noise_is_refused_with_the_way_out():
    with pytest.raises(
        NNTKError,
        match=r"draws random numbers even in eval mode, which are not seeded; take them from an "
        r"nntk_dist.StochasticModule, or replace nn.Dropout by nntk_dist.replace_dropout",
    ):
        nonlocal_kernel(network(Unseeded()), X, gamma=0.5)


def test_groups_requests_and_modules_out_of_range(monkeypatch):
    for group in (-1, 1 << 32):
        with (
            pytest.raises(NNTKError, match=rf"group is {group}; allowed: 0 to 4294967295"),
            fixed_noise(Jitter(), 0, group),
        ):
            pass
    monkeypatch.setattr("nntk_dist.stochastic._MOST_MODULES", 1)
    with (
        pytest.raises(NNTKError, match="the model has 2 modules with noise; allowed: 1"),
        fixed_noise(nn.Sequential(Jitter(), Jitter())),
    ):
        pass
    monkeypatch.setattr("nntk_dist.stochastic._MOST_REQUESTS", 1)
    with pytest.raises(NNTKError, match=r"a Jitter asks for noise the 2th time in one pass, for 3 numbers; allowed: 1"):
        prepare_model(Jitter(), dtype=torch.float64, device="cpu")(X)


def test_a_resolution_is_a_function_of_the_model_alone():
    """Decisions are made at one fixed random function: the same at any time."""
    model = prepare_model(network(Dropout(P_DROP), Jitter()), dtype=torch.float64, device="cpu")
    spec = KernelSpec(gamma=0.5)
    first = resolve(model, X, spec, batch=4)
    with fixed_noise(model, 1, 1):
        assert resolve(model, X, spec, batch=4) == first
    assert not math.isnan(float(model(X).sum()))
