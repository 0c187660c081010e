"""The affine maps behind layer, group and batch normalisation.

Axes: n examples, c outputs of the model.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from nntk_dist.layers.rules.rule import LayerRule


def _affine(normalised: Tensor, delta: Tensor, axes: tuple[int, ...]) -> dict[str, Tensor]:
    """weight: Σ δ·ĥ and bias: Σ δ over the positions that share them; `axes` are counted without the axis c."""
    shifted = tuple(axis + 1 for axis in axes)
    product = delta * normalised[:, None]
    return {"weight": product.sum(shifted) if axes else product, "bias": delta.sum(shifted) if axes else delta}


def layer_norm_gradients(
    module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor
) -> dict[str, Tensor]:
    """An affine map of every number in the last axes, over which is normalised."""
    assert isinstance(module, nn.LayerNorm)
    normalised = functional.layer_norm(h, module.normalized_shape, eps=module.eps)
    return _affine(normalised, delta, tuple(range(1, h.ndim - len(module.normalized_shape))))


def group_norm_gradients(
    module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor
) -> dict[str, Tensor]:
    """An affine map of every channel, behind the normalisation over groups of channels."""
    assert isinstance(module, nn.GroupNorm)
    return _affine(functional.group_norm(h, module.num_groups, eps=module.eps), delta, tuple(range(2, h.ndim)))


def batch_norm_gradients(
    module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor
) -> dict[str, Tensor]:
    """With running statistics, which eval mode uses: an affine map of every channel."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    normalised = functional.batch_norm(h, module.running_mean, module.running_var, eps=module.eps)
    return _affine(normalised, delta, tuple(range(2, h.ndim)))


def _keeps_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None


LAYER_NORM = LayerRule(nn.LayerNorm, layer_norm_gradients)
GROUP_NORM = LayerRule(nn.GroupNorm, group_norm_gradients)
BATCH_NORM_1D = LayerRule(nn.BatchNorm1d, batch_norm_gradients, covers=_keeps_statistics)
BATCH_NORM_2D = LayerRule(nn.BatchNorm2d, batch_norm_gradients, covers=_keeps_statistics)
