"""Small models whose weights are quantised, in all the ways that people write it.

Every maker returns a module in float64 whose parameters come from its own generator.

Axes: n examples, u units, i inputs.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

STEP = 0.5


def two_bits(values: Tensor) -> Tensor:
    """−3/4, −1/4, 1/4 or 3/4."""
    return STEP * (torch.clamp(torch.floor(values / STEP), -2, 1) + 0.5)


class StraightThrough(torch.autograd.Function):
    """Two bits with the gradient of the identity; no rule for vmap."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return two_bits(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Quantised(nn.Module):
    """A layer that quantises its own weight."""

    def __init__(self, inputs: int, units: int, quantise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(units, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(0.3 * torch.randn(units))
        self.quantise = quantise

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.quantise(self.weight), self.bias)


class Transposed(nn.Module):
    """The same by a matrix product."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(units, inputs) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ two_bits(self.weight).T


class Convolution(nn.Module):
    """A convolution with quantised kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.5 * torch.randn(3, 1, 2, 2)), nn.Parameter(0.3 * torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, two_bits(self.weight), self.bias, padding=1)


class Rounding(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return two_bits(values)


def _parametrised(inputs: int, units: int) -> nn.Module:
    layer = nn.Linear(inputs, units)
    parametrize.register_parametrization(layer, "weight", Rounding())
    return layer


def through(values: Tensor) -> Tensor:
    """Two bits in the forward pass, the identity in the backward one."""
    return values + (two_bits(values) - values).detach()


def by_shape(values: Tensor) -> Tensor:
    """Elementwise for one shape."""
    return two_bits(values) * values.shape[1] ** 0.5


def scaled_signs(values: Tensor) -> Tensor:
    """Not elementwise: the size of a sign is the mean of all numbers."""
    return values.abs().mean() * torch.sign(values)


class Twice(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Quantised(4, 4, two_bits), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))))


class Scaled(nn.Module):
    """The size of a quantised weight is a parameter, on which the layer's input depends too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.size * x), self.size * two_bits(self.weight))


class Leaking(nn.Module):
    """A weight that is quantised in a layer, and added to the output as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Quantised(4, 2, two_bits)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.tanh(self.layer.weight.sum(1))


class Tokens(nn.Module):
    """Layers that get three vectors of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Quantised(4, 5, two_bits), Quantised(5, 2, two_bits)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).mean(1)


def _two_layers(quantise: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(Quantised(4, 5, quantise), nn.Tanh(), Quantised(5, 2, quantise))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "own forward": lambda: _two_layers(two_bits),
    "signs": lambda: _two_layers(lambda values: STEP * torch.sign(values)),
    "straight through": lambda: _two_layers(through),
    "function of autograd": lambda: _two_layers(StraightThrough.apply),
    "parametrisation": lambda: nn.Sequential(_parametrised(4, 5), nn.Tanh(), _parametrised(5, 2)),
    "transposed": lambda: nn.Sequential(Transposed(4, 5), nn.Tanh(), Transposed(5, 2)),
    "convolution": lambda: nn.Sequential(Convolution(), nn.Tanh(), nn.Flatten(), Quantised(27, 2, two_bits)),
    "tokens": Tokens,
    "leaking": Leaking,
    "shape": lambda: nn.Sequential(Quantised(4, 16, by_shape), nn.Tanh(), nn.Linear(16, 2)),
    "ramp": lambda: _two_layers(lambda values: torch.clamp(values, -0.2, 0.3) + 0.2 * torch.sign(values)),
}


def quantised(name: str) -> tuple[nn.Module, Tensor]:
    """A model and four examples."""
    torch.manual_seed(0)
    makers = MAKERS | {"twice": Twice, "scaled": Scaled, "not elementwise": lambda: _two_layers(scaled_signs)}
    shape = {"convolution": (1, 2, 2), "tokens": (3, 4)}.get(name, (4,))
    inputs = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return makers[name]().double(), inputs
