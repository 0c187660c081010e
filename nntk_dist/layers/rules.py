"""What a layer's parameters contribute to the gradient of one example, from the layer's input h and its output
gradient δ.

One rule a kind of layer, each the textbook formula, for one call of the layer on a batch whose leading axis is the
examples. Rules say nothing of other layers, of draws or of kernels. A module without a rule is differentiated as a
whole (`nntk_dist.layers.capture`); so is any parameter for which a rule turns out not to reproduce automatic
differentiation.

Axes: n examples, c outputs of the model, o/i units out/in of the layer, t positions.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

Gradients = dict[str, Tensor]
# (module, its parameters at this draw, h of shape (n, ...), δ of shape (n, c, ...)) -> parameter name in the module:
# (n, c, *shape)
Rule = Callable[[nn.Module, Mapping[str, Tensor], Tensor, Tensor], Gradients]
# (module, h, δ) -> δ as (n, c, t, o) and the layer's input as (n, t, i)
Factors = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def linear(module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor) -> Gradients:
    """weight: Σ_t δ_t ⊗ h_t; bias: Σ_t δ_t."""
    delta, h = linear_factors(module, h, delta)
    return {"weight": torch.einsum("ncto,nti->ncoi", delta, h), "bias": delta.sum(2)}


def linear_factors(module: nn.Module, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """δ (n, c, t, o) and h (n, t, i), whose products summed over t are the weight's gradient."""
    return delta.reshape(*delta.shape[:2], -1, delta.shape[-1]), h.reshape(len(h), -1, h.shape[-1])


def convolution(module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor) -> Gradients:
    """As a linear layer over the patches that the kernel sees, group by group."""
    assert isinstance(module, nn.Conv2d)
    groups = module.groups
    patches = _patches(module, h)
    patches = patches.reshape(len(h), groups, -1, patches.shape[-1])
    delta = delta.flatten(3)
    grouped = delta.reshape(*delta.shape[:2], groups, -1, delta.shape[-1])
    weight = torch.einsum("ncgot,ngit->ncgoi", grouped, patches)
    return {"weight": weight.reshape(*delta.shape[:2], *module.weight.shape), "bias": delta.sum(3)}


def convolution_factors(module: nn.Module, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """δ (n, c, t, o) and the patches (n, t, i) of a convolution without groups, t the output's pixels."""
    assert isinstance(module, nn.Conv2d)
    return delta.flatten(3).transpose(2, 3), _patches(module, h).transpose(1, 2)


def _patches(module: nn.Conv2d, h: Tensor) -> Tensor:
    """What the kernel sees at every pixel of the output, (n, i, t)."""
    assert not isinstance(module.padding, str)
    return functional.unfold(h, module.kernel_size, module.dilation, module.padding, module.stride)


def _affine(normalised: Tensor, delta: Tensor, axes: tuple[int, ...]) -> Gradients:
    """weight: Σ δ·ĥ and bias: Σ δ over the positions that share them; `axes` counts behind the example axis."""
    shifted = tuple(axis + 1 for axis in axes)
    product = delta * normalised[:, None]
    return {"weight": product.sum(shifted) if axes else product, "bias": delta.sum(shifted) if axes else delta}


def layer_norm(module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor) -> Gradients:
    """The affine map behind the normalisation over the last axes."""
    assert isinstance(module, nn.LayerNorm)
    normalised = functional.layer_norm(h, module.normalized_shape, eps=module.eps)
    return _affine(normalised, delta, tuple(range(1, h.ndim - len(module.normalized_shape))))


def group_norm(module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor) -> Gradients:
    """The affine map of every channel behind the normalisation over groups of channels."""
    assert isinstance(module, nn.GroupNorm)
    return _affine(functional.group_norm(h, module.num_groups, eps=module.eps), delta, tuple(range(2, h.ndim)))


def batch_norm(module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor) -> Gradients:
    """With running statistics, which eval mode uses: an affine map of every channel."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    normalised = functional.batch_norm(h, module.running_mean, module.running_var, eps=module.eps)
    return _affine(normalised, delta, tuple(range(2, h.ndim)))


def embedding(module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor) -> Gradients:
    """Row v of the table: Σ δ_t over the positions t that hold token v."""
    assert isinstance(module, nn.Embedding)
    tokens = h.reshape(len(h), 1, -1)
    delta = delta.reshape(*delta.shape[:2], -1, delta.shape[-1])
    table = delta.new_zeros(*delta.shape[:2], module.num_embeddings, module.embedding_dim)
    if not delta.is_cuda:
        return {"weight": table.scatter_add_(2, tokens[..., None].expand(delta.shape), delta)}
    # scatter_add_ adds in any order on a GPU, index_put_ in the same one each time; elsewhere it is the other way round
    examples, outputs = (torch.arange(count, device=delta.device) for count in delta.shape[:2])
    return {"weight": table.index_put_((examples[:, None, None], outputs[:, None], tokens), delta, accumulate=True)}


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv2d: convolution,
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.Embedding: embedding,
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module, None where there is none or where the module's settings lie outside it.

    A subclass counts as its base only while it keeps the base's `forward`.
    """
    for kind, rule in _RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
                return None
            if isinstance(module, nn.Embedding) and (
                module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq
            ):
                return None
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                return None
            return rule
    return None


def factors_for(module: nn.Module) -> Factors | None:
    """How the gradient of a module's weight factorises over its output and input side; None where it does not.

    Its bias, where it has one, is then the sum of δ over positions.
    """
    if rule_for(module) is linear:
        return linear_factors
    if isinstance(module, nn.Conv2d) and rule_for(module) is convolution and module.groups == 1:
        return convolution_factors
    return None


def positions(shape: tuple[int, ...]) -> int:
    """How many vectors of units a (n, ..., units) input holds for each example."""
    return math.prod(shape[1:-1])
