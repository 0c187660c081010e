"""Linear layers, on one vector per example or on several.

Axes: n examples, c outputs of the model, o/i units out/in of the layer, t positions.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nntk_dist.layers.rules.rule import LayerRule


def linear_gradients(
    module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor
) -> dict[str, Tensor]:
    """weight: Σ_t δ_t ⊗ h_t; bias: Σ_t δ_t."""
    delta, h = linear_sides(module, h, delta)
    return {"weight": torch.einsum("ncto,nti->ncoi", delta, h), "bias": delta.sum(2)}


def linear_sides(module: nn.Module, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """δ (n, c, t, o) and h (n, t, i), whose products summed over t are the weight's gradient."""
    return delta.reshape(*delta.shape[:2], -1, delta.shape[-1]), h.reshape(len(h), -1, h.shape[-1])


def num_positions(shape: tuple[int, ...]) -> int:
    """The number of vectors that an input of shape (n, ..., units) holds for each example."""
    return math.prod(shape[1:-1])


LINEAR = LayerRule(nn.Linear, linear_gradients, sides=linear_sides)
