"""A plain convolutional network for images.

Axes: n examples.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nntk_dist.errors import ArgumentError, check_choice
from nntk_dist.models.builders.activations import make_activation
from nntk_dist.models.builders.images import image_input
from nntk_dist.models.dropout import dropout_layers
from nntk_dist.registration.callables import check_integer, check_integers


def cnn(
    *,
    input_shape: tuple[int, ...],
    num_outputs: int,
    channels: Sequence[int] = (32, 64),
    kernel_size: int = 3,
    activation: str | Mapping[str, Any] = "relu",
    pool: str = "average",
    readout: str = "mean",
    bias: bool = True,
    dropout: float = 0.0,
) -> nn.Module:
    """`Conv2d → activation → 2x2 pooling` per entry of `channels`, then a readout, of shape (n, num_outputs).

    Args:
        input_shape: (channels, height, width) or (height, width).
        num_outputs: number of outputs.
        channels: output channels of each convolution, at least one.
        kernel_size: odd, so that padding keeps the image size.
        activation: name, or `{name, …}`, of the activation (see `activations`).
        pool: `average`, `max`, or `none` for no pooling.
        readout: `mean` (average over positions) or `flatten` (own weights for each position) before the last Linear.
        bias: whether convolutions and the last Linear have one.
        dropout: share of the channels that are zeroed at random behind each activation, in eval mode too; at least 0,
            which adds no module, and below 1 (see `nntk_dist.models.dropout`).

    Raises:
        ArgumentError: inputs are no images or too small for the pooling, or a value is bad.
    """
    check_integers("model cnn: channels", channels, minimum=1)
    check_integer("model cnn: kernel_size", kernel_size, minimum=1)
    check_choice("model cnn: pool", pool, ("average", "max", "none"))
    check_choice("model cnn: readout", readout, ("mean", "flatten"))
    if kernel_size % 2 == 0:
        raise ArgumentError(f"model cnn: kernel_size is {kernel_size}; give an odd number")
    if not channels:
        raise ArgumentError("model cnn: channels is empty; give the output channels of at least one convolution")
    to_image, (width, height, breadth) = image_input("cnn", input_shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict(image=to_image)
    for index, next_width in enumerate(channels):
        layers[f"convolution{index}"] = nn.Conv2d(width, next_width, kernel_size, padding=kernel_size // 2, bias=bias)
        layers[f"activation{index}"] = make_activation(activation)
        layers.update(dropout_layers(f"dropout{index}", dropout, channelwise=True))
        width = next_width
        if pool != "none":
            layers[f"pool{index}"] = nn.AvgPool2d(2) if pool == "average" else nn.MaxPool2d(2)
            height, breadth = height // 2, breadth // 2
    if min(height, breadth) == 0:
        raise ArgumentError(
            f"model cnn: {len(channels)} poolings leave nothing of images of shape {input_shape}; "
            "give fewer channels or pool: none"
        )
    if readout == "mean":
        layers["mean"] = nn.AdaptiveAvgPool2d(1)
        height = breadth = 1
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(width * height * breadth, num_outputs, bias=bias)
    return nn.Sequential(layers)
