"""The residual network of He et al. for images of CIFAR's size (arXiv:1512.03385, section 4.2).

Three stages of k basic blocks, of `width`, 2·`width` and 4·`width` channels, make 6k + 2 layers with weights. The
shortcuts hold none: at the beginning of a stage they take every second pixel and pad channels with zeros ("option A").
In eval mode batch normalisation uses its running statistics, so examples do not influence each other.

Axes: n examples.
"""

from collections import OrderedDict
from collections.abc import Mapping
from math import gcd
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nntk_dist.errors import ArgumentError, check_choice
from nntk_dist.models.builders.activations import make_activation
from nntk_dist.models.builders.images import image_input
from nntk_dist.registration.callables import check_integer

NORMS = ("batch", "group", "none")


def resnet(
    *,
    input_shape: tuple[int, ...],
    num_outputs: int,
    depth: int = 20,
    width: int = 16,
    norm: str = "batch",
    activation: str | Mapping[str, Any] = "relu",
) -> nn.Module:
    """A residual network of `depth` = 6k + 2 layers: (n, *input_shape) → (n, num_outputs).

    Args:
        input_shape: (channels, height, width) or (height, width).
        num_outputs: number of outputs.
        depth: 8, 14, 20, …, 6k + 2.
        width: channels of the first stage.
        norm: `batch`, `group` (up to 8 groups) or `none` (convolutions then have a bias).
        activation: name, or `{name, …}`, of the activation (see `activations`).

    Raises:
        ArgumentError: inputs are no images, the depth is not 6k + 2, or a value is bad.
    """
    check_integer("model resnet: depth", depth, minimum=8)
    check_integer("model resnet: width", width, minimum=1)
    check_choice("model resnet: norm", norm, NORMS)
    if depth % 6 != 2:
        below = depth - (depth - 2) % 6
        raise ArgumentError(f"model resnet: depth is {depth}; give 6k + 2, such as {below} or {below + 6}")
    to_image, (channels, _, _) = image_input("resnet", input_shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict(image=to_image)
    layers["stem"] = _convolution(channels, width, 1, norm)
    layers["stem_norm"] = _normalization(norm, width)
    layers["stem_activation"] = make_activation(activation)
    channels = width
    for stage in range(3):
        for index in range((depth - 2) // 6):
            stride = 2 if stage > 0 and index == 0 else 1
            next_channels = width * 2**stage
            block = _BasicBlock(channels, next_channels, stride, norm, activation)
            layers[f"stage{stage}_block{index}"] = block
            channels = next_channels
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(channels, num_outputs)
    return nn.Sequential(layers)


class _BasicBlock(nn.Module):
    """activation(x + two normalised 3x3 convolutions of x)."""

    def __init__(
        self, channels: int, next_channels: int, stride: int, norm: str, activation: str | Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.stride = stride
        self.added_channels = next_channels - channels
        self.convolution0 = _convolution(channels, next_channels, stride, norm)
        self.norm0 = _normalization(norm, next_channels)
        self.activation0 = make_activation(activation)
        self.convolution1 = _convolution(next_channels, next_channels, 1, norm)
        self.norm1 = _normalization(norm, next_channels)
        self.activation1 = make_activation(activation)

    def forward(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels2 height2 width2"]:
        """Apply the block to a batch of feature maps."""
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))
        hidden = self.activation0(self.norm0(self.convolution0(x)))
        output: Tensor = self.activation1(shortcut + self.norm1(self.convolution1(hidden)))
        return output


def _convolution(channels: int, next_channels: int, stride: int, norm: str) -> nn.Module:
    return nn.Conv2d(channels, next_channels, 3, stride=stride, padding=1, bias=norm == "none")


def _normalization(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(gcd(8, channels), channels)
    return nn.Identity()
