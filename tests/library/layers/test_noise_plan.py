"""When the estimator `activation` applies, how it treats each parameter, what it refuses, and what `auto` chooses.

Axes: n examples.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nntk_dist import NNTKError, nonlocal_kernel
from nntk_dist.layers.noise_plan import NoisePlan, plan_noise
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.decision import Decision, decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, assert_equal, prepared_features
from tests.oracles.cases import Activate, case, mlp

# What it refuses and what it leaves open ------------------------------------------------------------------------------


class Hidden(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sign(functional.linear(torch.sign(self.first(x)), self.first.weight)))


class Turned(nn.Module):
    """Tokens come first, examples second."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sign(self.mix(x.transpose(0, 1))).sum(0))


def kernel(model: nn.Module, x: Tensor, **options):
    return nonlocal_kernel(model, x, **{"gamma": 0.5, "estimator": "activation", "draws": 16, "blocks": 4, **options})


def test_a_weight_used_elsewhere_is_refused():
    with pytest.raises(NNTKError, match=r"does not follow the parameters of module 'first' as noise .*; use estimator"):
        kernel(Hidden(), torch.randn(4, 4))
    with pytest.raises(NNTKError, match=r"does not follow the parameters of module 'encoder'"):
        kernel(case("tied_weights").build(), case("tied_weights").inputs(4))


def test_a_hook_that_changes_an_output_is_refused():
    model = mlp(Activate(torch.sign)).double()
    model[0].register_forward_hook(lambda module, args, out: out.round())
    with pytest.raises(NNTKError, match=r"does not follow the parameters of module '0' as noise"):
        kernel(model, torch.randn(4, 4))


@pytest.mark.parametrize("name", ["sign_unit", "relu_unit"])
def test_models_without_such_a_layer_are_refused(name: str):
    with pytest.raises(
        NNTKError, match=r"none of the selected parameters \('theta' and so on\) lies in a Linear layer"
    ):
        kernel(case(name).build(), case(name).inputs(4))


def test_other_distributions_and_designs_are_refused():
    model, x = case("sign_mlp").build(), case("sign_mlp").inputs(4)
    for name in ("sphere", "lowrank"):
        with pytest.raises(
            NNTKError, match=rf"estimator is 'activation'.*; allowed for distribution {name}: auto, weigh"
        ):
            kernel(model, x, distribution=name)
    with pytest.raises(
        NNTKError, match=r"design is 'orthogonal'; allowed for estimator activation, .*: iid, antithetic"
    ):
        kernel(model, x, design="orthogonal")
    for options in ({"distribution": "ball"}, {"design": "orthogonal"}):
        assert kernel(model, x, estimator="auto", **options).estimator == "weight"


def test_too_many_draws_are_refused():
    with pytest.raises(NNTKError, match=r"draws is 65600; allowed for estimator activation: up to 65536 \(iid\)"):
        kernel(case("sign_mlp").build(), case("sign_mlp").inputs(4), draws=65600)
    decide(
        case("sign_mlp").build(), case("sign_mlp").inputs(4),
        KernelSpec(estimator="activation", draws=131072, design="antithetic"), batch=4,
    )  # fmt: skip


class Varying(nn.Module):
    """Calls a layer twice for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.first(hidden)) if float(x.abs().max()) > 100 else hidden)


@pytest.mark.parametrize("reduction", ["none", "auto"])
def test_a_layer_that_some_inputs_call_twice_is_refused(reduction):
    model = Varying().double()
    spec = KernelSpec(gamma=0.5, estimator="activation", draws=8, blocks=4, variance_reduction=reduction)
    features, _ = prepared_features(model, torch.randn(4, 4, dtype=torch.float64), spec)
    with pytest.raises(NNTKError, match=r"module 'first' is called 2 times for some inputs and once for others"):
        all_rows(features, torch.full((4, 4), 200.0, dtype=torch.float64))


def plan_of(model: nn.Module, x: Tensor, patterns: tuple[str, ...] = ("*",)) -> NoisePlan:
    prepared = prepare_model(model, dtype=torch.float64, device="cpu")
    return plan_noise(prepared, select_parameters(prepared, patterns), x)


@pytest.mark.parametrize(
    ("name", "noisy", "readout", "weight_space"),
    [
        ("deep_sign_mlp", ["0", "2"], "4", []),
        ("flat_output", ["layers.0"], "layers.2", []),
        ("residual_in_place", ["enter", "inner"], "readout", []),
        ("layer_norm", ["0"], "3", ["1.weight", "1.bias"]),
        ("raw_parameters", ["hidden", "readout"], None, ["scale", "offset"]),
        ("repeated_layer", [], "readout", ["step.weight", "step.bias"]),
        ("attention", ["qkv", "mix"], "readout", ["class_token", "norm.weight", "norm.bias"]),
        ("embedding", [], "readout", ["tokens.weight", "positions.weight", "mix.weight", "mix.bias"]),
        ("convnet", ["0"], "5", ["2.weight"]),
        ("batch_norm", [], "5", ["0.weight", "0.bias", "1.weight", "1.bias"]),
    ],
)
def test_every_parameter_goes_one_way(name, noisy, readout, weight_space):
    plan = plan_of(case(name).build(), case(name).inputs(4))
    assert [each.module for each in plan.noisy] == noisy
    assert (plan.readout and plan.readout.module) == readout
    assert sorted(plan.weight_space) == sorted(weight_space)


def test_layers_whose_first_axis_is_not_the_examples_are_perturbed_in_weight_space():
    for examples in (3, 4):
        plan = plan_of(Turned(), torch.randn(examples, 3, 5))
        assert plan.weight_space == ("mix.weight", "mix.bias")


def test_an_output_layer_behind_a_nonlinearity_is_no_readout():
    plan = plan_of(nn.Sequential(mlp(nn.Tanh()), nn.LogSoftmax(1)), torch.randn(4, 4))
    assert plan.readout is None
    assert [each.module for each in plan.noisy] == ["0.0", "0.2"]


def test_zero_vectors_have_no_gradient():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), Activate(torch.sign), nn.Linear(6, 2)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    x[1] = 0.0
    result = kernel(model, x, parameters=["0.weight"], variance_reduction="none")
    assert not result.plugin[1].any()
    assert torch.isnan(result.stderr[1]).all()
    assert torch.isfinite(result.stderr[0, [0, 2, 3]]).all()


def test_entries_of_examples_that_no_draw_changed_are_unresolved_though_the_readout_is_known():
    """At a tiny range a sign network's hidden units do not change, except for the last example, which lies at a
    threshold. Its distance is much less than the range, and much more than rounding, so that the outputs do not depend
    on the batch.
    """
    model = mlp(Activate(torch.sign), bias=False).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    weight = model[0].weight.detach()
    x[3] -= weight[0] * (weight[0] @ x[3] - 1e-9) / (weight[0] @ weight[0])
    result = kernel(model, x, gamma=1e-6, draws=64, variance_reduction="none")
    assert torch.isnan(result.stderr[:3]).all()
    assert torch.isnan(result.stderr[:, :3]).all()
    assert float(result.stderr[3, 3]) > 0
    hidden = torch.sign(x[:3] @ weight.T)
    assert_equal(result.kernel[:3, :3], 3 * hidden @ hidden.T, 1e-12)
    full = kernel(model, x, gamma=1e-6, draws=64, outputs="full", variance_reduction="none")
    assert torch.isnan(full.stderr[:9]).all()
    assert not torch.isnan(full.stderr[9:, 9:]).any()


def test_a_kernel_of_the_readout_alone_is_exact():
    entry = case("relu_mlp")
    result = kernel(entry.build(), entry.inputs(4), parameters=["2.*"])
    hidden = torch.relu(entry.build()[0](entry.inputs(4)))
    assert_equal(result.unbiased, 3 * (hidden @ hidden.T + 1).detach(), 1e-12)
    assert float(result.stderr.max()) < 1e-12


# The choice among estimators ------------------------------------------------------------------------------------------


def choice(name: str, **options) -> Decision:
    return decide(case(name).build(), case(name).inputs(8), KernelSpec(gamma=0.5, **options), batch=8)


def test_auto_takes_noise_in_pre_activations_where_gradients_miss_jumps():
    chosen = choice("deep_sign_mlp")
    assert (chosen.estimator, chosen.num_draws, chosen.stacked) == ("activation", 256, False)
    assert chosen.reason.startswith(
        "autodiff is unavailable: the model jumps in its parameters, and gradients miss the jumps: along random"
    )
    assert chosen.reason.endswith(
        "of 86 parameters 72 are reached by noise in the pre-activations of 2 layers, 14 lie in the readout, whose "
        "gradient is exact, and 0 are perturbed themselves"
    )
    assert chosen.contraction.startswith("contraction: layered: 0; means: 4, 2.weight, 2.bias; noise integrated: 2; ")
    assert choice("deep_sign_mlp", variance_reduction="none").contraction == "contraction: means: 0, 2"
    assert choice("relu_mlp").estimator == "autodiff"
    assert choice("sign_unit").estimator == "weight"
    assert choice("relu_mlp", estimator="activation").reason.startswith("asked for: of 51 parameters 30 are reached by")


def test_auto_takes_differences_where_noise_would_reach_few_parameters():
    model = nn.Sequential(nn.Conv2d(1, 8, 2), Activate(torch.sign), nn.Flatten(), nn.Linear(32, 1, bias=False))
    chosen = decide(model, torch.randn(4, 1, 3, 3), KernelSpec(gamma=0.5), batch=4)
    assert chosen.estimator == "activation"  # four patches of five numbers, and the readout
    model = nn.Sequential(
        nn.Conv2d(1, 16, 2), Activate(torch.sign), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1)
    )
    chosen = decide(model, torch.randn(4, 1, 5, 5), KernelSpec(gamma=0.5), batch=4)
    assert chosen.estimator == "weight"
    assert (
        "activation is unavailable: noise in pre-activations would reach less than half of the parameters"
        in chosen.reason
    )


def test_the_decision_is_all_that_a_feature_map_needs():
    spec = KernelSpec(gamma=0.5, draws=8, blocks=4)
    model, x = case("deep_sign_mlp").build(), case("deep_sign_mlp").inputs(8)
    decision = decide(model, x, spec, batch=8)
    again = make_feature_map(prepare_model(model, dtype=torch.float64, device="cpu"), x[:3], spec, decision)
    first, _ = prepared_features(model, x, spec)
    for name, array in all_rows(first, x).items():
        assert torch.equal(all_rows(again, x)[name], array)
