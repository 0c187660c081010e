"""Models with jumps for runs with `model.builder: python:…`, of which the estimator `weight` takes control variates.

Axes: n examples, i inputs, c outputs.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nntk_dist import BlackBox

_HIDDEN, _FEATURES = 12, 8


class Signs(nn.Module):
    """A weight of two values."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.1 * torch.sign(weight)


def signed_weights(*, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Two Linear layers with quantised weights."""
    layers = nn.Linear(math.prod(input_shape), _HIDDEN), nn.Linear(_HIDDEN, num_outputs)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Signs())
    return nn.Sequential(nn.Flatten(), layers[0], nn.Tanh(), layers[1])


def decision_rule(*, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Votes of halfspaces in a few projections of the inputs, for every class."""
    generator = np.random.default_rng(0)
    projection = generator.standard_normal((math.prod(input_shape), _FEATURES)) / math.sqrt(math.prod(input_shape))
    weights = generator.standard_normal((_FEATURES, num_outputs)) / math.sqrt(_FEATURES)

    def votes(params: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.sign((x.reshape(len(x), -1) @ projection) @ params.reshape(weights.shape))

    return BlackBox(votes, weights.ravel())
