"""When gradients are valid: smooth models and kinks pass, jumps of every form are refused.

Axes: n examples, C outputs.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from nntk_dist import NNTKError, nonlocal_kernel
from nntk_dist.models.builders import ACTIVATIONS, build_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning import jumps
from nntk_dist.planning.chords import largest_jump
from nntk_dist.planning.decision import decide
from nntk_dist.planning.jumps import JumpProbe, probe_jumps
from nntk_dist.spec import KernelSpec
from tests.harness.grids import few_and_many
from tests.oracles.cases import CASES, case, mlp

JUMPS = ("sign", "step", "quantize")
MEASURED = (
    r"along random segments the integrated gradient misses at least [\d.e+-]+ of the change of f, at up to \d+ points"
)
JUMPING = "estimator is 'autodiff', but the model jumps in its parameters, and gradients miss the jumps: "
REFUSED = f"{JUMPING}{MEASURED}; use estimator: weight or auto"
CUT_OFF = (
    r"estimator is 'autodiff', but the model's gradients do not account for the changes of its output, and no jump was "
    rf"met: its code cuts them off \(detach, no_grad\) or replaces them, or it is rougher than Lipschitz: {MEASURED}"
)


class ArgMax(nn.Module):
    """One for the largest unit, zero for the others; a product keeps it on the graph."""

    def forward(self, u: Tensor) -> Tensor:
        return u + (nn.functional.one_hot(u.argmax(-1), u.shape[-1]) - u).detach()


class Detached(nn.Module):
    """Cuts its input off from the graph: gradients in front of it are zero, changes are not."""

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(u).detach()


class Compared(nn.Module):
    """A comparison: it jumps, and nothing of its output is on the graph."""

    def forward(self, u: Tensor) -> Tensor:
        return (u > 0.1).to(u.dtype)


class Sign(nn.Module):
    """It jumps, and its gradient is zero."""

    def forward(self, u: Tensor) -> Tensor:
        return torch.sign(u)


class WithoutGradient(nn.Module):
    """A smooth function computed under `no_grad`."""

    def forward(self, u: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.tanh(u)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        return torch.tanh(u)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 0.5 * gradient


class WrongBackward(nn.Module):
    """A smooth function with a backward pass of another one."""

    def forward(self, u: Tensor) -> Tensor:
        return _Halved.apply(u)


def probe(model: nn.Module, x: Tensor, *, gamma: float = 1.0, seed: int = 0) -> JumpProbe:
    space = select_parameters(model)
    return probe_jumps(model, space, KernelSpec(gamma=gamma, draws=8, seed=seed).drawing("autodiff", space, model), x)


def dressed(activation: nn.Module) -> tuple[nn.Module, Tensor]:
    """A two-layer network around an activation, with drawn parameters, and inputs."""
    torch_model = mlp(activation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return torch_model.double(), torch.randn(8, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("entry", "gamma"),
    [(entry, (1.0, 1e-3)[number % 2]) for number, entry in enumerate(CASES)],
    ids=[entry.name for entry in CASES],
)
def test_cases_are_judged_as_they_are_labelled(entry, gamma):
    assert probe(entry.build(), entry.inputs(8), gamma=gamma).differentiable == entry.lipschitz


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, monkeypatch):
    if activation == "brownian":  # a path takes a hundred times as long as a sign
        monkeypatch.setattr(jumps, "_MOST_GRADIENTS", 20)
    model = build_model("mlp", {"widths": [8], "activation": activation}, input_shape=(4,), num_outputs=2, seed=0)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    assert probe(model, x, gamma=0.5).differentiable == (activation not in (*JUMPS, "brownian"))


@pytest.mark.parametrize("name", ["relu_unit", "relu_mlp", "deep_relu_mlp"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("seeds", few_and_many(1, 4))
def test_kinks_pass_with_few_examples_whatever_the_seed(name, n, seeds):
    """If a unit is off on a segment, or on only at its end, the change of f is small and kinks weigh more."""
    entry = case(name)
    for seed in seeds:
        result = probe(entry.build(), entry.inputs(n), seed=seed)
        assert result.differentiable, f"seed {seed}: {result}"


def test_a_relu_that_is_off_along_some_segments_passes():
    """The output is constant along those; along the others it changes, and its gradients are right."""
    entry = case("relu_unit")
    model = entry.build()
    with torch.no_grad():
        model.theta.copy_(torch.tensor([-1.0, 0, 0, 0, 0]))
    x = torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64)
    for seed in range(4):
        assert probe(model, x, gamma=4.0, seed=seed).differentiable


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["sign_unit", "sign_mlp", "straight_through_mlp"])
def test_jumps_are_seen_whatever_the_seed(name):
    for seed in range(3):
        assert probe(case(name).build(), case(name).inputs(8), seed=seed).residual > 0.1


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (ArgMax(), REFUSED),
        (Compared(), REFUSED),
        (Sign(), REFUSED),
        (Detached(), CUT_OFF),
        (WithoutGradient(), CUT_OFF),
        (WrongBackward(), CUT_OFF),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("stacked", [True, False])
def test_autodiff_is_refused_with_the_true_reason(activation, reason, stacked, monkeypatch):
    monkeypatch.setattr(jumps, "_STACKED_NUMBERS", jumps._STACKED_NUMBERS if stacked else 0)
    model, x = dressed(activation)
    with pytest.raises(NNTKError, match=reason):
        nonlocal_kernel(model, x, gamma=1.0, estimator="autodiff")


def test_autodiff_is_refused_at_a_range_too_small_to_meet_a_jump():
    entry = case("sign_mlp")
    with pytest.raises(NNTKError, match=REFUSED):
        nonlocal_kernel(entry.build(), entry.inputs(8), gamma=1e-7, estimator="autodiff")


def four_units(activation: str, n: int, seed: int) -> tuple[nn.Module, Tensor]:
    model = build_model("mlp", {"widths": [4], "activation": activation}, input_shape=(1,), num_outputs=1, seed=seed)
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
    return model.double(), x


def test_four_units_that_jump_are_seen_at_a_small_range_with_few_examples():
    """Few of the run's segments meet a jump: without chords, more than half of these models would pass."""
    results = [probe(*four_units("sign", 2, seed), gamma=0.02, seed=seed) for seed in range(10)]
    assert [seed for seed, result in enumerate(results) if result.differentiable] == []
    assert all(result.jump > 0 for result in results)
    assert any(result.residual <= 0.01 for result in results)  # chords alone show these


@pytest.mark.parametrize("activation", JUMPS)
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("seeds", few_and_many(5, 50))
def test_chords_meet_the_jumps_of_four_units(activation, n, seeds):
    for seed in seeds:
        model, x = four_units(activation, n, seed)
        assert largest_jump(model, select_parameters(model), x, seed) > 0, seed


class OneWeight(nn.Module):
    """A function of θ = 1 that does not depend on x."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.theta = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.theta).expand(len(x))


def jump_of(function) -> float:
    model = OneWeight(function)
    return largest_jump(model, select_parameters(model), torch.zeros(3, 1, dtype=torch.float64), 0)


def test_the_size_of_a_jump_is_relative_to_the_range():
    assert jump_of(lambda theta: torch.sign(theta)) == pytest.approx(1.0)
    assert jump_of(lambda theta: 40.0 + 3.0 * (theta > -0.2)) == pytest.approx(1.0)
    assert jump_of(lambda theta: (theta > 1.5).double()) == pytest.approx(1.0)  # 0 around θ
    assert jump_of(lambda theta: theta**60 * torch.sign(theta - 1.01)) > 0.01  # f grows by many orders
    small = jump_of(lambda theta: theta + 0.1 * torch.sign(theta - 0.123))
    assert 0.01 < small < 0.2


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        torch.abs,
        lambda theta: torch.tanh(1e5 * (theta - 0.123)),
        lambda theta: theta + 1e-5 * torch.sign(theta),  # too small to matter
        lambda theta: torch.sin(theta.float()).double(),  # steps of float32's rounding
        lambda theta: 1e9 + theta,
        lambda theta: torch.log(theta - 1.0) + torch.sign(theta - 1.1),  # not finite: undecidable
        torch.zeros_like,
    ],
)
def test_what_is_continuous_or_cannot_be_told_shows_no_jump(function):
    assert jump_of(function) == 0.0


@pytest.mark.parametrize(
    ("builder", "args", "shape"),
    [
        ("mlp", {"widths": [16] * 4, "activation": "relu"}, (4,)),
        ("mlp", {"widths": [16] * 6, "activation": "gelu"}, (4,)),
        ("mlp", {"widths": [32] * 8, "activation": "relu"}, (8,)),
        ("transformer", {"patch": 4, "dim": 16, "depth": 2, "heads": 2}, (1, 8, 8)),
    ],
)
@pytest.mark.parametrize("seeds", few_and_many(1, 8))
def test_deep_networks_show_no_jump_on_long_chords(builder, args, shape, seeds):
    for seed in seeds:
        model = build_model(builder, args, input_shape=shape, num_outputs=3, seed=seed).double().eval()
        x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert largest_jump(model, select_parameters(model), x, seed) == 0.0


class Gated(nn.Module):
    """A deep network with gates, as in MobileNetV3: far out f grows by 20 orders, and gates are as steep as jumps."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        for parameter in self.parameters():
            parameter.data *= 2.5

    def forward(self, x: Tensor) -> Tensor:
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = nn.functional.hardswish(layer(x))
            x = x * nn.functional.hardsigmoid(gate(x))
        return self.head(x)


@pytest.mark.parametrize(("width", "depth"), [(16, 16), (8, 24)])
def test_steep_gates_are_no_jumps(width, depth):
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = Gated(width, depth).double().eval(), torch.randn(8, width, dtype=torch.float64)
        assert largest_jump(model, select_parameters(model), x, seed) == 0.0


def test_a_jump_met_on_a_chord_alone_is_given_as_the_reason():
    model = build_model("mlp", {"widths": [4], "activation": "sign"}, input_shape=(1,), num_outputs=1, seed=0).double()
    x = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    with torch.no_grad():
        model[1].bias.fill_(4.0)
    assert probe(model, x, gamma=1e-3).residual <= 0.01
    message = JUMPING + r"on a long segment through θ f jumps by [\d.]+ of its range there"
    with pytest.raises(NNTKError, match=message):
        nonlocal_kernel(model, x, gamma=1e-3, estimator="autodiff")
    assert nonlocal_kernel(model, x, gamma=1e-3).probes.differentiable is False


def test_auto_takes_gradients_where_it_may_and_says_why():
    estimate = nonlocal_kernel(case("relu_mlp").build(), case("relu_mlp").inputs(8), gamma=0.5)
    assert estimate.estimator == "autodiff"
    assert estimate.draws == 8
    assert estimate.reason.startswith("the model is locally Lipschitz in its parameters: along random segments")


def test_auto_takes_differences_where_it_must_and_says_why():
    estimate = nonlocal_kernel(case("sign_unit").build(), case("sign_unit").inputs(8), gamma=0.5)
    assert estimate.estimator == "weight"
    assert estimate.draws == 256
    assert estimate.reason.startswith(
        "autodiff is unavailable: the model jumps in its parameters, and gradients miss the jumps: along random"
    )


def test_other_choices_are_explained_too():
    model, x = case("relu_mlp").build(), case("relu_mlp").inputs(4)
    reasons = {}
    for kind, estimator in (("nonlocal", "weight"), ("covariance", "auto"), ("averaged", "auto"), ("local", "auto")):
        decision = decide(model, x, KernelSpec(kind=kind, estimator=estimator), batch=4)
        reasons[kind] = (decision.estimator, decision.reason)
    assert reasons == {
        "nonlocal": ("weight", "asked for: valid for anything that can be evaluated"),
        "covariance": ("weight", "the covariance kernel uses output differences"),
        "averaged": ("autodiff", "the averaged NTK uses gradients at random parameters"),
        "local": ("autodiff", "the ordinary NTK uses gradients at θ"),
    }


def test_an_output_that_nothing_moves_is_no_ground_for_gradients():
    model, x = dressed(nn.ReLU())
    with torch.no_grad():
        model[0].bias.fill_(-1e6)
        model[2].weight.fill_(0.0)
    space = select_parameters(model, ["0.*"])
    dead = probe_jumps(model, space, KernelSpec(gamma=0.1, draws=8).drawing("autodiff", space, model), x)
    assert math.isnan(dead.residual)
    assert not dead.differentiable
    estimate = nonlocal_kernel(model, x, gamma=0.1, parameters=["0.*"], variance_reduction="none")
    assert estimate.estimator == "activation"
    assert not estimate.kernel.any()
    assert estimate.stderr.isnan().all()
    assert "along random segments f does not change at all; of 30 parameters 30 are reached" in estimate.reason


def test_the_probe_leaves_the_model_as_it_was():
    model, x = dressed(nn.ReLU())
    before = [parameter.clone() for parameter in model.parameters()]
    probe(model, x)
    assert all(
        torch.equal(a, b) and b.requires_grad and b.grad is None
        for a, b in zip(before, model.parameters(), strict=True)
    )


def test_the_probe_depends_on_the_law_and_not_on_the_number_of_draws_or_their_design():
    model, x = dressed(nn.ReLU())
    space = select_parameters(model)
    few, many, other = (
        probe_jumps(model, space, KernelSpec(**options).drawing("autodiff", space, model), x)
        for options in (
            {"gamma": 0.5, "draws": 8},
            {"gamma": 0.5, "draws": 96, "blocks": 6, "design": "antithetic"},
            {"gamma": 0.7, "draws": 8},
        )
    )
    assert few == many
    assert few != other
