"""One tile of a kernel from the features of its rows and columns: the step that memory and a cluster share.

A tile is computed in windows of rows and columns that stay in a core's cache, with sums in float64; only results are as
large as the tile. The caller reads rows and writes tiles.

Axes: n1, n2 rows and columns; `nntk_dist.products.block_sums.Meeting` defines the shape of a tile.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from nntk_dist.products.block_sums import BlockSums, Changes, Meeting, empty_sums
from nntk_dist.products.features import FeatureMap, Rows, num_rows, slice_rows
from nntk_dist.products.wanted import Side, Wanted
from nntk_dist.products.weighted_products import ProductSums, WeightedProduct, can_multiply_into, multiply_into_
from nntk_dist.statistics.standard_errors import SAMPLE_ENTRIES, Calibration, calibrate, estimate, shares_of_sums
from nntk_dist.statistics.unresolved import bound_of_unresolved, joined_changes

# Kernel rows and columns of a window: large enough for the full rate of a matrix product on two threads, small enough
# for its sums (2 MiB each in float64) to stay in a cache. A GPU needs windows that keep all of it busy.
WINDOW_ROWS = 512
WINDOW_COLUMNS = 512
_GPU_WINDOW = 2048
_FEWEST_OUTPUTS = 16  # of a sample's columns
_FEW_ROWS = 1024  # of a window of a tile that is made by products alone, if it may not be the whole tile


Entries = tuple[slice, ...]


@dataclass(frozen=True)
class Window:
    """A part of a tile.

    Attributes:
        rows: Examples of the rows.
        columns: Examples of the columns.
        entries: The positions of their entries in the tile.
    """

    rows: slice
    columns: slice
    entries: Entries


def tile_window_edges(device: torch.device | str) -> tuple[int, int]:
    """Return the kernel rows and columns of a window whose sums are made by `FeatureMap.block_sums`."""
    return (_GPU_WINDOW, _GPU_WINDOW) if torch.device(device).type == "cuda" else (WINDOW_ROWS, WINDOW_COLUMNS)


class Parts(Protocol):
    """Features of a tile's rows and columns, some outputs at a time."""

    def __len__(self) -> int:
        """Return the number of parts."""

    def __iter__(self) -> Iterator[tuple[Rows, Rows]]:
        """Yield the features of rows and columns, one part after the other."""


def tile_estimates(
    features: FeatureMap,
    parts: Parts,
    meeting: Meeting,
    calibration: Calibration | None,
    scale: str,
    *,
    dtype: torch.dtype = torch.float64,
    empty: Callable[..., Tensor] = torch.empty,
) -> dict[str, Tensor]:
    """Compute `plugin`, `unbiased` and `stderr` of one tile, as far as they exist, in the kernel's scale.

    Sums are of float64; results are rounded to `dtype`.

    Args:
        features: The feature map.
        parts: Features of rows and columns, computed or prepared (with standard errors if there is a calibration): all
            outputs or, for `trace`, a few outputs at a time. Several parts keep the sums of the whole tile, and
            each part is released before the next one is made. If rows and columns are the same object, the tile is
            bitwise symmetric, and only its upper triangle is computed.
        meeting: Which pairs of examples meet, and whether outputs are summed.
        calibration: The level of standard errors; None makes none, which saves operations.
        scale: `localized` or `raw`.
        dtype: Of the results.
        empty: Allocates results; called as `torch.empty` is.

    Returns:
        The statistics by name. A standard error is NaN, not 0, if every block gave an entry the same value because no
        draw changed the output of its row or column: the error of that entry is unknown.
    """
    if not len(parts):
        raise ValueError("a tile needs at least one part")
    wanted, symmetric = Wanted(stderr=calibration is not None), False
    totals: dict[int, tuple[Window, BlockSums]] = {}
    result: dict[str, Tensor] = {}
    for part in parts:
        same = part[0] is part[1]
        symmetric = same and not meeting.paired
        place_ = partial(_place_, result, partial(empty, _shape(features, part, meeting), dtype=dtype))
        others = features.prepare(part[1], wanted.on(Side.BOTH if same else Side.COLUMNS))
        rows = others if same else features.prepare(part[0], wanted.on(Side.ROWS))
        products = None if meeting.paired or len(parts) > 1 else features.weighted_products(rows, others, wanted)
        if products is not None and not wanted.stderr and can_multiply_into(products, meeting, dtype):
            result |= _products_alone(features, products, meeting, scale, symmetric=symmetric, empty=empty)
        elif products is None:
            for index, (window, sums) in enumerate(_sums_by_window(features, rows, others, meeting, wanted)):
                if len(parts) == 1:
                    place_(window.entries, _estimates(features, sums, calibration, scale))
                else:
                    totals[index] = window, totals[index][1].add_(sums) if index in totals else sums
        else:
            for entries, sums in _sums_of_products(features, products, meeting, wanted, symmetric=symmetric):
                place_(entries, _estimates(features, sums, calibration, scale))
        del part, rows, others, products  # before the features of the next part are made
    for window, total in totals.values():
        place_(window.entries, _estimates(features, total, calibration, scale))
    if symmetric:
        for values in result.values():
            mirror_(values)
    return result


def _place_(
    result: dict[str, Tensor], empty: Callable[..., Tensor], entries: Entries, values: Mapping[str, Tensor]
) -> None:
    """Copy values to their place in the results, which are allocated when the first value comes."""
    for name, value in values.items():
        if name not in result:
            result[name] = empty(device=value.device)
        result[name][entries] = value


def _sums_by_window(
    features: FeatureMap, rows: Rows, others: Rows, meeting: Meeting, wanted: Wanted
) -> Iterator[tuple[Window, BlockSums]]:
    """Yield windows of a tile, or of its upper triangle, and their sums; rows and columns are prepared."""
    counts = [num_rows(part) for part in (rows, others)]
    edges = tile_window_edges(next(iter(rows.values())).device)
    for window in _windows(counts, edges, _width(features, meeting), paired=meeting.paired, symmetric=rows is others):
        chosen = slice_rows(rows, window.rows), slice_rows(others, window.columns)
        yield window, features.block_sums(*chosen, meeting, wanted)


def _sums_of_products(
    features: FeatureMap, products: Sequence[WeightedProduct], meeting: Meeting, wanted: Wanted, *, symmetric: bool
) -> Iterator[tuple[Entries, BlockSums]]:
    """Yield places in a tile, or in its upper triangle, and their sums."""
    blocks, device = features.num_blocks, products[0].left.device
    groups = features.num_sketch_groups
    form = empty_sums((0, 0), blocks, wanted, pair_blocks=features.pair_blocks, device=device, num_groups=groups)
    sums_of, counts = ProductSums(products, meeting, form), (len(products[0].left), len(products[0].right))
    for window in _windows(counts, sums_of.edges, _width(features, meeting), symmetric=symmetric):
        rows, columns = window.entries
        for stripe, sums in sums_of.stripes(window.rows, window.columns):
            yield (slice(rows.start + stripe.start, rows.start + stripe.stop), columns), sums


def _products_alone(
    features: FeatureMap,
    products: Sequence[WeightedProduct],
    meeting: Meeting,
    scale: str,
    *,
    symmetric: bool,
    empty: Callable[..., Tensor],
) -> dict[str, Tensor]:
    """Compute the statistics of a tile, or of its upper triangle, by products alone; no standard error."""
    factor, width = scale_factor(scale, features.num_parameters), _width(features, meeting)
    shares = {
        name: {each: factor * share for each, share in of.items()}
        for name, of in shares_of_sums(features.num_blocks, pair_blocks=features.pair_blocks).items()
    }
    counts, first = (len(products[0].left), len(products[0].right)), products[0].left
    shape = meeting.shape(*counts, width)
    result = {name: empty(shape, dtype=first.dtype, device=first.device) for name in shares}
    height = _FEW_ROWS if symmetric or meeting.full else shape[0]
    length = _FEW_ROWS if meeting.full else shape[1]  # features with outputs are copied for their products
    for window in _windows(counts, (height, length), width, symmetric=symmetric):
        parts = {name: values[window.entries] for name, values in result.items()}
        multiply_into_(parts, products, meeting, shares, window.rows, window.columns)
    return result


def _width(features: FeatureMap, meeting: Meeting) -> int:
    """Return the kernel rows of an example."""
    return meeting.width(len(features.columns))


def _shape(features: FeatureMap, part: tuple[Rows, Rows], meeting: Meeting) -> tuple[int, ...]:
    """Return the shape of a tile."""
    return meeting.shape(num_rows(part[0]), num_rows(part[1]), len(features.columns))


def _windows(
    counts: Sequence[int], edges: tuple[int, int], width: int, *, paired: bool = False, symmetric: bool = False
) -> Iterator[Window]:
    """Yield windows of at most `edges` kernel rows and columns; of a symmetric tile only its upper triangle."""
    height, length = (max(1, edge // width) for edge in edges)
    for top in range(0, counts[0], height):
        rows = slice(top, min(top + height, counts[0]))
        if paired:
            yield Window(rows, rows, (rows,))
            continue
        for left in range(top if symmetric else 0, counts[1], length):
            columns = slice(left, min(left + length, counts[1]))
            yield Window(rows, columns, tuple(slice(part.start * width, part.stop * width) for part in (rows, columns)))


def _estimates(features: FeatureMap, sums: BlockSums, calibration: Calibration | None, scale: str) -> dict[str, Tensor]:
    """Return the statistics of a window that exist, in float64; an unknown standard error is NaN."""
    result = estimate(sums, calibration)
    factor = scale_factor(scale, features.num_parameters)
    values = {"plugin": result.plugin, "unbiased": result.unbiased, "stderr": result.stderr}
    present = {name: value for name, value in values.items() if value is not None}
    if factor != 1.0:
        present = {name: value * factor for name, value in present.items()}
    if "stderr" in present and features.zero_stderr_is_unresolved:
        present["stderr"] = present["stderr"].masked_fill(present["stderr"] == 0, torch.nan)
    if "stderr" in present and sums.resolved is not None:
        present["stderr"] = present["stderr"].masked_fill(~sums.resolved, torch.nan)
    return present


def calibrate_sample(features: FeatureMap, parts: Iterable[tuple[Rows, Rows]], meeting: Meeting) -> Calibration:
    """Estimate the error of a whole kernel from the features of sampled rows and columns.

    If one pair of examples has very many entries, some of the columns' outputs meet all of the rows': the share of
    entries of an output with itself is then the whole kernel's.

    Args:
        features: The feature map.
        parts: Features of the sampled rows and columns, some outputs at a time.
        meeting: Which pairs of examples meet, and whether outputs are summed.
    """
    chosen = None if features.num_sketch_groups else _sampled_outputs(len(features.columns), meeting)
    meeting = replace(meeting, column_outputs=chosen)
    products: Tensor | None = None
    by_group: Tensor | None = None
    resolved: Tensor | None = None
    changes: list[tuple[Changes, Changes]] = []
    for rows, others in parts:
        others = others if chosen is None else _with_outputs(features, others, chosen)
        product = features.block_products(rows, others, meeting)
        products = product if products is None else products.add_(product)
        if features.num_sketch_groups:
            grouped = features.block_sums(rows, others, meeting, Wanted(stderr=True)).by_group
            by_group = grouped if by_group is None or grouped is None else by_group + grouped
        mask = features.resolved(rows, others, meeting)
        resolved = mask if resolved is None or mask is None else resolved | mask
        if (own := features.changes(rows)) is not None and (other := features.changes(others)) is not None:
            changes.append((own, other))
    if products is None:
        raise ValueError("a sample needs at least one part")
    hidden = None
    if changes:
        left, right = (joined_changes(part) for part in zip(*changes, strict=True))
        hidden = bound_of_unresolved(left, right, meeting, pair_blocks=features.pair_blocks)
    return calibrate(
        products,
        pair_blocks=features.pair_blocks,
        by_group=by_group,
        resolved=resolved,
        zero_is_unresolved=features.zero_stderr_is_unresolved,
        hidden=hidden,
    )


def _sampled_outputs(num_outputs: int, meeting: Meeting) -> tuple[int, ...] | None:
    """Return the columns' outputs of the sample, evenly spaced; None for all."""
    count = max(_FEWEST_OUTPUTS, 4 * SAMPLE_ENTRIES // num_outputs)
    if not meeting.full or count >= num_outputs:
        return None
    return tuple(index * num_outputs // count for index in range(count))


def _with_outputs(features: FeatureMap, rows: Rows, outputs: Sequence[int]) -> Rows:
    """Return the features of some outputs."""
    axes = {spec.name: 1 + spec.axes.index("output") for spec in features.arrays if "output" in spec.axes}
    index = torch.tensor(outputs, device=next(iter(rows.values())).device)
    return {name: array.index_select(axes[name], index) if name in axes else array for name, array in rows.items()}


def scale_factor(scale: str, num_parameters: int) -> float:
    """Return the factor from a localized kernel to a scale: `raw` is localized / P²."""
    return num_parameters**-2 if scale == "raw" else 1.0


def mirror_(values: Tensor) -> None:
    """Copy the upper triangle of a square matrix onto the lower, in place, in pieces that stay in the cache.

    This makes it bitwise symmetric; the products of a row set with itself need not be.
    """
    edges = [*range(0, len(values), WINDOW_ROWS), len(values)]
    for top, bottom in pairwise(edges):
        square = values[top:bottom, top:bottom]
        square.copy_(square.triu() + square.triu(1).T)
        for left, right in pairwise(edges):
            if left >= bottom:
                values[left:right, top:bottom] = values[top:bottom, left:right].T
