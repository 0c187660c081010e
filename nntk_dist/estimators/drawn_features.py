"""What the features of all estimators with draws have in common; the estimators themselves are in the other modules.

Axes: n rows, s draws, c outputs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nntk_dist.models.evaluation import Evaluator
from nntk_dist.products.block_sums import Changes, Meeting
from nntk_dist.products.feature_description import ArraySpec, FeatureStorage
from nntk_dist.products.features import Rows
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import WeightedProduct
from nntk_dist.sampling.draws import Drawing


@dataclass(frozen=True)
class DrawnFeatures(ABC):
    """Base class of features that evaluate a model under draws; see `nntk_dist.products.features.FeatureMap`.

    Its answers are right for features that are several arrays, have no metric, and show unresolved entries by
    themselves.

    Attributes:
        evaluator: Calls the model with given parameters.
        drawing: The draws.
        columns: The indices of the model outputs in the kernel.
    """

    evaluator: Evaluator
    drawing: Drawing
    columns: tuple[int, ...]

    @property
    def num_draws(self) -> int:
        """S, the number of perturbed models."""
        return self.drawing.num_draws

    @property
    def num_blocks(self) -> int:
        """R, the number of independent blocks of draws."""
        return self.drawing.num_blocks

    @property
    def num_parameters(self) -> int:
        """P, the number of selected parameters."""
        return self.drawing.num_parameters

    def resolved(self, rows: Rows, others: Rows, meeting: Meeting) -> Bool[Tensor, "*tile"] | None:
        """Return None: every standard error means something, or is 0."""
        return None

    def changes(self, rows: Rows) -> Changes | None:
        """Return None: every entry is resolved."""
        return None

    @property
    def num_groups(self) -> int:
        """The number of independent groups of draws."""
        return self.num_draws // self.drawing.group_size

    def component_share(self, counted: Collection[str] = ()) -> float:
        """Return the largest component of a direction along a unit vector over its length: 1/√P if γ is not scaled.

        Args:
            counted: the tensors whose part of directions counts; all by default.
        """
        drawing, space = self.drawing, self.evaluator.space
        scales = drawing.scales or (1.0,) * len(space.names)
        each = zip(space.names, space.sizes, scales, strict=True)
        kept = [(size, scale) for name, size, scale in each if name in counted or not counted]
        return 1.0 / min(scale for _, scale in kept) / math.sqrt(sum(size / scale**2 for size, scale in kept))

    @property
    def num_sketch_groups(self) -> int:
        """0: products are exact."""
        return 0

    @property
    @abstractmethod
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that `compute` returns."""

    @property
    def storage(self) -> FeatureStorage:
        """Members of a group, without a metric."""
        return FeatureStorage(self.arrays)

    def outputs(self, x: Tensor, *, batch: int | None = None) -> Float[Tensor, "n c"]:
        """Compute f(x; θ), all outputs; of a model with noise, its mean function."""
        return self.evaluator.expected(x, self.drawing.seed, batch)

    def make_metric(self) -> Float64[Tensor, "k k"] | None:
        """Return None: there is no metric."""
        return None

    def with_metric(self, metric: Float64[Tensor, "k k"]) -> Self:
        """Return the same features: products need no metric."""
        return self

    def weighted_products(self, rows: Rows, others: Rows, wanted: Wanted) -> list[WeightedProduct] | None:
        """Return None: the sums take more than matrix products."""
        return None

    def difference_passes(self) -> float:
        """Return the forward passes of one draw, with those at θ that a model with noise repeats for every group."""
        return 1.0 + (1.0 / self.drawing.group_size if self.evaluator.is_random else 0.0)
