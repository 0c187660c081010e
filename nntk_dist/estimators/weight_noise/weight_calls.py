"""The calls of a pass that multiply inputs and weights: found as functions of tensors, whatever modules surround them.

A call computes a(h; w, b), affine in (w, b): `linear`, a convolution, or a matrix product with the weight behind. Its
number is its place among such calls in a pass. Nothing is known here of parameters and what is made of them.

Axes: n examples, c outputs of the model, t positions, i inputs and u units of a call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nntk_dist.models.evaluation import outputs

_LINEAR = (functional.linear,)
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_NAMES = ("input", "weight", "bias")

WEIGHT, BIAS = "weight", "bias"


@dataclass(frozen=True)
class WeightCall:
    """One call.

    Attributes:
        function: the function of tensors that is called.
        h: its input.
        weight: its weight.
        bias: its bias; None without one.
        rest: further arguments, stride and padding say.
        named: further named arguments.
    """

    function: Callable[..., Any]
    h: Tensor
    weight: Tensor
    bias: Tensor | None
    rest: tuple[Any, ...]
    named: Mapping[str, Any]

    def result(self, weight: Tensor, bias: Tensor | None, h: Tensor | None = None) -> Tensor:
        """Return what the call computes of other weights, or another input."""
        h = self.h if h is None else h
        if self.function in _PRODUCTS:
            return torch.matmul(h, weight)
        values: Tensor = self.function(h, weight, bias, *self.rest, **self.named)
        return values

    def argument(self, name: str) -> Tensor | None:
        """Return the weight or the bias."""
        return self.weight if name == WEIGHT else self.bias

    def bias_gradient(self, delta: Float[Tensor, "n c ..."]) -> Float[Tensor, "n c u"]:
        """Return δ summed over positions."""
        if self.function in _CONVOLUTIONS:
            return delta.flatten(3).sum(3) if delta.ndim > 3 else delta
        return delta.flatten(2, -2).sum(2) if delta.ndim > 3 else delta

    def weight_gradient(self, h: Float[Tensor, "n ..."], delta: Float[Tensor, "n c ..."]) -> Float[Tensor, "n c ..."]:
        """Return Σ_t δ ⊗ h for an input h and gradients δ in what the call computes: linear in each of them.

        Its last axes are those of the call's weight.
        """
        if self.function not in _CONVOLUTIONS:
            inputs = h.reshape(len(h), -1, h.shape[-1])
            if self.weight.ndim == 1:
                return delta.reshape(*delta.shape[:2], -1) @ inputs
            units = delta.flatten(2, -2) if delta.ndim > 3 else delta[:, :, None]
            return torch.einsum("nctu,nti->ncui" if self.function in _LINEAR else "nctu,nti->nciu", units, inputs)
        weight = self.weight.detach()

        def one(row: Tensor, direction: Tensor) -> Tensor:
            pulled: Any = torch.func.vjp(lambda w: self.result(w, None, row[None])[0], weight)
            gradient: Tensor = pulled[1](direction)[0]
            return gradient

        every = torch.func.vmap(torch.func.vmap(one, in_dims=(None, 0)))
        gradients: Tensor = every(h, delta)
        return gradients


Handler = Callable[[int, WeightCall], Tensor | None]


class _Calls(TorchFunctionMode):
    """Shows every call to a handler, whose result replaces the call's unless it is None."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler, self.count = handler, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = _call(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        self.count += 1
        replaced = self.handler(self.count - 1, call)
        return func(*args, **kwargs) if replaced is None else replaced


def pass_with(
    model: nn.Module, x: Tensor, handler: Handler, parameters: Mapping[str, Tensor] | None = None
) -> tuple[Float[Tensor, "n c"], int]:
    """Return f(x; θ) and the number of calls, each of which is shown to a handler.

    Args:
        model: the model.
        x: inputs.
        handler: called with the number of a call and the call; the result replaces the call's, unless it is None.
        parameters: in place of the model's own.
    """
    with _Calls(handler) as calls:
        return outputs(model, x, parameters), calls.count


def _call(function: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> WeightCall | None:
    """Return what is called; None if it is no product of inputs and weights."""
    if function in _PRODUCTS:
        if len(args) != 2 or named or not all(isinstance(each, Tensor) for each in args) or args[1].ndim not in (1, 2):
            return None
        return WeightCall(function, args[0], args[1], None, (), {})
    if function not in _LINEAR and function not in _CONVOLUTIONS:
        return None
    given = dict(zip(_NAMES, args, strict=False)) | {name: named[name] for name in _NAMES if name in named}
    h, weight = given.get("input"), given.get(WEIGHT)
    if not isinstance(h, Tensor) or not isinstance(weight, Tensor):
        return None
    left = {name: value for name, value in named.items() if name not in _NAMES}
    return WeightCall(function, h, weight, given.get(BIAS), args[3:], left)
