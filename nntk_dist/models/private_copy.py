"""A private copy of a model: without wrappers, with real parameters, and with the gradients of f itself.

The real and the imaginary part of a complex parameter are two parameters; its kernel is the sum of the kernels of both.
No model is called here.

Axes: none.
"""

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from nntk_dist.errors import ModelError


class _Holder(nn.Module):
    """Calls the module that a wrapper held, under the name that the wrapper gave it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self._held = name
        self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self._held](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_modules", {}).get(self.__dict__.get("_held"))
        if held is None or name == self._held:
            return super().__getattr__(name)
        return getattr(held, name)


def private_copy(model: nn.Module) -> nn.Module:
    """Copy a model. Complex parameters become two real ones.

    Data-parallel and compiled modules are replaced by the modules that they hold, under the same names. Embeddings lose
    `sparse` and `scale_grad_by_freq`, which change gradients and not f. Tensors that a forward pass left behind are
    copied without their graph.

    Raises:
        ModelError: the model holds a TorchScript module.
    """
    memo: dict[int, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"the model holds a TorchScript module ('{path}'), whose parameters cannot be replaced by perturbed "
                "ones; give the Python module it was made from"
            )
        memo.update(_detached(module))
    for module in reversed(list(model.modules())):
        name = _held_by(module)
        if name is not None:
            memo[id(module)] = _Holder(name, copy.deepcopy(getattr(module, name), memo))
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = module.scale_grad_by_freq = False
    _split_complex_parameters(copied)
    return copied


def _detached(module: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Copies of the attributes that have a graph, such as the weight that a hook computed: torch does not copy them."""
    for values in list(vars(module).values()):
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            if is_functorch_wrapped_tensor(value):  # of a call under vmap that has ended
                yield id(value), torch.empty(0)
            elif not value.is_leaf:
                yield id(value), value.detach().clone()


def _held_by(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the module that it calls; None for any other module."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    compiling = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if compiling is not None and isinstance(module, compiling.OptimizedModule) else None


class _ComplexParts(nn.Module):
    """A parametrization of a complex tensor by two real ones, its real and its imaginary part."""

    def forward(self, real: Float[Tensor, "..."], imaginary: Float[Tensor, "..."]) -> Complex[Tensor, "..."]:
        """Return the complex tensor."""
        return torch.complex(real, imaginary)

    def right_inverse(self, values: Complex[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Return the parts of a complex tensor."""
        return values.real.clone(), values.imag.clone()


def _split_complex_parameters(model: nn.Module) -> None:
    """Replace each complex parameter of a model by its parts, in place; a shared one stays shared.

    `NAME` becomes `parametrizations.NAME.original0` and `original1`, as torch names them; patterns may use `NAME`.
    """
    first: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_complex():
                continue
            requires_grad, key = parameter.requires_grad, id(parameter)
            parametrize.register_parametrization(module, name, _ComplexParts())
            held: Any = module.parametrizations[name]  # type: ignore[index]
            held.original0, held.original1 = first.setdefault(key, (held.original0, held.original1))
            held.requires_grad_(requires_grad)
