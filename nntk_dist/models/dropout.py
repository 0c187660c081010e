"""Dropout whose masks are numbers of the present ω, active in eval mode, and its place in models that have torch's.

One mask for all examples of a pass: a draw of a kernel is one thinned network. In training mode it is torch's dropout,
so a network is trained as ever; `nn.Dropout` itself is off in eval mode, hence off in every kernel. Dropout that torch
applies inside a larger module is refused, not imitated.

Axes: n examples, then the axes of a unit.
"""

import copy
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import NNTKError
from nntk_dist.models.noise import StochasticModule

_CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_OTHER_KINDS = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_WITH_DROPOUT_INSIDE = (nn.MultiheadAttention, nn.RNNBase)


class Dropout(StochasticModule):
    """m ∘ u / (1 − p), the entries of m independent, 0 with probability p and otherwise 1; the same for all examples.

    A unit is a number of an example's u, or with `channelwise` a channel (the first axis behind the examples), as in
    `nn.Dropout2d`. Each call in a pass has a mask of its own. E over masks is u.

    Raises: NNTKError where p is not a number from 0 to below 1.
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
        raise NNTKError(f"dropout is {p!r}; allowed: a number from 0 to below 1")


def dropout_layers(name: str, p: float, *, channelwise: bool = False) -> dict[str, nn.Module]:
    """The named layer of a sequence, or none where p is 0: then the sequence is what it was without."""
    return {} if p == 0 else {name: Dropout(p, channelwise=channelwise)}


def replace_dropout(model: nn.Module) -> nn.Module:
    """A copy of the model with every `nn.Dropout`, `Dropout1d`, `2d` and `3d` replaced by `Dropout`; names stay.

    Parameters, their names and the state dict are as before. Functional dropout in a forward pass is not seen: it is
    off in eval mode where it heeds `self.training`, and refused as unseeded noise where it does not.

    Raises: NNTKError, naming the module, for dropout of another kind or inside a larger module of torch (an attention,
    a recurrent layer; hence `nn.TransformerEncoderLayer` too), where p is 1, and where there is nothing to replace.
    """
    copied = copy.deepcopy(model)
    replaced: dict[int, Dropout] = {}
    for path, module in copied.named_modules():
        inside = isinstance(module, _WITH_DROPOUT_INSIDE) and module.dropout > 0
        if inside or (isinstance(module, _OTHER_KINDS) and module.p > 0):
            raise NNTKError(
                f"module '{path}' is a {type(module).__name__} with dropout, which has no counterpart with seeded "
                "noise; set its dropout to 0, or write it with nntk_dist.Dropout or a StochasticModule"
            )
        if isinstance(module, nn.Dropout | _CHANNELWISE[0] | _CHANNELWISE[1] | _CHANNELWISE[2]):
            seeded = Dropout(module.p, channelwise=isinstance(module, _CHANNELWISE))
            replaced[id(module)] = seeded.train(module.training)
    if not replaced:
        raise NNTKError("the model holds no nn.Dropout to replace; write its noise as a StochasticModule")
    for module in list(copied.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in replaced:
                module._modules[name] = replaced[id(child)]
    return replaced.get(id(copied), copied)
