"""Models with noise: the noise of each pass; a draw is one random function in all estimators.

Axes: n examples, S draws, C outputs.
"""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import BrownianActivation, Dropout, fixed_noise, nonlocal_kernel
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, prepared_features
from tests.library.noisy_models import NOISE, P_DROP, Jitter, Twice, X, network, seeded
from tests.oracles import brute_force
from tests.oracles.statistics import assert_agrees


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
    """A module called twice gets fresh noise, which the next pass repeats; a Brownian path stays one path."""
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


# The definition of a draw: the same network without noise, with its masks as constants.


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
    """Each draw's features, with both evaluations, against a network that has that mask and no noise."""
    spec = KernelSpec(gamma=0.5, design=design, draws=8, blocks=4, seed=13, **SPECS[name])
    model = network(Dropout(P_DROP))
    features, decision = prepared_features(model, X, spec)
    assert not decision.stacked
    ours = all_rows(features, X)
    size = features.drawing.group_size
    assert size == {"iid": 1, "antithetic": 2, "orthogonal": 2}[design]
    masks = []
    for draw in range(8):
        masks.append(mask_of(13, draw // size))
        twin = prepare_model(network(masks[-1]), dtype=torch.float64, device="cpu")
        expected = all_rows(make_feature_map(twin, X, spec, decision), X)
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
    """Differences of every draw against plain passes of the network."""
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
    chunks = [features.compute(X, ids, range(start, start + 8), features.columns, batch=2) for start in (0, 8)]
    for name, values in whole.items():
        together = torch.cat([chunk[name] for chunk in chunks], dim=1)
        torch.testing.assert_close(together, values, rtol=1e-12, atol=1e-12)


def test_unbiased_and_plugin_are_those_of_the_draws():
    """The estimator `weight` against brute force, which gets its perturbations and masks."""
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


@pytest.mark.statistical
def test_estimators_agree_on_a_network_with_dropout():
    """Within their standard errors, which the network without noise is not. Dropout right before a linear readout would
    not change the mean function, so it is behind both layers.
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
