"""The layer before the readout: its output gradients δ_c = W_c ⊙ φ'(a) share the slopes φ'(a), one number a unit.

So it is where the model's output is a Linear W of φ(a), φ a function of each unit by itself: then Σ_c ⟨δ_c, δ'_c⟩ is
one product of the layer's width, not C of them. Whether the model is like that is read from the autograd graph, node
by node, in every pass: nothing is guessed from numbers, and what is not on the list of functions does not count.
Nothing is differentiated here.

Axes: n examples, c outputs, o units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Backward nodes of functions of one tensor, number by number; and of what leaves numbers and their places alone.
_BY_UNIT = frozenset(
    f"{name}Backward0"
    for name in ("Relu", "Tanh", "Sigmoid", "Gelu", "Silu", "Erf", "LeakyRelu", "Elu", "Softplus", "Hardtanh", "Mish",
                 "Sin", "Cos", "Exp", "Threshold", "Hardswish", "Hardsigmoid")
)  # fmt: skip
_COPIES = frozenset({"CloneBackward0", "AliasBackward0"})
_LINEAR = {"AddmmBackward0": 1, "MmBackward0": 0}  # a Linear on vectors, with and without bias: where its input goes in


@dataclass(frozen=True)
class Slopes:
    """The module of the layer, and that of the readout."""

    module: str
    readout: str


def find_slopes(outputs: Float[Tensor, "n c"], outs: Mapping[str, Tensor]) -> Slopes | None:
    """The two layers in the graph of one pass, None where the model has no such end.

    `outs` are the outputs of Linear layers that were called once, on one vector an example; each was copied before
    anything read it, and weights carry no gradient.
    """
    node = _before(outputs.grad_fn, _COPIES)
    readout = _name_of(node, outs)
    if readout is None or node is None or node.name() not in _LINEAR:
        return None
    source = _before(node.next_functions[_LINEAR[node.name()]][0], _COPIES | _BY_UNIT, outs)
    module = _name_of(source, outs)
    return None if module is None else Slopes(module, readout)


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


def shared_slopes(
    delta: Float[Tensor, "n c o"], weight: Float[Tensor, "C o"], columns: Sequence[int]
) -> tuple[Float[Tensor, "n o"], Float[Tensor, "c o"]]:
    """Slopes s and shares B, at most 1, with δ_c = B_c ⊙ s, from δ and the readout's W.

    A unit's slope is its δ for the output in which its weight is the largest.
    """
    weight = weight[list(columns)]
    largest = weight.abs().argmax(0, keepdim=True)
    strongest = weight.gather(0, largest)
    slopes = delta.gather(1, largest.expand(len(delta), 1, -1))[:, 0]
    return slopes, weight / torch.where(strongest == 0, 1.0, strongest)
