"""The kernels of groups of parameters, from the same passes over the model.

All parameters of all groups move together, as for one kernel of them all. Each group then has the inner products of its
own part of the gradients. The kernels of groups that share no parameter add up to the kernel of all of them.

Axes: n1, n2 examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nntk_dist.errors import ModelError
from nntk_dist.kernels.estimate import KernelEstimate
from nntk_dist.kernels.prepared import Examples, Placement, PreparedKernel, decided, example_ids
from nntk_dist.kernels.tiles import HeldRows, feature_limit
from nntk_dist.models.evaluation import FAILS_ON_INPUTS, trying
from nntk_dist.planning.decision import of_group
from nntk_dist.planning.feature_maps import FeatureGroups, make_feature_map
from nntk_dist.runtime.precision import full_precision
from nntk_dist.spec import KernelSpec


@dataclass(frozen=True, eq=False, repr=False)
class PreparedGroups:
    """A function of (x1, x2) that keeps the decision about a model, and returns a kernel for each group.

    Attributes:
        kernels: the kernel of each group, by its name.
    """

    kernels: Mapping[str, PreparedKernel]

    def __call__(self, x1: Examples, x2: Examples | None = None) -> dict[str, KernelEstimate[Tensor]]:
        """Compute the kernels between the examples of x1 and x2, or of x1 with itself.

        Raises:
            ArgumentError: the examples have another shape than those that the kernels were prepared for.
            NNTKError: the model's output or gradient is not finite.
        """
        return self.estimate(self._first.taken(x1, x2))

    def __repr__(self) -> str:
        return f"PreparedGroups({', '.join(self.kernels)}: {self._first!r})"

    @property
    def _first(self) -> PreparedKernel:
        return next(iter(self.kernels.values()))

    @torch.inference_mode(False)  # the caller's would forbid gradients
    @full_precision()
    def estimate(self, inputs: list[Tensor]) -> dict[str, KernelEstimate[Tensor]]:
        """Compute the kernels of inputs that the placement has taken: x1, or x1 and x2.

        If the features of all groups do not fit into memory together, each group makes its own passes.
        """
        placement, maps = self._first.placement, {name: each.features for name, each in self.kernels.items()}
        numbers = sum(array.num_numbers for features in maps.values() for array in features.arrays)
        if sum(map(len, inputs)) * placement.dtype.itemsize * numbers > feature_limit(placement.device):
            return {name: kernel.estimate(inputs) for name, kernel in self.kernels.items()}
        shared, first = FeatureGroups(self._first.decision.estimator, maps), self._first.features
        batch, sides = placement.batch_for(*inputs), []
        for x, ids in zip(inputs, example_ids(inputs), strict=True):
            with trying(ModelError, FAILS_ON_INPUTS):
                draws = range(first.num_draws)
                sides.append(shared.compute(x, ids, draws, first.columns, batch=min(batch, len(x))))
        return {
            name: kernel.estimate_of(HeldRows(kernel.features, sides[0][name], sides[1][name] if sides[1:] else None))
            for name, kernel in self.kernels.items()
        }


@torch.inference_mode(False)  # the caller's would forbid gradients
@full_precision()
def prepare_groups(model: nn.Module, inputs: list[Tensor], spec: KernelSpec, placement: Placement) -> PreparedGroups:
    """Decide how the kernels of groups of parameters are computed.

    Args:
        model: the model; a private copy of it is evaluated.
        inputs: the examples to decide on, which the placement has taken: x1, or x1 and x2.
        spec: the kernel, whose parameters are a mapping.
        placement: device, dtype and batch.

    Raises:
        NNTKError: no kernels of this description can be computed for the model.
    """
    private, decision, accuracy = decided(model, inputs, spec, placement)
    shape, kernels = tuple(inputs[0].shape[1:]), {}
    for name in spec.groups:
        own = of_group(decision, spec, name)
        features = make_feature_map(private, inputs[0], spec, own)
        kernels[name] = PreparedKernel(spec, own, features, placement, shape, accuracy)
    return PreparedGroups(kernels)
