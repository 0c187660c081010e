"""Probes of models with many parameters: fewer points on fewer examples, one point in memory, the same findings."""

import pytest
import torch
from torch import nn

from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning import effort as efforts
from nntk_dist.planning.decision import decide
from nntk_dist.planning.effort import Effort
from nntk_dist.planning.jumps import probe_jumps
from nntk_dist.spec import KernelSpec


class Sign(nn.Module):
    def forward(self, x):
        return torch.sign(x)


@pytest.fixture
def many(monkeypatch):
    """Every model counts as one of many parameters."""
    monkeypatch.setattr(efforts, "_MANY_PARAMETERS", 0)


def network(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 16), activation, nn.Linear(16, 16), activation, nn.Linear(16, 2))
    return prepare_model(layers, dtype=torch.float32, device="cpu")


def test_a_small_model_is_tried_on_all_examples_and_a_large_one_on_few():
    with torch.device("meta"):
        sizes = [nn.Linear(width, width, bias=False) for width in (8, 4096, 20_000)]
    found = [Effort.of(layer) for layer in sizes]
    assert [each.examples for each in found] == [32, 16, 4]
    assert [each.measures_noise for each in found] == [True, True, False]


@pytest.mark.parametrize(
    ("activation", "smooth"), [(nn.Tanh(), True), (nn.ReLU(), True), (Sign(), False)], ids=["tanh", "relu", "sign"]
)
@pytest.mark.parametrize("gamma", [1e-4, 0.1])
def test_less_effort_tells_jumps_from_kinks(many, activation, smooth, gamma):
    model, x = network(activation), torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    spec, space = KernelSpec(gamma=gamma, draws=8), select_parameters(model)
    assert probe_jumps(model, space, spec.drawing("autodiff", space, model), x).differentiable == smooth


def test_rounding_is_not_measured_for_gradients_of_a_large_model(many):
    model, x = network(nn.Tanh()), torch.randn(8, 3)
    gradients, differences = (
        decide(model, x, KernelSpec(gamma=0.01, estimator=name, draws=8), batch=8) for name in ("autodiff", "weight")
    )
    assert gradients.probes.noise is None
    assert differences.probes.noise < 0.1
