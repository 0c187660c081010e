"""The precision of float32 matrix products: coarser only where a tile is multiplied, as the configuration allows.

Axes: none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FULL = "highest"  # what models are evaluated and differentiated at


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Float32 products at a precision of `torch.set_float32_matmul_precision` meanwhile."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
