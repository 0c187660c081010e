"""Where gradients may be trusted: smooth models and kinks pass, jumps are refused however they are dressed up.

Axes: n examples, C outputs.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from nntk_dist import NNTKError, nonlocal_kernel
from nntk_dist.models import ACTIVATIONS, build_model
from nntk_dist.parameters import select_parameters
from nntk_dist.probes import JumpProbe, probe_jumps
from nntk_dist.resolution import resolve
from nntk_dist.spec import KernelSpec
from tests.oracles.cases import CASES, Activate, case, mlp

JUMPS = ("sign", "step", "quantize")
REFUSED = (
    r"estimator is 'autodiff', but the model jumps in its parameters \(along random segments the integrated gradient "
    r"misses [\d.e+-]+ of the change of f, at up to \d+ points\), where it is silently wrong; "
    r"use estimator: weight or auto"
)


class ArgMax(nn.Module):
    """One where the largest unit is, zero elsewhere; a product keeps it on the graph."""

    def forward(self, u: Tensor) -> Tensor:
        return u + (nn.functional.one_hot(u.argmax(-1), u.shape[-1]) - u).detach()


class Detached(nn.Module):
    """Cuts its input off from the graph: gradients in front of it are zero, changes are not."""

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(u).detach()


def probe(model: nn.Module, x: Tensor, *, gamma: float = 1.0, seed: int = 0) -> JumpProbe:
    space = select_parameters(model)
    return probe_jumps(model, space, KernelSpec(gamma=gamma, draws=8, seed=seed).drawing("autodiff", space, model), x)


def dressed(activation: nn.Module) -> tuple[nn.Module, Tensor]:
    """A two-layer network around an activation, with parameters of its own."""
    torch_model = mlp(activation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return torch_model.double(), torch.randn(8, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [1e-3, 1.0])
@pytest.mark.parametrize("entry", CASES, ids=[entry.name for entry in CASES])
def test_cases_are_judged_as_they_are_labelled(entry, gamma):
    assert probe(entry.build(), entry.inputs(8), gamma=gamma).differentiable == entry.lipschitz


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    model = build_model("mlp", {"widths": [8], "activation": activation}, input_shape=(4,), num_outputs=2, seed=0)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    assert probe(model, x, gamma=0.5).differentiable == (activation not in (*JUMPS, "brownian"))


@pytest.mark.parametrize("name", ["relu_unit", "relu_mlp", "deep_relu_mlp"])
@pytest.mark.parametrize("n", [1, 3])
def test_kinks_pass_with_few_examples_whatever_the_seed(name, n):
    """On a segment that a unit is off, or on for the last of it only, the change of f is small: kinks weigh more."""
    entry = case(name)
    for seed in range(4):
        result = probe(entry.build(), entry.inputs(n), seed=seed)
        assert result.differentiable, f"seed {seed}: {result}"


def test_a_relu_that_is_off_along_some_segments_passes():
    """The output does not move there; elsewhere it does, and its gradients are right."""
    entry = case("relu_unit")
    model = entry.build()
    with torch.no_grad():
        model.theta.copy_(torch.tensor([-1.0, 0, 0, 0, 0]))
    x = torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64)
    for seed in range(4):
        assert probe(model, x, gamma=4.0, seed=seed).differentiable


@pytest.mark.parametrize("name", ["sign_unit", "sign_mlp", "straight_through_mlp"])
def test_jumps_are_seen_whatever_the_seed(name):
    for seed in range(3):
        assert probe(case(name).build(), case(name).inputs(8), seed=seed).residual > 0.1


@pytest.mark.parametrize(
    "activation",
    [Activate(torch.sign), Activate(torch.round), ArgMax(), Detached(), case("straight_through_mlp").make()[1]],
    ids=["sign", "round", "argmax", "detached", "straight_through"],
)
def test_autodiff_is_refused_on_jumps(activation):
    model, x = dressed(activation)
    with pytest.raises(NNTKError, match=REFUSED):
        nonlocal_kernel(model, x, gamma=1.0, estimator="autodiff")


def test_autodiff_is_refused_at_a_range_too_small_to_meet_a_jump():
    entry = case("sign_mlp")
    with pytest.raises(NNTKError, match=REFUSED):
        nonlocal_kernel(entry.build(), entry.inputs(8), gamma=1e-7, estimator="autodiff")


def test_auto_takes_gradients_where_it_may_and_says_why():
    estimate = nonlocal_kernel(case("relu_mlp").build(), case("relu_mlp").inputs(8), gamma=0.5)
    assert estimate.estimator == "autodiff"
    assert estimate.draws == 8
    assert estimate.reason.startswith("the model is locally Lipschitz in its parameters: along random segments")


def test_auto_takes_differences_where_it_must_and_says_why():
    estimate = nonlocal_kernel(case("sign_unit").build(), case("sign_unit").inputs(8), gamma=0.5)
    assert estimate.estimator == "weight"
    assert estimate.draws == 256
    assert estimate.reason.startswith("the model jumps in its parameters, where gradients miss the jumps: along random")


def test_other_choices_are_explained_too():
    model, x = case("relu_mlp").build(), case("relu_mlp").inputs(4)
    reasons = {}
    for kind, estimator in (("nonlocal", "weight"), ("covariance", "auto"), ("averaged", "auto"), ("local", "auto")):
        resolution = resolve(model, x, KernelSpec(kind=kind, estimator=estimator), batch=4)
        reasons[kind] = (resolution.estimator, resolution.reason.split("; contraction: ")[0])
    assert reasons == {
        "nonlocal": ("weight", "asked for; valid for anything that can be evaluated"),
        "covariance": ("weight", "the covariance kernel is made of output differences"),
        "averaged": ("autodiff", "the averaged NTK is made of gradients at random parameters"),
        "local": ("autodiff", "the ordinary NTK is made of gradients at θ"),
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
    estimate = nonlocal_kernel(model, x, gamma=0.1, parameters=["0.*"])
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
