"""The data as the rest of the pipeline sees them: plain arrays, selected, labelled and normalised.

Axes: n examples of one split, T targets of one example.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Num

from nntk_dist.models.structured import Layout


@dataclass(frozen=True, eq=False)
class Split:
    """The examples of one split.

    Attributes:
        ids: row of each example in its source, or in its own file if the source has two sets.
        inputs: the examples: float32; or whole numbers, such as token ids, in their own type; or rows of bytes, which
            `Dataset.layout` describes.
        targets: labels 0 … C-1, or real values.
    """

    ids: Int64[np.ndarray, " n"]
    inputs: Num[np.ndarray, "n *input_shape"]
    targets: Int64[np.ndarray, " n"] | Float64[np.ndarray, "n T"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set, with the same normalisation.

    Attributes:
        train: at least one example.
        test: possibly no example.
        num_classes: C, or None for regression.
        mean: subtracted from each channel; zeros if the data are not normalised.
        deviation: each channel is divided by it; ones if it is constant or the data are not normalised.
        layout: the parts of an example, if the source has several; None for one array.
    """

    train: Split
    test: Split
    num_classes: int | None
    mean: Float64[np.ndarray, " channels"]
    deviation: Float64[np.ndarray, " channels"]
    layout: Layout | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, or of its first part if it has several."""
        return self.train.inputs.shape[1:] if self.layout is None else self.layout.parts[0].shape

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shape of each part of an example by its name, or place in a tuple; None if it has no parts."""
        return None if self.layout is None else {part.name: part.shape for part in self.layout.parts}

    @property
    def num_outputs(self) -> int:
        """Number of outputs that a model needs: one for each class or real target."""
        return self.train.targets.shape[1] if self.num_classes is None else self.num_classes
