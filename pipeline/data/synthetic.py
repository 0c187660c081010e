"""One-dimensional regression problems on [-1, 1], without noise.

Example i of 65,536 is the midpoint x_i = (2i + 1)/65536 - 1 of a fixed grid, so an id means the same point under every
seed and size; a seeded selection of rows is then a uniform sample without repetition, and x = 0, where `sign` and
`relu` are not smooth, is never hit.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float64

from nntk_dist.errors import check_choice
from pipeline.data.arrays import source_from_arrays
from pipeline.data.source import Source

GRID_POINTS = 65_536

FUNCTIONS: Mapping[str, Callable[[Float64[np.ndarray, " n"]], Float64[np.ndarray, " n"]]] = MappingProxyType(
    {
        "sign": np.sign,
        "sawtooth": lambda x: 2 * np.mod(2 * x, 1) - 1,  # rises from -1 to 1 four times, jumps at -1/2, 0 and 1/2
        "relu": lambda x: np.maximum(x, 0),
        "sine": lambda x: np.sin(2 * np.pi * x),
    }
)


def open_synthetic(name: str) -> Source:
    """The grid with the values of that function as its targets, not split.

    Raises:
        NNTKError: an unknown name.
    """
    check_choice("function of synthetic:", name, FUNCTIONS)
    x = (2 * np.arange(GRID_POINTS) + 1) / GRID_POINTS - 1
    return source_from_arrays({"x": x, "y": FUNCTIONS[name](x)}, what=f"synthetic:{name}")
