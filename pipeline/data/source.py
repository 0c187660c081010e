"""The interface between the families of sources and the loader: all targets together, inputs row by row on demand.

A family locates and reads rows; the loader selects, labels, checks and normalises.

Axes: n examples, rows of a source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64, Shaped

from nntk_dist.errors import DataError

# One array of examples; or several, a dict or tuple, such as token ids and a mask.
Inputs = np.ndarray | Mapping[str, np.ndarray] | tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class SourceRows:
    """The rows of one file or array.

    Attributes:
        name: names them in messages.
        targets: of all rows, as the source holds them.
        read: maps row indices, in any order, to their inputs.
    """

    name: str
    targets: Shaped[np.ndarray, "rows *target_shape"]
    read: Callable[[Int64[np.ndarray, " n"]], Inputs]


@dataclass(frozen=True)
class Source:
    """A source of examples.

    Attributes:
        train: the training set, or the only set, which the loader splits.
        test: the test set; None if the source has one set.
    """

    train: SourceRows
    test: SourceRows | None


class OpenSource(Protocol):
    """A family of sources: opens one by its location, with the options that its signature names."""

    def __call__(self, location: str, /, **options: Any) -> Source:
        """Open the source.

        Args:
            location: what follows the colon in `data.source`.
            **options: `input_columns`, `target_column` and the entries of `data.args`, as far as they are given.

        Raises:
            DataError: the data are missing, damaged or malformed.
        """


def existing_path(location: str, *, what: str) -> Path:
    """Return the path that `location` names, with `~` expanded.

    Args:
        location: a path.
        what: names the source in the message.

    Raises:
        DataError: the path does not exist.
    """
    path = Path(location).expanduser()
    if not location or not path.exists():
        raise DataError(f"{what}: '{location}' does not exist (looked in '{Path.cwd()}'); give the path of the data")
    return path
