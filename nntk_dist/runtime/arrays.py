"""Tensors from NumPy arrays of any memory layout and byte order."""

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
    if values.ndim < 1 or len(values) == 0:
        raise ArgumentError(f"{name} is shape {tuple(values.shape)}; allowed: {allowed}")
    if isinstance(values, Tensor):
        return values
    try:
        return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise ArgumentError(f"{name} has dtype {values.dtype}; allowed: {allowed}, of numbers or booleans") from None


def _shown(values: object) -> str:
    text = repr(values)
    return text if isinstance(values, int | float | list | tuple) and len(text) <= 40 else type(values).__name__
