"""One tile of a kernel from the features of its rows and columns: the step that memory and a cluster share.

It computes and returns; where rows come from and where tiles go is the caller's business.

Axes: n1, n2 rows and columns; shapes of a tile as `nntk_dist.block_sums.Meeting` says.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from nntk_dist.block_sums import BlockSums, Meeting
from nntk_dist.features import FeatureMap, Rows
from nntk_dist.statistics import Calibration, calibrate, estimate


def tile_estimates(
    features: FeatureMap,
    parts: Iterable[tuple[Rows, Rows]],
    meeting: Meeting,
    calibration: Calibration | None,
    scale: str,
) -> dict[str, Tensor]:
    """`plugin`, `unbiased` and `stderr` of one tile, those that exist, in float64 and in the kernel's scale.

    `parts` are the features of rows and columns, all outputs at once or (for `trace`) a few outputs at a time. Without
    a calibration no standard error is made, which spares a third of the products. The standard error of an
    entry is NaN where differences gave every block the same value, as where no draw changed the output of its row or
    column: such an entry is not known to be zero, it is not known.
    """
    total: BlockSums | None = None
    for rows, others in parts:
        sums = features.block_sums(rows, others, meeting, by_block=calibration is not None)
        total = sums if total is None else total.add_(sums)
    if total is None:
        raise ValueError("a tile needs at least one part")
    result = estimate(total, calibration)
    factor = scale_factor(scale, features.num_parameters)
    values = {"plugin": result.plugin, "unbiased": result.unbiased, "stderr": result.stderr}
    present = {name: value * factor for name, value in values.items() if value is not None}
    if "stderr" in present and features.shows_unresolved:
        present["stderr"] = present["stderr"].masked_fill(present["stderr"] == 0, torch.nan)
    if "stderr" in present and total.resolved is not None:
        present["stderr"] = present["stderr"].masked_fill(~total.resolved, torch.nan)
    return present


def calibrate_sample(features: FeatureMap, parts: Iterable[tuple[Rows, Rows]], meeting: Meeting) -> Calibration:
    """What the features of sampled rows and columns say of the whole kernel's error; `parts` as in `tile_estimates`."""
    products: Tensor | None = None
    by_group: Tensor | None = None
    for rows, others in parts:
        product = features.block_products(rows, others, meeting)
        products = product if products is None else products + product
        if features.num_sketch_groups:
            grouped = features.block_sums(rows, others, meeting, by_block=True).by_group
            by_group = grouped if by_group is None or grouped is None else by_group + grouped
    if products is None:
        raise ValueError("a sample needs at least one part")
    return calibrate(products, pair_blocks=features.pair_blocks, by_group=by_group)


def scale_factor(scale: str, num_parameters: int) -> float:
    """What turns a localized kernel into the asked scale: `raw` is localized / P²."""
    return num_parameters**-2 if scale == "raw" else 1.0


def symmetrised(values: Tensor) -> Tensor:
    """The upper triangle and its mirror image: bitwise symmetric, as products of a row set with itself need not be."""
    return values.triu() + values.triu(1).T
