"""Tensors from NumPy arrays of any memory layout and byte order, and the magnitudes of their rows.

Axes: n examples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nntk_dist.errors import ArgumentError


def as_examples(values: Any, name: str, allowed: str = "a tensor or NumPy array") -> Tensor:
    """Return values as a tensor with one example or more along its first axis.

    A NumPy array is copied, so that negative strides, read-only memory and the other byte order are all accepted.

    Args:
        values: a tensor or NumPy array.
        name: the argument's name, with which messages begin.
        allowed: what is allowed, for messages.

    Raises:
        ArgumentError: it is neither, it has no examples, or torch has no such dtype.

    Example:
        >>> as_examples(np.arange(3.0)[::-1], "x1")
        tensor([2., 1., 0.], dtype=torch.float64)
    """
    allowed = f"{allowed} with one example or more along its first axis"
    if not isinstance(values, Tensor | np.ndarray):
        raise ArgumentError(f"{name} is {_shown(values)}; allowed: {allowed}")
    if isinstance(values, Tensor) and (values.is_nested or values.is_meta or values.layout != torch.strided):
        form = "nested" if values.is_nested else "without values" if values.is_meta else "sparse"
        raise ArgumentError(f"{name} is a tensor that is {form}; allowed: {allowed}, dense")
    if values.ndim < 1 or len(values) == 0:
        raise ArgumentError(f"{name} is shape {tuple(values.shape)}; allowed: {allowed}")
    if isinstance(values, Tensor):
        return values
    try:
        return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise ArgumentError(f"{name} has dtype {values.dtype}; allowed: {allowed}, of numbers or booleans") from None


def magnitude_caution(
    x: Tensor, name: str, *, rows: Sequence[int] | np.ndarray | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Say which row is too large for the others, if one is: what is summed or normalised with it loses them.

    That is a row whose largest number exceeds the median row's by more than 1/ε of the dtype.

    Args:
        x: examples, (n, …).
        name: what they are called, with which the caution begins.
        rows: the numbers of the rows, if they do not count from 0.
        dtype: the dtype that holds them later, if not their own.

    Example:
        >>> magnitude_caution(torch.tensor([[1.0], [2.0], [3.0]]), "x1") is None
        True
    """
    if not x.is_floating_point() or not x.numel():
        return None
    flat, dtype = x.reshape(len(x), -1), dtype or x.dtype
    largest = torch.maximum(flat.amax(1), -flat.amin(1)).double()
    median, (top, row) = float(largest.median()), largest.max(0)
    ratio = float(top) / median if median > 0 else 0.0
    if not ratio > 1.0 / torch.finfo(dtype).eps:
        return None
    number = int(row) if rows is None else int(rows[int(row)])
    return (
        f"{name}: row {number} holds numbers up to {float(top):.3g}, {ratio:.2g} times those of the median row, "
        f"which {str(dtype).removeprefix('torch.')} cannot hold together; sums and norms over rows lose the others to "
        "rounding. Check that row"
    )


def _shown(values: object) -> str:
    text = repr(values)
    return text if isinstance(values, int | float | list | tuple) and len(text) <= 40 else type(values).__name__
