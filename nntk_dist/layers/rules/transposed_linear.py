"""Linear layers that keep their weight as (in, out), such as `Conv1D` of transformers, the layer of GPT-2.

Axes: n examples, c outputs of the model, o/i units out/in of the layer, t positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nntk_dist.layers.rules.linear import linear_sides
from nntk_dist.layers.rules.rule import LayerRule


def transposed_linear_gradients(
    module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor
) -> dict[str, Tensor]:
    """weight: Σ_t h_t ⊗ δ_t; bias: Σ_t δ_t."""
    delta, h = linear_sides(module, h, delta)
    return {"weight": torch.einsum("ncto,nti->ncio", delta, h), "bias": delta.sum(2)}


@dataclass(frozen=True)
class NamedRule(LayerRule):
    """A rule for a class of a package that need not be installed: `module_class` is not compared, its name is."""

    class_name: str = ""

    def applies(self, module: nn.Module) -> bool:
        """Return whether the module is of exactly this class."""
        return f"{type(module).__module__}.{type(module).__qualname__}" == self.class_name


# A sketch projects both sides apart; it does not matter to products which of them is the first axis.
TRANSPOSED_LINEAR = NamedRule(
    nn.Module,
    transposed_linear_gradients,
    sides=linear_sides,
    class_name="transformers.pytorch_utils.Conv1D",
)
