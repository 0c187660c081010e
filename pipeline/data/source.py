"""The interface between the families of sources and the loader: targets at once, inputs row by row when asked.

A family says where rows lie and how to read them; selecting, labelling, checking and normalising are not its business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from nntk_dist.errors import NNTKError


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one file or array.

    Attributes:
        name: for messages.
        targets: of all rows, as the source holds them.
        read: from row indices, in any order, to their inputs.
    """

    name: str
    targets: Shaped[np.ndarray, "rows *target_shape"]
    read: Callable[[Int64[np.ndarray, " n"]], Shaped[np.ndarray, "n *input_shape"]]


@dataclass(frozen=True)
class Source:
    """A source of examples: one set of rows, or a training and a test set as given (`test` is then not None)."""

    train: Rows
    test: Rows | None


def existing_path(location: str, *, what: str) -> Path:
    """The path that `location` names, `~` expanded.

    Raises:
        NNTKError: there is nothing at it.
    """
    path = Path(location).expanduser()
    if not location or not path.exists():
        raise NNTKError(f"{what}: '{location}' does not exist (looked in '{Path.cwd()}'); give the path of the data")
    return path
