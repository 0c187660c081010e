"""One-dimensional regression problems on [-1, 1], without noise.

Example i of 65,536 is the midpoint x_i = (2i + 1)/65536 - 1 of a fixed grid, so an id means the same point for every
seed and size. A seeded selection of rows is a uniform sample without repetition; it never contains x = 0, at which
`sign` and `relu` are not smooth.

Axes: n examples.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float64

from nntk_dist.errors import check_choice
from pipeline.data.families.arrays import source_from_arrays
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


def open_synthetic(location: str) -> Source:
    """Open the grid with the values of a function as its targets, as one set.

    Args:
        location: a key of `FUNCTIONS`.

    Raises:
        ArgumentError: the name is unknown.
    """
    check_choice("function of synthetic:", location, FUNCTIONS)
    x = (2 * np.arange(GRID_POINTS) + 1) / GRID_POINTS - 1
    return source_from_arrays({"x": x, "y": FUNCTIONS[location](x)}, what=f"synthetic:{location}")
