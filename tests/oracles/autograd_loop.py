"""The empirical NTK by a plain autograd loop: one example at a time, one output at a time.

Axes: n examples, c outputs, P parameters.
"""

from collections.abc import Callable, Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn


def kernel_by_loop(
    model: nn.Module,
    function: Callable[[nn.Module, int], Tensor],
    num_examples: int,
    parameters: Collection[str] | None = None,
) -> Float[Tensor, "n n"]:
    """Return Σ_c ⟨∇f_c(x), ∇f_c(x')⟩, in float64.

    Args:
        model: the model; frozen parameters count as any other.
        function: `function(model, i)`, f of example i, of any shape.
        num_examples: n.
        parameters: names of the parameters to differentiate by; None for all.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    named = {name: p for name, p in model.named_parameters() if parameters is None or name in parameters}
    rows = []
    for i in range(num_examples):
        values = function(model, i).reshape(-1)
        gradients = [
            torch.autograd.grad(v, list(named.values()), retain_graph=True, materialize_grads=True, allow_unused=True)
            for v in values
        ]
        flat = [
            torch.cat([(torch.view_as_real(g) if g.is_complex() else g.to_dense()).reshape(-1).double() for g in own])
            for own in gradients
        ]
        rows.append(torch.stack(flat))
    jacobian = torch.stack(rows)
    return torch.einsum("icp,jcp->ij", jacobian, jacobian)
