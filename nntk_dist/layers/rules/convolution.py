"""Two-dimensional convolutions with zero padding: linear layers over the patches that the kernel sees.

Axes: n examples, c outputs of the model, g groups, o/i units out/in of a group, t pixels of the output.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from nntk_dist.layers.rules.rule import LayerRule


def convolution_gradients(
    module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor
) -> dict[str, Tensor]:
    """Treat it as a linear layer over patches, group by group."""
    assert isinstance(module, nn.Conv2d)
    groups = module.groups
    unfolded = patches(module, h)
    unfolded = unfolded.reshape(len(h), groups, -1, unfolded.shape[-1])
    delta = delta.flatten(3)
    grouped = delta.reshape(*delta.shape[:2], groups, -1, delta.shape[-1])
    weight = torch.einsum("ncgot,ngit->ncgoi", grouped, unfolded)
    return {"weight": weight.reshape(*delta.shape[:2], *module.weight.shape), "bias": delta.sum(3)}


def convolution_sides(module: nn.Module, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """δ (n, c, t, o) and the patches (n, t, i) of a convolution without groups."""
    assert isinstance(module, nn.Conv2d)
    return delta.flatten(3).transpose(2, 3), patches(module, h).transpose(1, 2)


def patches(module: nn.Conv2d, h: Tensor) -> Tensor:
    """Return what the kernel sees at every pixel of the output, (n, i, t)."""
    assert not isinstance(module.padding, str)
    return functional.unfold(h, module.kernel_size, module.dilation, module.padding, module.stride)


def _pads_zeros(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _is_ungrouped(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and _pads_zeros(module) and module.groups == 1


CONVOLUTION = LayerRule(
    nn.Conv2d,
    convolution_gradients,
    covers=_is_ungrouped,
    sides=convolution_sides,
)
GROUPED_CONVOLUTION = LayerRule(nn.Conv2d, convolution_gradients, covers=_pads_zeros)
