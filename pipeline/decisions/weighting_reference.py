"""The reference batch for the scores of draws: a seeded choice of training examples, never of test examples.

It depends only on the seed and the number of training examples, so driver and workers, first and resumed runs agree.
The attributes of a store that describe the weighting are here too. No score is computed here.

Axes: n reference examples.
"""

import math
from typing import Any

import numpy as np
import torch

from nntk_dist.sampling.philox import uniform
from nntk_dist.sampling.streams import REFERENCE_GROUP, Stream
from nntk_dist.spec import KernelSpec
from nntk_dist.weighting.options import Reference
from pipeline.data import Dataset


def num_reference(spec: KernelSpec, num_train: int) -> int:
    """Return how many training examples the weights depend on; 0 if they depend on none."""
    if not spec.weighting.compares_outputs:
        return 0
    assert isinstance(spec.weighting.reference, int)
    return min(spec.weighting.reference, num_train)


def reference_rows(spec: KernelSpec, num_train: int) -> np.ndarray:
    """Return the indices of these training rows, in ascending order."""
    keys = uniform(spec.seed, Stream.ATTENTION, torch.tensor([REFERENCE_GROUP]), num_train)[0]
    return np.sort(keys.argsort(stable=True)[: num_reference(spec, num_train)].numpy())


def reference_batch(spec: KernelSpec, dataset: Dataset, dtype: torch.dtype, device: str) -> Reference | None:
    """Return the batch with its targets, in the given dtype and on the given device; None if weights need none."""
    rows = reference_rows(spec, len(dataset.train.ids))
    if not len(rows):
        return None
    inputs = torch.from_numpy(np.ascontiguousarray(dataset.train.inputs[rows]))
    targets = torch.from_numpy(dataset.train.targets[rows])
    return Reference(inputs.to(device, dtype if inputs.is_floating_point() else inputs.dtype), targets.to(device))


def weighting_attributes(spec: KernelSpec, num_train: int) -> dict[str, Any]:
    """Return a store's attributes about the weights of draws; features of weighted draws carry their factors."""
    weighting = spec.weighting
    named: dict[str, Any] = {"weighting": weighting.label}
    if weighting.is_fixed:
        return named
    named["weighting_temperature"] = None if math.isinf(weighting.tau) else weighting.tau
    named["weighting_per_example"] = weighting.per_example
    named["weighting_reference"] = num_reference(spec, num_train)
    return named | ({"weighting_dimension": weighting.dimension} if weighting.name == "parameter" else {})
