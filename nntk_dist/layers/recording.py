"""One differentiable forward pass with the inputs and outputs of some modules kept, and the gradients behind it.

No gradient of a parameter is made here (`nntk_dist.layers.per_example`).

Axes: n examples, c outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nntk_dist.layers.hooks import AfterHook, hooked
from nntk_dist.layers.sites import Site
from nntk_dist.models.evaluation import output_index, outputs
from nntk_dist.runtime.memory import is_out_of_memory


@dataclass
class Call:
    """One call of a site's module: what went in, its place in the graph, and the tensor that came out.

    `edge` is None if the input carries no gradient.
    """

    h: Tensor
    out: Tensor
    edge: GradientEdge | None = None


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
            edge = get_gradient_edge(h) if h.requires_grad else None
            self.calls[name].append(Call(kept.to(self._dtype) if kept.is_floating_point() else kept, out, edge))
            return out.clone()

        return keep

    def gradients(self, columns: Sequence[int]) -> dict[str, list[Float[Tensor, "n c ..."]]]:
        """∂f_c/∂(module output) for every call of every site; see `along`."""
        one_hot = torch.eye(self.outputs.shape[1], dtype=self.outputs.dtype, device=self.outputs.device)
        return self.along(one_hot[output_index(columns), None].expand(-1, len(self.outputs), -1))

    def along(self, directions: Float[Tensor, "c n o"]) -> dict[str, list[Float[Tensor, "n c ..."]]]:
        """Gradients of outputs along some directions, for every call of every site, in one backward pass.

        They lie in memory direction by direction, in the dtype of the parameters, whatever the module computes in. If
        vmap cannot differentiate the model, each direction takes a pass.
        """
        return self._gradients(self.outputs if self.outputs.requires_grad else None, directions, list(self.calls))

    def before(
        self, module: str, directions: Float[Tensor, "c n i"], sites: Sequence[str]
    ) -> dict[str, list[Float[Tensor, "n c ..."]]]:
        """Gradients of the input of a module that is called once along some directions, for the calls of some sites."""
        (call,) = self.calls[module]
        return self._gradients(call.edge, directions, sites)

    def outs(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of modules that are called once."""
        return {name: self.calls[name][0].out for name in modules}

    def _gradients(
        self, origin: Tensor | GradientEdge | None, directions: Float[Tensor, "c ..."], sites: Sequence[str]
    ) -> dict[str, list[Float[Tensor, "n c ..."]]]:
        """Gradients behind a tensor of the graph, 0 for what it does not depend on."""
        outs = [call.out for name in sites for call in self.calls[name]]
        parts = products_along(origin, outs, directions) if outs and origin is not None else [None] * len(outs)
        zeros = (out.new_zeros(1).expand(len(directions), *out.shape) for out in outs)
        filled = [zero if part is None else part for part, zero in zip(parts, zeros, strict=True)]
        iterator = iter([part.transpose(0, 1).to(self._dtype) for part in filled])
        return {name: [next(iterator) for _ in self.calls[name]] for name in sites}


def products_along(
    origin: Tensor | GradientEdge, outs: Sequence[Tensor], directions: Float[Tensor, "c ..."]
) -> Sequence[Tensor | None]:
    """Return gradients along several directions, None for what the origin does not depend on.

    If vmap cannot differentiate the graph, each direction takes a pass.
    """

    def along(direction: Tensor, *, batched: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            origin, outs, direction, retain_graph=True, allow_unused=True, is_grads_batched=batched
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

    Axis c runs over the outputs `columns`, or over random `directions` of all outputs if there are some.

    `penultimate` names the layer before the readout; its δ is the readout's weight W times its `derivatives` φ'(a). All
    three are None if the model does not end in these two layers.
    """

    x: Tensor
    recording: Recording
    deltas: Mapping[str, Sequence[Float[Tensor, "n c ..."]]]
    parameters: Mapping[str, Tensor]
    columns: Sequence[int]
    directions: Float[Tensor, "c C"] | None = None
    penultimate: str | None = None
    derivatives: Float[Tensor, "n o"] | None = None
    weight: Float[Tensor, "c o"] | None = None

    def deltas_of(self, module: str) -> Sequence[Float[Tensor, "n c ..."]]:
        """Return δ of every call of a module."""
        if module in self.deltas:
            return self.deltas[module]
        assert module == self.penultimate
        assert self.derivatives is not None
        assert self.weight is not None
        return [self.derivatives[:, None] * self.weight]
