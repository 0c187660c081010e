"""Rules of layers: a user's class can bring its own, and a wrong one is detected."""

import pytest
import torch
from torch import Tensor, nn

from nntk_dist import local_kernel, prepare_kernel
from nntk_dist.layers.hooks import hooked
from nntk_dist.layers.rules import RULES, LayerRule, rule_for
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.models.parameters import select_parameters


class Scale(nn.Module):
    """x · weight, elementwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def right(module, parameters, h, delta):
    return {"weight": delta * h[:, None]}


def wrong(module, parameters, h, delta):
    return {"weight": delta * h[:, None] + 1e-3}


@pytest.mark.parametrize(("rule", "whole"), [(right, ()), (wrong, ("1.weight",))])
def test_a_class_of_ones_own_brings_its_rule(rule, whole, monkeypatch):
    monkeypatch.setattr(Scale, "nntk_rule", LayerRule(Scale, rule), raising=False)
    model, x = nn.Sequential(nn.Linear(4, 3), Scale(3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(5, 4).double()
    space = select_parameters(model)
    plan = plan_sites(model.requires_grad_(False), space, x)
    assert plan.whole == whole
    expected = torch.zeros(5, 5, dtype=torch.float64)
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(dict(model.named_parameters()))
    for part in jacobians.values():
        rows = part.flatten(2)
        expected += torch.einsum("icp,jcp->ij", rows, rows)
    torch.testing.assert_close(local_kernel(model.requires_grad_(True), x), expected, rtol=1e-10, atol=1e-12)


def test_a_subclass_counts_only_while_it_keeps_forward():
    class Renamed(nn.Linear):
        pass

    class Changed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert rule_for(Renamed(2, 2)) is rule_for(nn.Linear(2, 2)) is RULES.get("linear")
    assert rule_for(Changed(2, 2)) is None
    assert rule_for(nn.Conv2d(2, 2, 3, padding_mode="circular")) is None
    assert rule_for(nn.Embedding(3, 2, max_norm=1.0)) is None
    assert rule_for(nn.BatchNorm1d(3, track_running_stats=False)) is None
    assert rule_for(nn.Conv2d(2, 2, 3, groups=2)).sides is None


def test_hooks_are_removed_whatever_happens():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with hooked(model, after={"0": lambda h, out: 0 * out}):
        assert not model(torch.ones(1, 2)).any()
    with pytest.raises(RuntimeError, match="stop"), hooked(model, before={"1": lambda h: None}):
        raise RuntimeError("stop")
    with pytest.raises(AttributeError), hooked(model, after={"0": lambda h, out: 0 * out, "none": lambda h, out: out}):
        pass
    assert model(torch.ones(1, 2)).any()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"kind": "local"}, {"gamma": 1e-9, "contraction": "sketch", "sketch": 64}])
def test_the_layer_of_gpt2_has_the_kernel_of_a_linear_layer(options):
    """The same sketch, too, at a γ so small that the draws, which differ in their order, do not matter."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    linear, transposed = nn.Linear(4, 3).double(), Conv1D(3, 4).double()
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.T)
        transposed.bias.copy_(linear.bias)
    x, readout = torch.randn(5, 2, 4, dtype=torch.float64), nn.Linear(6, 2).double()
    kernels = [
        prepare_kernel(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), readout), x, **options)(x).kernel
        for layer in (linear, transposed)
    ]
    torch.testing.assert_close(*kernels, rtol=1e-7, atol=1e-9)
    assert rule_for(transposed) is RULES.get("transposed linear")
