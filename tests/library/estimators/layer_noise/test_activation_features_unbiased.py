"""The estimator `activation` is unbiased: against closed forms, or against other estimators if there is none.

Two-layer networks have nonlocal gradients by quadrature over one number; for other networks the reference is `weight`,
or `autodiff` if that is valid. Standard errors are at most 2 % of the mean diagonal, at ranges at which local and
nonlocal kernels lie far more than ten standard errors apart. Agreement is required at a corrected 0.1 %.

Axes: T seeds, n examples, C outputs, N = n·C rows of a kernel.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import local_kernel, nonlocal_kernel
from nntk_dist.estimators.layer_noise.activation_features import ActivationFeatures
from nntk_dist.models.builders import build_model
from nntk_dist.spec import KernelSpec
from tests.harness.many_seeds import Problem, check
from tests.harness.tools import all_rows, estimates_of, prepared_features
from tests.oracles import brute_force, two_layer
from tests.oracles.cases import Activate, case
from tests.oracles.statistics import assert_agrees, assert_coverage, assert_power, covered

Array = np.ndarray
BOUNDS = (0.92, 0.98)


def unit_layer(problem: Problem) -> nn.Module:
    """The unit of the closed forms as a Linear layer and an activation."""
    layer = nn.Linear(problem.num_parameters, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(problem.theta))
    return nn.Sequential(layer, Activate({"sign": torch.sign, "relu": torch.relu}[problem.unit]))


def two_layer_kernel(name: str, x: Tensor, gamma: float, outputs: str) -> Array:
    """The kernel of a two-layer case, by quadrature."""
    parameters = [parameter.detach().numpy() for parameter in case(name).build().parameters()]
    unit = "relu" if "relu" in name else "sign"
    rows = brute_force.rows_of(two_layer.nonlocal_gradient(unit, x.numpy(), *parameters[:3], gamma), outputs)
    return rows @ rows.T


@pytest.mark.statistical
@pytest.mark.parametrize("gamma", [0.8, 1.5])
@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("name", ["sign_mlp", "straight_through_mlp", "relu_mlp"])
def test_two_layer_networks_have_the_kernel_of_quadrature(name: str, design: str, gamma: float):
    model, x = case(name).build(), case(name).inputs(4)
    options = {"design": design, "draws": 65_536, "blocks": 64, "outputs": "full"}
    ours = nonlocal_kernel(model, x, gamma=gamma, estimator="activation", seed=1, **options)
    expected = two_layer_kernel(name, x, gamma, "full")
    assert_agrees(ours.unbiased, expected, ours.stderr, 64)
    assert_power(ours.stderr, expected, local_kernel(model, x, outputs="full").numpy())


@pytest.mark.parametrize("num_parameters", [3, 10])
@pytest.mark.parametrize("unit", ["sign", "relu"])
def test_units_have_the_kernel_of_the_closed_form(unit: str, num_parameters: int):
    problem = Problem(unit, num_parameters)
    x = torch.from_numpy(problem.x)
    options = {"design": "antithetic", "draws": 131_072, "blocks": 64}
    ours = nonlocal_kernel(unit_layer(problem), x, gamma=problem.gamma, estimator="activation", **options)
    assert_agrees(ours.unbiased, problem.exact(), ours.stderr, 64)
    assert_power(ours.stderr, problem.exact(), problem.local())


def sign_convnet() -> nn.Module:
    """A network in which both convolutions see fewer patches than a patch has numbers."""
    layers = [nn.Conv2d(2, 3, 2, stride=2), Activate(torch.sign), nn.Conv2d(3, 3, 2), Activate(torch.sign)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, 2))


def sign_transformer() -> nn.Module:
    """Four tokens, fewer than the width of any projection; norms, tokens and positions in weight space."""
    args = {"dim": 4, "depth": 1, "heads": 2, "hidden": 6, "activation": "sign"}
    return build_model("transformer", args, input_shape=(3, 3), num_outputs=2, seed=0)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw a model's parameters with standard deviation 0.7."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def normal_inputs(*shape: int) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


OTHERS = {  # model, inputs, γ, draws, reference, its draws
    "deep_sign_mlp": (case("deep_sign_mlp").build, case("deep_sign_mlp").inputs(3), 1.5, 16_384, "weight", 65_536),
    "sign_convnet": (lambda: filled(sign_convnet()), normal_inputs(2, 4, 4), 1.2, 16_384, "weight", 40_960),
    "convnet": (case("convnet").build, case("convnet").inputs(3), 0.9, 4_096, "autodiff", 3_072),
    "sign_transformer": (lambda: sign_transformer().double(), normal_inputs(3, 3), 0.6, 6_144, "weight", 65_536),
    "tokens": (case("linear_on_tokens").build, case("linear_on_tokens").inputs(3), 1.2, 65_536, "weight", 131_072),
    "embedding": (case("embedding").build, case("embedding").inputs(3), 0.9, 4_096, "weight", 131_072),
    "repeated_layer": (case("repeated_layer").build, case("repeated_layer").inputs(3), 0.9, 4_096, "weight", 131_072),
}


@pytest.mark.statistical
@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_have_the_kernel_of_the_other_estimators(name: str):
    make, x, gamma, draws, reference, reference_draws = OTHERS[name]
    options = {"gamma": gamma, "design": "antithetic", "blocks": 32}
    ours = nonlocal_kernel(make(), x, estimator="activation", draws=draws, seed=3, **options)
    theirs = nonlocal_kernel(make(), x, estimator=reference, draws=reference_draws, seed=4, **options)
    assert_agrees(ours.unbiased, theirs.unbiased, torch.hypot(ours.stderr, theirs.stderr), 32)
    local = local_kernel(make(), x).numpy()
    for one in (ours, theirs):
        assert_power(one.stderr, theirs.unbiased, local)


def many_seeds(features: ActivationFeatures, x: Tensor, spec: KernelSpec, seeds: range) -> tuple[Array, Array]:
    """U and its standard error under each seed, through the library's own passes."""
    results = []
    for seed in seeds:
        seeded = replace(features, drawing=replace(features.drawing, seed=seed))
        rows = all_rows(seeded, x)
        results.append(estimates_of(seeded, rows, rows, replace(spec, seed=seed)))
    centre, stderr = (torch.stack([result[name] for result in results]).numpy() for name in ("unbiased", "stderr"))
    return centre, stderr


@pytest.mark.statistical
def test_intervals_of_a_sign_unit_cover_the_closed_form():
    problem = Problem("sign", 4)
    x = torch.from_numpy(problem.x)
    spec = KernelSpec(gamma=problem.gamma, estimator="activation", draws=256)
    features, _ = prepared_features(unit_layer(problem), x, spec)
    centre, stderr = many_seeds(features, x, spec, range(1000))
    assert_coverage(covered(centre, problem.exact(), stderr, 8), BOUNDS)
    assert_power(check(centre, problem.exact()), problem.exact(), problem.local())
