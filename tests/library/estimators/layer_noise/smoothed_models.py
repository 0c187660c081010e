"""Networks of which the tests of the estimator `activation` with control variates take gradients.

Axes: n examples.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nntk_dist.estimators.layer_noise.activation_gradients import ActivationGradients
from nntk_dist.layers.flips import find_flips
from nntk_dist.models.builders import build_model
from nntk_dist.models.builders.activations import Sign
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import Decision
from nntk_dist.spec import KernelSpec
from tests.harness.tools import prepared_features

OPTIONS: dict[str, Any] = {"gamma": 0.4, "estimator": "activation", "variance_reduction": "auto", "draws": 16}


def inputs(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def built(builder: str, args: dict[str, Any], shape: tuple[int, ...], outputs: int = 3) -> nn.Module:
    model = build_model(builder, args, input_shape=shape, num_outputs=outputs, seed=0)
    return prepare_model(model, dtype=torch.float64, device="cpu")


def perceptron(activation: str | dict[str, Any] = "sign", widths: tuple[int, ...] = (7, 6)) -> tuple[nn.Module, Tensor]:
    return built("mlp", {"widths": widths, "activation": activation}, (4,)), inputs(5, 4)


def features_of(
    model: nn.Module, x: Tensor, *, flips: bool | None = None, **options: Any
) -> tuple[ActivationGradients, KernelSpec, Decision]:
    """Features as planned, or with flips wherever they are possible, or without any."""
    spec = KernelSpec(**OPTIONS | options)
    features, decision = prepared_features(model, x, spec)
    assert isinstance(features, ActivationGradients)
    if flips is None:
        return features, spec, decision
    found = find_flips(model, features.noise, features.innovations, x, len(features.columns)) if flips else ()
    return replace(features, flips=found, num_pilots=8), spec, decision


class Round(nn.Module):
    """Stairs without end."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x)


class ThirdGelu(nn.Module):
    """A curve with a jump."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x) + torch.sign(x - 0.3) / 3.0


def with_activations(make: type[nn.Module], widths: tuple[int, ...] = (7, 6)) -> tuple[nn.Module, Tensor]:
    model, x = perceptron(widths=widths)
    for place in range(len(widths)):
        setattr(model, f"activation{place}", make())
    return model, x


class NormalisedConvnet(nn.Module):
    """A sign convnet whose batch normalisations move too, if they are selected."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second, self.head = nn.Conv2d(1, 3, 3, stride=3), nn.Conv2d(3, 4, 2), nn.Linear(4, 2)
        self.norm0, self.norm1, self.sign = nn.BatchNorm2d(3), nn.BatchNorm2d(4), Sign()
        for norm in (self.norm0, self.norm1):
            for values in (norm.bias.data, norm.running_mean):
                values.copy_(0.3 * torch.randn(len(values), generator=generator))
            norm.running_var.copy_(torch.rand(len(norm.bias), generator=generator) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.sign(self.norm0(self.first(x)))
        return self.head(self.sign(self.norm1(self.second(h))).mean((2, 3)))
