"""Activation functions by name, with and without jumps.

None of them works in place. Activations with jumps have no straight-through gradient: their derivative is zero, as in
mathematics, so that a gradient estimator that cannot see a jump is caught rather than fooled.

Axes: all activations are elementwise.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, check_choice
from nntk_dist.models.brownian import BrownianActivation
from nntk_dist.registration.callables import call_checked, check_integer


class Erf(nn.Module):
    """erf(x), the sigmoid whose infinite-width kernels have closed forms."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Apply it elementwise."""
        return torch.erf(x)


class Sign(nn.Module):
    """-1, 0 or 1: the sign of x."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Apply it elementwise."""
        return torch.sign(x)


class Step(nn.Module):
    """1 if x > 0, otherwise 0."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Apply it elementwise."""
        # A comparison would cut the output off from the graph, and automatic differentiation would then fail, though
        # the derivative is simply zero.
        return torch.sign(x).clamp(min=0)


class Quantize(nn.Module):
    """The nearest of `levels` equally spaced values from -limit to limit; midpoints go to the even level.

    Args:
        levels: number of values, at least 2.
        limit: the largest value, positive; inputs beyond it are clipped.

    Raises:
        ArgumentError: fewer than two levels, or a limit that is not positive.
    """

    def __init__(self, levels: int = 8, limit: float = 1.0) -> None:
        super().__init__()
        check_integer("activation quantize: levels", levels, minimum=2)
        if not limit > 0:
            raise ArgumentError(f"activation quantize: limit is {limit}; give a positive number")
        self.levels = levels
        self.limit = limit

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Apply it elementwise."""
        intervals = self.levels - 1
        position = (x.clamp(-self.limit, self.limit) + self.limit) * (intervals / (2 * self.limit))
        return torch.round(position) * (2 * self.limit / intervals) - self.limit

    def extra_repr(self) -> str:
        """Settings, for printing the model."""
        return f"levels={self.levels}, limit={self.limit}"


# Functions without arguments, so that no configuration can ask for an activation that works in place.
ACTIVATIONS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "relu": lambda: nn.ReLU(),
        "tanh": lambda: nn.Tanh(),
        "gelu": lambda: nn.GELU(),
        "silu": lambda: nn.SiLU(),
        "sigmoid": lambda: nn.Sigmoid(),
        "erf": lambda: Erf(),
        "identity": lambda: nn.Identity(),
        "sign": lambda: Sign(),
        "step": lambda: Step(),
        "quantize": Quantize,
        "brownian": BrownianActivation,
    }
)


def make_activation(activation: str | Mapping[str, Any]) -> nn.Module:
    """Make an activation.

    Args:
        activation: its name, or a mapping of `name` and further arguments.

    Raises:
        ArgumentError: an unknown name, an argument that the activation does not take, or a bad value.

    Example:
        >>> make_activation({"name": "quantize", "levels": 4})
        Quantize(levels=4, limit=1.0)
    """
    arguments = {"name": activation} if isinstance(activation, str) else activation
    if not isinstance(arguments, Mapping) or not isinstance(arguments.get("name"), str):
        raise ArgumentError(f"activation is {activation!r}; give a name ({', '.join(ACTIVATIONS)}) or {{name: …, …}}")
    name = arguments["name"]
    check_choice("activation", name, ACTIVATIONS)
    rest = {key: value for key, value in arguments.items() if key != "name"}
    module: nn.Module = call_checked(ACTIVATIONS[name], rest, what=f"activation {name}")
    return module
