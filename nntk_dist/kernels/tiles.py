"""The whole kernel from features, tile by tile.

Axes: n1, n2 rows; `full` kernels are indexed i·C + c, C outputs.
"""

from torch import Tensor

from nntk_dist.products.features import FeatureMap, Rows, slice_rows
from nntk_dist.products.wanted import Wanted
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from nntk_dist.spec import KernelSpec, Kind
from nntk_dist.statistics.standard_errors import Calibration, Estimates, sample_entries, sample_limit
from nntk_dist.statistics.tile_estimates import calibrate_sample, tile_estimates

_TILE_ROWS = 1024
_LOCAL_TILES, _LEAST_LOCAL_ROWS = 4, 128  # tiles a side: ten of the sixteen of a symmetric kernel are computed


def whole_kernel(
    features: FeatureMap, rows: Rows, others: Rows | None, spec: KernelSpec
) -> tuple[Estimates, Calibration | None]:
    """Return the whole kernel from the features of all rows, tile by tile.

    With one row set, the upper triangle is computed and mirrored.

    Args:
        features: what the features are.
        rows: the features of x1.
        others: the features of x2; None if it is x1.
        spec: the kernel.

    Returns:
        The estimates, and their calibration if there are enough blocks for error bars.
    """
    symmetric, right = others is None, rows if others is None else others
    n1, n2 = len(next(iter(rows.values()))), len(next(iter(right.values())))
    width = len(features.columns) if spec.meeting.full else 1
    calibration = None
    if features.num_blocks >= MINIMUM_BLOCKS:
        sample, other_sample = sample_entries(spec.seed, n1, n2, sample_limit(width))
        sampled = slice_rows(rows, sample), slice_rows(right, other_sample)
        calibration = calibrate_sample(features, [sampled], spec.meeting)
    edge = _TILE_ROWS
    if symmetric and spec.kind == Kind.LOCAL:
        edge = min(edge, max(_LEAST_LOCAL_ROWS, -(-n1 // _LOCAL_TILES)))
    parts: dict[str, Tensor] = {}
    for j in range(0, n2, edge):
        right_tile = features.prepare(slice_rows(right, slice(j, j + edge)), Wanted(stderr=calibration is not None))
        for i in range(0, j + 1 if symmetric else n1, edge):
            left_tile = right_tile if symmetric and i == j else slice_rows(rows, slice(i, i + edge))
            tile = tile_estimates(features, [(left_tile, right_tile)], spec.meeting, calibration, spec.scale)
            for name, values in tile.items():
                whole = parts.setdefault(name, values.new_empty(n1 * width, n2 * width))
                _place(whole, values, i * width, j * width)
                if symmetric and i != j:
                    _place(whole, values.T, j * width, i * width)
    return Estimates(parts["plugin"], parts.get("unbiased"), parts.get("stderr")), calibration


def _place(whole: Tensor, values: Tensor, row: int, column: int) -> None:
    whole[row : row + values.shape[0], column : column + values.shape[1]] = values
