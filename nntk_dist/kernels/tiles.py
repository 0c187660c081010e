"""The whole kernel from features, tile by tile.

Features of all rows are held in memory if they fit. Otherwise each tile computes the features of its rows, some outputs
at a time (`ComputedRows`), so that memory does not grow with the number of outputs.

Axes: n1, n2 rows; `full` kernels are indexed i·C + c, C outputs.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nntk_dist.errors import ArgumentError
from nntk_dist.products.features import FeatureMap, Rows, num_rows, slice_rows
from nntk_dist.products.wanted import Wanted
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from nntk_dist.spec import KernelSpec, Kind
from nntk_dist.statistics.standard_errors import Calibration, Estimates, sample_entries, sample_limit
from nntk_dist.statistics.tile_estimates import Parts, calibrate_sample, tile_estimates

_TILE_ROWS = 1024
_LOCAL_TILES, _LEAST_LOCAL_ROWS = 4, 128  # tiles a side: ten of the sixteen of a symmetric kernel are computed
_HELD_SHARE = 4  # features take at most this part of the memory; if they need more, each tile computes its own

Selection = slice | Tensor


class RowSets(Protocol):
    """The features of a kernel's rows and columns, held or computed when they are asked for."""

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of examples, n1 and n2."""

    @property
    def symmetric(self) -> bool:
        """Whether rows and columns are the same examples."""

    def meeting(self, columns: Selection, wanted: Wanted | None = None) -> Callable[[Selection], Parts]:
        """Return a function from some rows to the features of them and of these columns.

        If rows are the columns, they are the same object. With `wanted`, columns may be prepared, once for all rows.
        """


@dataclass(frozen=True, eq=False)
class HeldRows:
    """Features of all rows, in memory; `others` are the columns, None if they are the rows."""

    features: FeatureMap
    rows: Rows
    others: Rows | None

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of examples."""
        return num_rows(self.rows), num_rows(self.rows if self.others is None else self.others)

    @property
    def symmetric(self) -> bool:
        """Whether rows and columns are the same examples."""
        return self.others is None

    def meeting(self, columns: Selection, wanted: Wanted | None = None) -> Callable[[Selection], Parts]:
        """Return a function from some rows to one part with all outputs."""
        right = slice_rows(self.rows if self.others is None else self.others, columns)
        prepared = right if wanted is None else self.features.prepare(right, wanted)

        def parts(rows: Selection) -> list[tuple[Rows, Rows]]:
            return [(prepared if self.symmetric and rows is columns else slice_rows(self.rows, rows), prepared)]

        return parts


@dataclass(frozen=True, eq=False)
class ComputedRows:
    """Features that are computed when they are asked for, some outputs at a time.

    Attributes:
        compute: from examples, their numbers and outputs to features.
        inputs: x1, or x1 and x2, each with the numbers of its examples.
        portions: the outputs of each part.
    """

    compute: Callable[[Tensor, Tensor, tuple[int, ...]], Rows]
    inputs: Sequence[tuple[Tensor, Tensor]]
    portions: Sequence[tuple[int, ...]]

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of examples."""
        return len(self.inputs[0][0]), len(self.inputs[-1][0])

    @property
    def symmetric(self) -> bool:
        """Whether rows and columns are the same examples."""
        return len(self.inputs) == 1

    def meeting(self, columns: Selection, wanted: Wanted | None = None) -> Callable[[Selection], Parts]:
        """Return a function from some rows to one part for each portion of the outputs."""
        return lambda rows: _ComputedParts(self, rows, columns)


@dataclass(frozen=True, eq=False)
class _ComputedParts:
    source: ComputedRows
    rows: Selection
    columns: Selection

    def __len__(self) -> int:
        return len(self.source.portions)

    def __iter__(self) -> Iterator[tuple[Rows, Rows]]:
        (x1, ids1), (x2, ids2) = self.source.inputs[0], self.source.inputs[-1]
        for portion in self.source.portions:
            right = self.source.compute(x2[self.columns], ids2[self.columns], portion)
            same = self.source.symmetric and self.rows is self.columns
            yield right if same else self.source.compute(x1[self.rows], ids1[self.rows], portion), right


def output_portions(
    features: FeatureMap, num_rows: int, item_bytes: int, *, full: bool, limit: int
) -> list[tuple[int, ...]] | None:
    """Divide the outputs so that the features of two row sets of a tile fit into some memory.

    Args:
        features: the feature map.
        num_rows: the rows of the kernel, and its columns if they are others.
        item_bytes: the bytes of a number.
        full: whether every pair of outputs has an entry: then all are needed at once.
        limit: the memory in bytes.

    Returns:
        The outputs of each portion; None if the features of all rows and outputs fit.
    """
    numbers = sum(array.num_numbers for array in features.arrays)
    if num_rows * item_bytes * numbers <= limit:
        return None
    carrying = sum(array.num_numbers for array in features.arrays if "output" in array.axes)
    outputs, of_tile = features.columns, min(num_rows, 2 * _TILE_ROWS) * item_bytes * carrying
    step = len(outputs) if full else max(1, len(outputs) * limit // max(1, of_tile))
    return [tuple(outputs[i : i + step]) for i in range(0, len(outputs), step)]


def feature_limit(device: torch.device) -> int:
    """Return the bytes that features may take: a quarter of the memory of the machine, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // _HELD_SHARE
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _HELD_SHARE
    except (AttributeError, ValueError, OSError):  # not on this system
        return 2 << 30


def whole_kernel(features: FeatureMap, source: RowSets, spec: KernelSpec) -> tuple[Estimates, Calibration | None]:
    """Return the whole kernel from the features of all rows, tile by tile.

    With one row set, the upper triangle is computed and mirrored.

    Args:
        features: what the features are.
        source: the features of rows and columns.
        spec: the kernel.

    Returns:
        The estimates, and their calibration if there are enough blocks for error bars.
    """
    symmetric, (n1, n2) = source.symmetric, source.shape
    width = len(features.columns) if spec.meeting.full else 1
    _check_fits(n1 * width, n2 * width, features, width)
    calibration = None
    if features.num_blocks >= MINIMUM_BLOCKS:
        rows, columns = sample_entries(spec.seed, n1, n2, sample_limit(width))
        calibration = calibrate_sample(features, source.meeting(columns)(rows), spec.meeting)
    edge = _TILE_ROWS
    if symmetric and spec.kind == Kind.LOCAL:
        edge = min(edge, max(_LEAST_LOCAL_ROWS, -(-n1 // _LOCAL_TILES)))
    wanted, parts = Wanted(stderr=calibration is not None), dict[str, Tensor]()
    for j in range(0, n2, edge):
        chosen = slice(j, j + edge)
        parts_of = source.meeting(chosen, wanted)
        for i in range(0, j + 1 if symmetric else n1, edge):
            own = parts_of(chosen if symmetric and i == j else slice(i, i + edge))
            tile = tile_estimates(features, own, spec.meeting, calibration, spec.scale)
            for name, values in tile.items():
                whole = parts.setdefault(name, values.new_empty(n1 * width, n2 * width))
                _place(whole, values, i * width, j * width)
                if symmetric and i != j:
                    _place(whole, values.T, j * width, i * width)
    return Estimates(parts["plugin"], parts.get("unbiased"), parts.get("stderr")), calibration


def _check_fits(num_rows: int, num_columns: int, features: FeatureMap, width: int) -> None:
    """Refuse a kernel that the memory cannot hold, before anything of it is computed.

    Raises:
        ArgumentError: it is too large.
    """
    statistics = (2 if features.pair_blocks else 1) + (features.num_blocks >= MINIMUM_BLOCKS)
    needed, memory = 8 * num_rows * num_columns * statistics, _HELD_SHARE * feature_limit(torch.device("cpu"))
    if needed > memory:
        fewer = "outputs: trace, fewer examples" if width > 1 else "fewer examples"
        raise ArgumentError(
            f"x1 and x2 give a kernel of {num_rows:,} x {num_columns:,} entries, which take {needed / 2**30:.3g} GiB "
            f"with all statistics, and this machine has {memory / 2**30:.3g}; allowed: {fewer}, or a run (nntk run), "
            "which writes the kernel tile by tile"
        )


def _place(whole: Tensor, values: Tensor, row: int, column: int) -> None:
    whole[row : row + values.shape[0], column : column + values.shape[1]] = values
