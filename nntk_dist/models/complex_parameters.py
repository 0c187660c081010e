"""Complex parameters as pairs of real ones: the real and the imaginary part of each number are two parameters.

The kernel of a complex parameter is thus the sum of the kernels of both parts. No model is called here.
"""

from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nntk_dist.errors import ModelError


class ComplexParts(nn.Module):
    """A parametrization of a complex tensor by two real ones, its real and its imaginary part."""

    def forward(self, real: Float[Tensor, "..."], imaginary: Float[Tensor, "..."]) -> Complex[Tensor, "..."]:
        """Return the complex tensor."""
        return torch.complex(real, imaginary)

    def right_inverse(self, values: Complex[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Return the parts of a complex tensor."""
        return values.real.clone(), values.imag.clone()


def split_complex_parameters(model: nn.Module) -> None:
    """Replace each complex parameter of a model by its parts, in place; a shared one stays shared.

    `NAME` becomes `parametrizations.NAME.original0` and `original1`, as torch names them; patterns may use `NAME`.

    Raises:
        ModelError: the model is a TorchScript module, whose parameters cannot be replaced.
    """
    first: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_complex():
                continue
            if isinstance(module, torch.jit.ScriptModule):
                raise ModelError(
                    f"parameter '{name}' of a TorchScript module is complex; allowed there: real floating point"
                )
            requires_grad, key = parameter.requires_grad, id(parameter)
            parametrize.register_parametrization(module, name, ComplexParts())
            held: Any = module.parametrizations[name]  # type: ignore[index]
            held.original0, held.original1 = first.setdefault(key, (held.original0, held.original1))
            held.requires_grad_(requires_grad)
