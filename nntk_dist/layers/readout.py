"""The last two layers in one pass: derivatives of the layer before the readout, inputs of the readout.

What was found on a few examples (`nntk_dist.layers.penultimate`) is checked again in every pass; a pass that ends in
another way is refused. No draws and no kernels here.

Axes: n examples, m first of them, c outputs, o units, i inputs of the readout.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import Unavailable
from nntk_dist.layers.penultimate import (
    OutputLayers,
    activation_derivatives,
    find_output_layers,
    find_readout,
    shared_derivatives,
)
from nntk_dist.layers.per_example import write_extended_input
from nntk_dist.layers.recording import Recording
from nntk_dist.layers.sites import Site


def derivatives_of_pass(
    model: nn.Module, pair: OutputLayers, recording: Recording, delta: Float[Tensor, "n c ..."], columns: Sequence[int]
) -> tuple[Float[Tensor, "n o"], Float[Tensor, "c o"]]:
    """Return derivatives and shares of the layer before the readout, from δ for the outputs `columns`.

    Raises: Unavailable if this pass does not end as the pair says.
    """
    if find_output_layers(recording.outputs, recording.outs([pair.module, pair.readout])) != pair:
        raise _another_way(pair.module)
    return shared_derivatives(delta.flatten(2), readout_weight(model, pair), columns)


def activation_derivatives_of_pass(
    model: nn.Module, pair: OutputLayers, recording: Recording, delta: Float[Tensor, "n c ..."], columns: Sequence[int]
) -> Float[Tensor, "n o"]:
    """Return φ'(a), which all outputs share; δ must hold all outputs that depend on any unit."""
    derivatives, _ = derivatives_of_pass(model, pair, recording, delta, columns)
    return activation_derivatives(derivatives, readout_weight(model, pair), columns)


def add_readout_(sums: Float[Tensor, "m i"], site: Site, recording: Recording, num_outputs: int) -> None:
    """Add √C h̃ of the readout, δ_c ⊗ h̃ of all C outputs in one: δ is the identity, and products of both are the same.

    Raises: Unavailable if this pass does not end in this layer.
    """
    (call,) = recording.calls[site.module]
    if find_readout(recording.outputs, recording.outs([site.module])) != site.module:
        raise _another_way(site.module)
    h = torch.empty_like(sums)
    write_extended_input(site, call.h, h)
    sums.add_(h, alpha=math.sqrt(num_outputs))


def readout_weight(model: nn.Module, pair: OutputLayers) -> Float[Tensor, "C o"]:
    """Return W, at the model's present parameters."""
    weight = model.get_submodule(pair.readout).weight
    assert isinstance(weight, Tensor)
    return weight


def _another_way(module: str) -> Unavailable:
    return Unavailable(
        f"the model goes another way from layer '{module}' to its output for these examples than for those that it was "
        "tried on; put examples of both kinds among the first 32, or leave the layer's parameters out"
    )
