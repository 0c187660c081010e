"""The explicit factor of a kernel: from features and metric to rows of W with `gram = W Wᵀ`.

Two kinds of features are such factors: output differences with a metric of the draws
(`nntk_dist.estimators.output_differences`), and sketches of the gradients of all blocks
(`nntk_dist.layers.sketches.sketch`).
Everything is float64. Nothing is read here, and nothing but the metric is decomposed.

Axes: n examples, s draws, r blocks, c outputs, k columns of a sketch, F columns of W. A kernel of form `full` has C
rows for each example, any other has one.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# Up to here the S × S metric of differences (128 MiB) is cheap, and differences are what other programs read.
METRIC_DRAWS = 4096
WITH_FACTOR = (
    f"kernels of 'kind: covariance' of up to {METRIC_DRAWS:,} draws, of 'estimator: weight' of as many or of fewer "
    "draws than blocks times parameters, and those that 'estimator: autodiff' sketches as a whole ('contraction: "
    "sketch') have one"
)
DRAWS, SKETCHES = "draw", "block"  # the first axis behind the rows, of differences and of sketches


@dataclass(frozen=True)
class FactorForm:
    """The axes of features that are an explicit factor.

    Attributes:
        axes: Names of the axes behind the row axis: ("draw", "output") for differences; ("block", "output", "column")
            for sketches, or ("block", "column") for sketches that all outputs share.
        shape: Lengths of these axes.
        full: Whether each output has its own kernel row.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    full: bool

    @property
    def is_sketch(self) -> bool:
        """Whether features are sketches, whose metric is constant, and not differences."""
        return self.axes[0] == SKETCHES

    @property
    def rows_per_example(self) -> int:
        """Kernel rows of one example."""
        return self.shape[1] if self.full else 1

    @property
    def num_columns(self) -> int:
        """F for a metric of full rank."""
        return math.prod(self.shape[1:] if self.is_sketch else self.shape) // self.rows_per_example

    def num_columns_with(self, root: Float[np.ndarray, "s s2"]) -> int:
        """Return F for a root of the metric, which has as many columns as M has rank."""
        return self.num_columns if self.is_sketch else self.num_columns // len(root) * root.shape[1]

    def columns(self, features: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "rows F"]:
        """Return Φ of some examples: differences with the draw last, or sketches summed over blocks."""
        if self.is_sketch:
            return np.sum(features, axis=1, dtype=np.float64).reshape(len(features) * self.rows_per_example, -1)
        by_output = np.ascontiguousarray(features.transpose(0, 2, 1), dtype=np.float64)
        return by_output.reshape(len(features) * self.rows_per_example, -1)

    def root(self, metric: Float[np.ndarray, "s s"]) -> Float[np.ndarray, "s s2"]:
        """Return a root of M, `M = root rootᵀ`, with as many columns as M has rank; (1, 1) for sketches."""
        if self.is_sketch:
            return np.sqrt(metric[:1, :1])
        if not np.any(metric - np.diag(np.diagonal(metric))):
            return np.diag(np.sqrt(np.diagonal(metric)))
        values, vectors = np.linalg.eigh(metric)
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1]  # M is positive semidefinite to rounding
        return vectors[:, kept] * np.sqrt(values[kept])

    def rows(self, features: Float[np.ndarray, "n ..."], root: Float[np.ndarray, "s s2"]) -> np.ndarray:
        """Return W of some examples: `W = Φ·root`, output by output."""
        columns = self.columns(features)
        if self.is_sketch:
            return columns * root[0, 0]
        return (columns.reshape(-1, len(root)) @ root).reshape(len(columns), -1)


def unbiased_metric(metric: Float[np.ndarray, "s s"], num_blocks: int) -> Float[np.ndarray, "s s"]:
    """Return the metric of `unbiased` from the metric of `plugin`: products within a block do not count."""
    block = np.arange(len(metric)) // (len(metric) // num_blocks)
    return np.where(block[:, None] == block[None, :], 0.0, metric) * (num_blocks / (num_blocks - 1))
