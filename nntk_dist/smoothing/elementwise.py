"""Trials that a function is elementwise and deterministic, which smoothing needs. Nothing is smoothed here.

Axes: none; functions take tensors of any shape.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]

OFFSET = math.pi / 1000  # added to trial points: no break lies on a grid of round numbers


def in_double(function: Function) -> Function:
    """Return a module as a copy that computes in float64 on the CPU; another function as it is."""
    return copy.deepcopy(function).double().cpu().eval() if isinstance(function, nn.Module) else function


def is_elementwise(function: Function) -> bool:
    """Whether a function of float64 tensors is elementwise and deterministic, by its values at 48 points."""
    points = torch.linspace(-3.0, 3.0, 48, dtype=torch.float64) + OFFSET
    values = function(points[None])
    if not isinstance(values, Tensor) or values.shape != (1, 48) or values.dtype != torch.float64:
        return False
    others = function(points.flip(0).reshape(6, 8)).reshape(-1).flip(0)
    alone = torch.cat([function(point.reshape(1, 1)).reshape(1) for point in points])
    again = function(points[None])[0]
    return torch.equal(again, values[0]) and all(
        torch.allclose(each, values[0], rtol=1e-12, atol=1e-15) for each in (others, alone)
    )
