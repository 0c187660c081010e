"""The last two layers in one pass: slopes of the layer before the readout, inputs of the readout.

What was found when the model was tried on a few examples (`nntk_dist.layers.penultimate`) is looked for again in every
pass, and where it is not there the pass is refused. No draws and no kernels here.

Axes: n examples, m first of them, c outputs, o units, i inputs of the readout.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import NNTKError
from nntk_dist.layers.capture import Recording, Site, write_extended_input
from nntk_dist.layers.penultimate import Slopes, bare_slopes, find_readout, find_slopes, shared_slopes


def slopes_of_pass(
    model: nn.Module, pair: Slopes, recording: Recording, delta: Float[Tensor, "n c ..."], columns: Sequence[int]
) -> tuple[Float[Tensor, "n o"], Float[Tensor, "c o"]]:
    """Slopes and shares of the layer before the readout, of δ for the outputs `columns`.

    Raises: NNTKError where this pass does not end as the pair says.
    """
    if find_slopes(recording.outputs, recording.outs([pair.module, pair.readout])) != pair:
        raise _another_way(pair.module)
    return shared_slopes(delta.flatten(2), readout_weight(model, pair), columns)


def bare_slopes_of_pass(
    model: nn.Module, pair: Slopes, recording: Recording, delta: Float[Tensor, "n c ..."], columns: Sequence[int]
) -> Float[Tensor, "n o"]:
    """φ'(a), which all outputs share: δ is to be for all of those that take something of any unit."""
    slopes, _ = slopes_of_pass(model, pair, recording, delta, columns)
    return bare_slopes(slopes, readout_weight(model, pair), columns)


def add_readout_(sums: Float[Tensor, "m i"], site: Site, recording: Recording, num_outputs: int) -> None:
    """Add √C h̃ of the readout, δ_c ⊗ h̃ of all C outputs in one: δ is the identity, and products of both are the same.

    Raises: NNTKError where this pass does not end in this layer.
    """
    (call,) = recording.calls[site.module]
    if find_readout(recording.outputs, recording.outs([site.module])) != site.module:
        raise _another_way(site.module)
    h = torch.empty_like(sums)
    write_extended_input(site, call.h, h)
    sums.add_(h, alpha=math.sqrt(num_outputs))


def readout_weight(model: nn.Module, pair: Slopes) -> Float[Tensor, "C o"]:
    """W, at the model's present parameters."""
    weight = model.get_submodule(pair.readout).weight
    assert isinstance(weight, Tensor)
    return weight


def _another_way(module: str) -> NNTKError:
    return NNTKError(
        f"the model goes another way from layer '{module}' to its output for these examples than for those that it was "
        "tried on; use estimator: weight"
    )
