"""One differentiable forward pass with the inputs and outputs of some modules kept, and the gradients behind it.

No gradient of a parameter is made here (`nntk_dist.layers.per_example`).

Axes: n examples, c outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.layers.hooks import AfterHook, hooked
from nntk_dist.layers.sites import Site
from nntk_dist.models.evaluation import output_index, outputs
from nntk_dist.runtime.memory import is_out_of_memory


@dataclass
class Call:
    """One call of a site's module: what went in and the tensor that came out."""

    h: Tensor
    out: Tensor


class Recording:
    """One differentiable forward pass, with the calls of the sites' modules kept: at given parameters, or the model's
    own.

    A call of a `common` site gets one row for all examples. Its output is repeated, so that each example has a row with
    a gradient of its own.

    Use: `Recording(model, sites, x, parameters)`, then `gradients(columns)`.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], x: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        self.calls: dict[str, list[Call]] = {site.module: [] for site in sites}
        self._common = {site.module: site.common for site in sites}
        self._num_examples = len(x)
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self._dtype = own if parameters is None else next((p.dtype for p in parameters.values()), own)
        with hooked(model, after={name: self._keep(name) for name in self.calls}), torch.enable_grad():
            self.outputs = outputs(model, x, parameters)

    def _keep(self, name: str) -> AfterHook:
        def keep(h: Tensor, out: Tensor) -> Tensor:
            if not out.requires_grad:
                out = out.detach().requires_grad_()
            # Copies: an in-place activation or residual would otherwise overwrite what is kept here.
            kept = h.detach().clone()
            if kept.shape == self._common[name]:  # otherwise it comes from a repeated row
                kept, out = (_repeated(values, self._num_examples) for values in (kept, out))
            self.calls[name].append(Call(kept.to(self._dtype) if kept.is_floating_point() else kept, out))
            return out.clone()

        return keep

    def gradients(self, columns: Sequence[int]) -> dict[str, list[Float[Tensor, "n c ..."]]]:
        """∂f_c/∂(module output) for every call of every site, all output columns in one backward pass.

        They lie in memory column by column, in the dtype of the parameters, whatever the module computes in. If vmap
        cannot differentiate the model, each column takes a pass.
        """
        outs = [call.out for calls in self.calls.values() for call in calls]
        parts: Sequence[Tensor | None] = [None] * len(outs)
        if outs and self.outputs.requires_grad:
            one_hot = torch.eye(self.outputs.shape[1], dtype=self.outputs.dtype, device=self.outputs.device)
            directions = one_hot[output_index(columns), None].expand(-1, len(self.outputs), -1)
            parts = self._products(outs, directions)
        zeros = (out.new_zeros(1).expand(len(columns), *out.shape) for out in outs)
        filled = [zero if part is None else part for part, zero in zip(parts, zeros, strict=True)]
        iterator = iter([part.transpose(0, 1).to(self._dtype) for part in filled])
        return {name: [next(iterator) for _ in calls] for name, calls in self.calls.items()}

    def outs(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of modules that are called once."""
        return {name: self.calls[name][0].out for name in modules}

    def _products(self, outs: Sequence[Tensor], directions: Float[Tensor, "c n o"]) -> Sequence[Tensor | None]:
        """Gradients of the outputs along several directions, None for what they do not depend on."""

        def along(direction: Tensor, *, batched: bool) -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                self.outputs, outs, direction, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        if len(directions) == 1:
            return [None if own is None else own[None] for own in along(directions[0], batched=False)]
        try:
            return along(directions, batched=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # an autograd.Function without a rule for vmap, say
            each = [along(direction, batched=False) for direction in directions]
            return [None if own[0] is None else torch.stack(own) for own in zip(*each, strict=True)]


def _repeated(values: Float[Tensor, "..."], num_examples: int) -> Float[Tensor, "n ..."]:
    """The one row of all examples, (1, ...) or without the leading axis, as a row for each example."""
    row = values if len(values) == 1 else values[None]
    return row.expand(num_examples, *row.shape[1:])


@dataclass(frozen=True)
class Pass:
    """One pass over a batch: its inputs, the calls, their output gradients, and the parameters that it was made at.

    `penultimate` names the layer before the readout, `derivatives` and `shares` are its s and B; None if it has none.
    """

    x: Tensor
    recording: Recording
    deltas: Mapping[str, Sequence[Float[Tensor, "n c ..."]]]
    parameters: Mapping[str, Tensor]
    columns: Sequence[int]
    penultimate: str | None = None
    derivatives: Float[Tensor, "n o"] | None = None
    shares: Float[Tensor, "c o"] | None = None
