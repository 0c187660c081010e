"""The fully connected network. Inputs of any shape are flattened first.

Axes: n examples.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

from nntk_dist.models.builders.activations import make_activation
from nntk_dist.models.dropout import dropout_layers
from nntk_dist.registration.callables import check_integers


def mlp(
    *,
    input_shape: tuple[int, ...],
    num_outputs: int,
    widths: Sequence[int] = (256, 256),
    activation: str | Mapping[str, Any] = "relu",
    bias: bool = True,
    dropout: float = 0.0,
) -> nn.Module:
    """`Linear → activation` for each hidden width, then a last Linear: (n, *input_shape) → (n, num_outputs).

    Args:
        input_shape: shape of one example.
        num_outputs: number of outputs.
        widths: units of each hidden layer; empty for a linear model.
        activation: name, or `{name, …}`, of the activation (see `activations`).
        bias: whether the Linears have one.
        dropout: share of the units that are zeroed at random behind each activation, in eval mode too; at least 0,
            which adds no module, and below 1 (see `nntk_dist.models.dropout`).

    Raises:
        ArgumentError: a width below 1, an unknown activation, or a dropout out of range.
    """
    check_integers("model mlp: widths", widths, minimum=1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = prod(input_shape)
    for index, next_width in enumerate(widths):
        layers[f"hidden{index}"] = nn.Linear(width, next_width, bias=bias)
        layers[f"activation{index}"] = make_activation(activation)
        layers.update(dropout_layers(f"dropout{index}", dropout))
        width = next_width
    layers["output"] = nn.Linear(width, num_outputs, bias=bias)
    return nn.Sequential(layers)
