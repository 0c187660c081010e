"""How features describe themselves: their arrays, how a store keeps them, and what they cost.

Plain values without tensors, small enough for a manifest. They let a pipeline plan, store and check features of any
estimator without knowing its class. Nothing is computed here.

Axes: s draws, r blocks, c outputs.
"""

import math
from dataclasses import dataclass

from nntk_dist.products.factor_form import FactorForm


@dataclass(frozen=True)
class ArraySpec:
    """One feature array without its leading row axis.

    Attributes:
        name: The key of the array in `FeatureMap.compute`.
        axes: Names of the axes behind the row axis. The first one, "draw" or "block", is what chunks of draws divide.
            The axis named "output" has one place for each output of the kernel.
        shape: Lengths of these axes.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def num_numbers(self) -> int:
        """Numbers of one row."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FeatureStorage:
    """How a store keeps the features of a kernel.

    Attributes:
        arrays: The arrays that `FeatureMap.compute` returns.
        is_single: Whether a store keeps one array `features`; otherwise the arrays are members of a group.
        metric: The matrix M with `plugin = Φ M Φᵀ` that is kept beside the features Φ, if there is one. Features with
            a metric are one array, an explicit factor of the kernel.
        needs_metric: Whether products of rows need the stored metric (`FeatureMap.with_metric`).

    Example:
        >>> spec = ArraySpec("differences", ("draw", "output"), (16, 3))
        >>> FeatureStorage((spec,)).path("train", spec)
        'train/features/differences'
        >>> FeatureStorage((spec,), metric=ArraySpec("metric", ("draw", "draw_col"), (16, 16))).is_factor
        True
    """

    arrays: tuple[ArraySpec, ...]
    is_single: bool = False
    metric: ArraySpec | None = None
    needs_metric: bool = False

    @property
    def is_factor(self) -> bool:
        """Whether features and metric are an explicit factor of the statistic `plugin`."""
        return self.metric is not None

    def path(self, split: str, spec: ArraySpec) -> str:
        """Return the path of an array in a store: `SPLIT/features`, or a member of that group if there are several."""
        return f"{split}/features" if self.is_single else f"{split}/features/{spec.name}"

    def factor_form(self, *, full: bool) -> FactorForm | None:
        """Return the form of the explicit factor, or None without one; `full` keeps one kernel row for each output."""
        return FactorForm(self.arrays[0].axes, self.arrays[0].shape, full) if self.is_factor else None


@dataclass(frozen=True)
class FeatureCosts:
    """What features cost, as functions of the kernel's shape; operations are floating-point ones.

    Attributes:
        entry_operations: Operations of one kernel entry, summed over outputs.
        passes_per_draw: Operations of one row and draw, in forward passes of the model. None if features take more than
            passes: then their operations are counted on one example.
        pass_copies: How often the activations of one batch are held at once.
        metric_operations: Operations of `make_metric`; 0 if it is free or there is none.
        held_bytes: Memory that a worker holds for good, beside the model.
        prepared_share: Bytes of a prepared row set, as a share of the bytes of a computed one.
        copies_sample: Whether calibration copies a row set to float64 as a whole.
        pair_numbers: Numbers, in the features' dtype, that products of pairs of draws hold at once if they bypass
            `nntk_dist.products.weighted_products`; 0 if they do not.
        product_bytes: Memory of the list of a tile's weighted products.
        allows_sketch: Whether a sketch in place of exact products would make the features smaller.
    """

    entry_operations: float
    passes_per_draw: float | None = 1.0
    pass_copies: int = 1
    metric_operations: float = 0.0
    held_bytes: int = 0
    prepared_share: float = 1.0
    copies_sample: bool = False
    pair_numbers: int = 0
    product_bytes: int = 0
    allows_sketch: bool = False
