"""How convolutional models read the shape of an input as an image.

Axes: n examples.
"""

from torch import nn

from nntk_dist.errors import ArgumentError


def image_input(model: str, input_shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a layer that turns (n, *input_shape) into images, and their shape (channels, height, width).

    Args:
        model: names the model in the message.
        input_shape: (channels, height, width), or (height, width) for one grey channel.

    Raises:
        ArgumentError: an example has another number of axes.
    """
    if len(input_shape) == 3:
        return nn.Identity(), (input_shape[0], input_shape[1], input_shape[2])
    if len(input_shape) == 2:
        return nn.Unflatten(1, (1, input_shape[0])), (1, input_shape[0], input_shape[1])
    raise ArgumentError(
        f"model {model} needs images, (channels, height, width) or (height, width), but an example has shape "
        f"{input_shape}; use mlp or transformer for vectors"
    )
