"""The layer before the readout: its output gradients δ_c = W_c ⊙ φ'(a) share the derivatives φ'(a), one number a unit.

This holds if the model's output is a Linear W of φ(a), φ a function of each unit by itself. Then Σ_c ⟨δ_c, δ'_c⟩ is
one product of the layer's width, not C of them: under two draws, Σ_j φ'_s(a)_j w_st,j φ'_t(a')_j. Whether the model is
of this form is read from the autograd graph, node by node, in every pass: nothing is guessed from numbers, and only
listed functions count. Nothing is differentiated here.

Axes: n examples, s/t draws, c outputs, o units.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from nntk_dist.layers.sites import OutputLayers
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.sampling.draws import Drawing

# Backward nodes of functions of one tensor, number by number; and of what leaves numbers and their places alone.
_BY_UNIT = frozenset(
    f"{name}Backward0"
    for name in ("Relu", "Tanh", "Sigmoid", "Gelu", "Silu", "Erf", "LeakyRelu", "Elu", "Softplus", "Hardtanh", "Mish",
                 "Sin", "Cos", "Exp", "Threshold", "Hardswish", "Hardsigmoid")
)  # fmt: skip
_COPIES = frozenset({"CloneBackward0", "AliasBackward0"})
_LINEAR = {
    "AddmmBackward0": 1,
    "MmBackward0": 0,
}  # a Linear on vectors, with and without bias: the position of its input
_WEIGHT_ELEMENTS = 1 << 24  # of the readout's weights under all draws, held at a time


def find_output_layers(outputs: Float[Tensor, "n c"], outs: Mapping[str, Tensor]) -> OutputLayers | None:
    """Find the two layers in the graph of one pass; None if the model does not end like that.

    `outs` are the outputs of Linear layers that were called once, on one vector an example; each was copied before
    anything read it, and weights carry no gradient.
    """
    node, readout = _before(outputs.grad_fn, _COPIES), find_readout(outputs, outs)
    if readout is None or node is None or node.name() not in _LINEAR:
        return None
    source = _before(node.next_functions[_LINEAR[node.name()]][0], _COPIES | _BY_UNIT, outs)
    module = _name_of(source, outs)
    return None if module is None else OutputLayers(module, readout)


def find_readout(outputs: Float[Tensor, "n c"], outs: Mapping[str, Tensor]) -> str | None:
    """Find the layer whose output is the model's output; None if there is none. `outs` as above."""
    return _name_of(_before(outputs.grad_fn, _COPIES), outs)


def _before(node: Any, passed: frozenset[str], outs: Mapping[str, Tensor] | None = None) -> Any:
    """The first node, going back, that is none of those passed, or that made one of the tensors."""
    while node is not None and node.name() in passed and _name_of(node, outs or {}) is None:
        node = node.next_functions[0][0]
    return node


def _name_of(node: Any, outs: Mapping[str, Tensor]) -> str | None:
    """Which of the tensors a node made; the first layer's is a leaf, which its node holds."""
    for name, out in outs.items():
        made = out.grad_fn is node if out.grad_fn is not None else getattr(node, "variable", None) is out
        if node is not None and made:
            return name
    return None


def pair_weights(
    model: nn.Module, readout: str, space: ParameterSpace, drawing: Drawing, columns: Sequence[int]
) -> Float64[Tensor, "s t o"]:
    """w_st = Σ_c W_c(θ_s) ⊙ W_c(θ_t): W the readout's weight at θ + U^{1/P} z of every draw, from the draws themselves.

    So whoever multiplies features need not have made them. A weight that is not selected is the same under all draws.
    `columns` are consecutive. Cost O(S²·C·o), and what a slice of all draws costs (`Drawing.perturbations`); memory
    O(S²·o + 2^24).
    """
    weight = model.get_submodule(readout).weight
    assert isinstance(weight, Tensor)
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    draws, width = range(drawing.num_draws), weight.shape[1]
    shrinkage = drawing.shrinkage(draws, device=weight.device)[:, None, None]
    total = torch.zeros(len(draws), len(draws), width, dtype=torch.float64, device=weight.device)
    step = max(1, _WEIGHT_ELEMENTS // (len(draws) * width))
    for first in range(columns[0], columns[-1] + 1, step):
        last = min(first + step, columns[-1] + 1)
        moved = weight[first:last].detach().double().expand(len(draws), -1, -1)
        if name in space.names:
            offset = sum(space.sizes[: space.names.index(name)])
            bounds = offset + first * width, offset + last * width
            z = drawing.perturbations(draws, *bounds, dtype=torch.float64, device=weight.device)
            moved = (moved + shrinkage * z.unflatten(1, (-1, width))).to(weight.dtype).double()
        total += torch.einsum("sco,tco->sto", moved, moved)
    return total
