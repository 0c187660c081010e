"""The last two layers in one pass: gradients behind the readout, derivatives of the layer before it, its inputs.

What was found on a few examples (`nntk_dist.layers.penultimate`) is checked again in every pass; a pass that ends in
another way is refused. No draws and no kernels here.

Axes: n examples, m first of them, c outputs, o units, i inputs of the readout.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import Unavailable
from nntk_dist.layers.penultimate import find_output_layers, find_readout
from nntk_dist.layers.per_example import write_extended_input
from nntk_dist.layers.recording import Pass, Recording
from nntk_dist.layers.sites import OutputLayers, Site
from nntk_dist.models.evaluation import output_index


def gradients_of_pass(
    passed: Pass, model: nn.Module, *, readout: str | None, pair: OutputLayers | None, shares_derivatives: bool
) -> Pass:
    """Differentiate a recorded pass, never multiplying by the readout's δ, which is the identity.

    All layers before the readout are differentiated from its input on, along the rows of its weight W; the layer
    before it has W ⊙ φ'(a), from one backward pass for all outputs. If the pass has directions V of the outputs, they
    take the place of the identity, and V W that of W.

    Args:
        passed: The pass, without gradients.
        model: The model, at the parameters of the pass.
        readout: The readout that was found on a few examples; None if there is none.
        pair: The last two layers, likewise.
        shares_derivatives: Whether the pass must end in these two.

    Raises:
        Unavailable: It must, and does not.
    """
    recording, columns, num_rows = passed.recording, passed.columns, len(passed.x)
    if pair is not None and not {pair.module, pair.readout} <= recording.calls.keys():
        pair = None
    if pair is not None and find_output_layers(recording.outputs, recording.outs([pair.module, pair.readout])) != pair:
        if shares_derivatives:
            raise _another_way(pair.module)
        pair = None
    if readout not in recording.calls or find_readout(recording.outputs, recording.outs([readout])) != readout:
        if passed.directions is None:
            return replace(passed, deltas=recording.gradients(columns))
        directions = passed.directions.to(recording.outputs.dtype)
        return replace(passed, deltas=recording.along(directions[:, None].expand(-1, num_rows, -1)))
    weight = readout_weight(model, readout)
    if passed.directions is None:
        identity = torch.eye(recording.outputs.shape[1], dtype=weight.dtype, device=weight.device)
        weight, own = weight[output_index(columns)], identity[output_index(columns)]
    else:
        weight, own = passed.directions @ weight, passed.directions
    deltas = {readout: [own.expand(num_rows, -1, -1)]}
    others = [name for name in recording.calls if name != readout and (pair is None or name != pair.module)]
    deltas |= recording.before(readout, weight[:, None].expand(-1, num_rows, -1), others)
    if pair is None:
        return replace(passed, deltas=deltas)
    ((derivatives,),) = recording.before(readout, weight.new_ones(1, num_rows, weight.shape[1]), [pair.module]).values()
    derivatives = derivatives.reshape(num_rows, -1)
    return replace(passed, deltas=deltas, penultimate=pair.module, derivatives=derivatives, weight=weight)


def add_readout_(sums: Float[Tensor, "m i"], site: Site, recording: Recording, num_outputs: int) -> None:
    """Add √C h̃ of the readout, δ_c ⊗ h̃ of all C outputs in one: δ is the identity, and products of both are the same.

    Outputs that are kept apart have the product of h̃ each with itself: C = 1.

    Raises: Unavailable if this pass does not end in this layer.
    """
    (call,) = recording.calls[site.module]
    if find_readout(recording.outputs, recording.outs([site.module])) != site.module:
        raise _another_way(site.module)
    h = torch.empty_like(sums)
    write_extended_input(site, call.h, h)
    sums.add_(h, alpha=math.sqrt(num_outputs))


def readout_weight(model: nn.Module, readout: str) -> Float[Tensor, "C o"]:
    """Return W, at the model's present parameters, without a gradient."""
    weight = model.get_submodule(readout).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _another_way(module: str) -> Unavailable:
    return Unavailable(
        f"the model goes another way from layer '{module}' to its output for these examples than for those that it was "
        "tried on; put examples of both kinds among the first 32, or leave the layer's parameters out"
    )
