"""What the convolutional models share: how they read the shape of an input as an image."""

from torch import nn

from nntk_dist.errors import NNTKError


def image_input(model: str, input_shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, int, int]]:
    """A layer that turns (n, *input_shape) into images, and their shape (channels, height, width).

    A shape (height, width) is one grey channel.

    Raises:
        NNTKError: an example is neither a grey nor a multi-channel image.
    """
    if len(input_shape) == 3:
        return nn.Identity(), (input_shape[0], input_shape[1], input_shape[2])
    if len(input_shape) == 2:
        return nn.Unflatten(1, (1, input_shape[0])), (1, input_shape[0], input_shape[1])
    raise NNTKError(
        f"model {model} needs images, (channels, height, width) or (height, width), but an example has shape "
        f"{input_shape}; use mlp or transformer for vectors"
    )
