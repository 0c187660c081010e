"""Dropout that is active in eval mode, with masks that are a function of ω, and its replacement for torch's.

All examples of a pass share one mask: a draw of a kernel is one thinned network. In training mode it is torch's
dropout. `nn.Dropout` itself is off in eval mode, hence off in every kernel. Dropout inside a larger module of torch is
refused.

Axes: n examples, then the axes of a unit.
"""

import copy
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, ModelError
from nntk_dist.models.noise import StochasticModule

_CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_OTHER_KINDS = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_WITH_DROPOUT_INSIDE = (nn.MultiheadAttention, nn.RNNBase)


class Dropout(StochasticModule):
    """m ∘ u / (1 − p), the entries of m independent, 0 with probability p and otherwise 1; the same for all examples.

    A unit is a number of an example's u, or with `channelwise` a channel (the first axis behind the examples), as in
    `nn.Dropout2d`. Each call in a pass has its own mask. E over masks is u.

    Raises:
        ArgumentError: p is not a number from 0 to below 1.
    """

    def __init__(self, p: float = 0.5, *, channelwise: bool = False) -> None:
        super().__init__()
        _check_share(p)
        self.p = float(p)
        self.channelwise = channelwise

    def forward(self, u: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Leave out units of every example."""
        if self.p == 0:
            return u
        if self.training:
            return (torch.feature_dropout if self.channelwise else torch.dropout)(u, self.p, train=True)
        shape = (*u.shape[1:2], *[1] * (u.ndim - 2)) if self.channelwise else tuple(u.shape[1:])
        kept = self.uniforms(shape, like=u) > self.p
        return u * (kept.to(u.dtype) / (1.0 - self.p))

    def extra_repr(self) -> str:
        """The settings, for printing the model."""
        return f"p={self.p}{', channelwise' if self.channelwise else ''}"


def _check_share(p: object) -> None:
    if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= float(p) < 1:
        raise ArgumentError(f"dropout is {p!r}; allowed: a number from 0 to below 1")


def dropout_layers(name: str, p: float, *, channelwise: bool = False) -> dict[str, nn.Module]:
    """Return the named layer for a sequence, or nothing if p is 0, so that the sequence is as it was without."""
    return {} if p == 0 else {name: Dropout(p, channelwise=channelwise)}


def replace_dropout(model: nn.Module) -> nn.Module:
    """Copy a model with every `nn.Dropout`, `Dropout1d`, `2d` and `3d` replaced by `Dropout`; names stay.

    Parameters, their names and the state dict are as before. Functional dropout in a forward pass is not seen: in eval
    mode it is off if it heeds `self.training`, and otherwise refused later as unseeded noise.

    Raises:
        ModelError: dropout of another kind, or inside a larger module of torch (an attention, a recurrent layer, hence
            also `nn.TransformerEncoderLayer`); the message names the module. Or there is nothing to replace.
        ArgumentError: some p is 1.

    Example:
        >>> model = replace_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
        >>> model[1]
        Dropout(p=0.1)
    """
    copied = copy.deepcopy(model)
    replaced: dict[int, Dropout] = {}
    for path, module in copied.named_modules():
        inside = isinstance(module, _WITH_DROPOUT_INSIDE) and module.dropout > 0
        if inside or (isinstance(module, _OTHER_KINDS) and module.p > 0):
            raise ModelError(
                f"module '{path}' is a {type(module).__name__} with dropout, which has no counterpart with seeded "
                "noise; set its dropout to 0, or write it with nntk_dist.Dropout or a StochasticModule"
            )
        if isinstance(module, nn.Dropout | _CHANNELWISE[0] | _CHANNELWISE[1] | _CHANNELWISE[2]):
            seeded = Dropout(module.p, channelwise=isinstance(module, _CHANNELWISE))
            replaced[id(module)] = seeded.train(module.training)
    if not replaced:
        raise ModelError("the model holds no nn.Dropout to replace; write its noise as a StochasticModule")
    for module in list(copied.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in replaced:
                module._modules[name] = replaced[id(child)]
    return replaced.get(id(copied), copied)
