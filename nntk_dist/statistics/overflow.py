"""Kernel entries that a dtype cannot hold: an error that names rows, in place of infinity or NaN.

Axes: n1, n2 examples of a tile; `full` kernels are indexed i·C + c.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from nntk_dist.errors import ModelError


def check_no_overflow(
    values: Float[Tensor, "n1 ..."], rows: tuple[str, int], columns: tuple[str, int], width: int = 1
) -> None:
    """Check that all entries of a kernel, or of a tile of it, are finite.

    Features are checked where they are made; products of large finite ones can still overflow. Costs one pass over the
    entries.

    Args:
        values: the entries, (n1·C, n2·C), or (n1, …) of pairs of a row with itself.
        rows: what the rows are called, and the number of the first one.
        columns: the same for columns.
        width: C, the kernel rows of an example.

    Raises:
        ModelError: an entry is infinite or NaN; the message names the first one's examples.
    """
    if math.isfinite(float(values.sum())):
        return
    bad = (~torch.isfinite(values)).nonzero()
    if not len(bad):
        return
    first = bad[0].tolist()
    row = first[0] // width if values.ndim == 2 else first[0]
    column = first[1] // width if values.ndim == 2 else row
    raise ModelError(
        f"{len(bad)} of {values.numel()} kernel entries overflow {str(values.dtype).removeprefix('torch.')}, the first "
        f"between row {rows[1] + row} of {rows[0]} and row {columns[1] + column} of {columns[0]}: the outputs or "
        "gradients of these examples are too large to be multiplied; check the scale of these rows and of the model, "
        "or compute in float64"
    )
