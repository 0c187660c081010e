"""Sketches of explicitly formed gradients: the slow way to compute what a sketching feature map computes.

A sketch of a block mean is the mean of the draws' sketches, so gradients formed once serve any number of sketches. The
probes are the library's; the tests of its sketching features check that they agree.

Axes: n rows, r blocks, c outputs, k columns.
"""

import numpy as np
import torch
from torch import Tensor

from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.estimators.layer_noise.activation_features import ActivationFeatures
from nntk_dist.layers.sketches.sketch import Sketch
from nntk_dist.products.features import Rows


def sketch_of_formed(features: ActivationFeatures, rows: Rows, sketch: Sketch) -> dict[str, Tensor]:
    """Convert rows of explicit gradients to rows of a sketching feature map: project `dense` layer by layer."""
    space, dense = features.evaluator.space, rows["dense"]
    shapes = dict(zip(space.names, space.shapes, strict=True))
    total, offset = torch.zeros(*dense.shape[:3], sketch.num_columns, dtype=dense.dtype), 0
    for each in features.plan.noisy:
        layer = dense[..., offset : offset + each.num_parameters].unflatten(3, (each.units, each.width))
        offset += each.num_parameters
        start = 0
        for _, name in each.site.parameters:
            width = int(np.prod(shapes[name][1:], dtype=int))
            part = layer[..., start : start + width].flatten(1, 2).reshape(len(dense), -1, *shapes[name])
            total += sketch.of_gradient(name, part).unflatten(1, dense.shape[1:3])
            start += width
    return {name: values for name, values in rows.items() if name != "dense"} | {"sketch": total}


def sketch_of_gradients(features: GradientFeatures, rows: Rows, sketch: Sketch) -> dict[str, Tensor]:
    """The same for `autodiff`, whose means contain every parameter."""
    space, dense = features.evaluator.space, rows["dense"]
    shapes = dict(zip(space.names, space.shapes, strict=True))
    names = features.plan.dense_names()
    parts = dense.split([int(np.prod(shapes[name], dtype=int)) for name in names], dim=3)
    weights = {f"{name.removesuffix('weight')}bias": name for name in names if len(shapes[name]) > 1}
    total = torch.zeros(dense.shape[0] * dense.shape[1], sketch.num_columns, dtype=dense.dtype)
    for name, part in zip(names, parts, strict=True):
        gradient = part.flatten(0, 1).reshape(-1, part.shape[2], *shapes[name])
        if name in weights:
            total += _sketch_of_bias(sketch, weights[name], name, gradient)
        else:
            total += sketch.of_gradient(name, gradient)
    return {"sketch": total.unflatten(0, dense.shape[:2])}


def _sketch_of_bias(sketch: Sketch, weight: str, bias: str, gradient: Tensor) -> Tensor:
    """Sketch a bias as one more input of its weight: its rows use the weight's probes, the extra input its own."""
    assert sketch.joint
    flat = gradient.flatten(1)
    u, v = (
        torch.view_as_complex(sketch.probes(name, side, torch.arange(length), flat.dtype).unflatten(1, (-1, 2)))
        for name, side, length in ((weight, 0, flat.shape[1]), (bias, 1, 1))
    )
    return torch.view_as_real((flat.to(u.dtype) @ u) * v).flatten(1) * (2 * sketch.num_columns) ** -0.5
