"""The values of f on a few rows, by which a changed model is noticed although its parameters are the same.

Values, not a hash of them: another processor, number of threads or version of torch changes the last bits. Two sets of
values agree to a tolerance that follows from the precision in which the model computes. A fingerprint is a hash, so a
continued run takes over the stored values once its own agree with them. Nothing is computed here.

Axes: e evaluations (at θ and at perturbed parameters), n rows, k numbers of an output.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool


@dataclass(frozen=True)
class FunctionValues:
    """What a model and the score of a kernel's draws return for a few rows.

    Attributes:
        precision: the coarsest floating-point type in which the model computes, such as `float64`.
        outputs: numbers of f, (e, n, k).
        scores: the scores of a draw; none if all draws have the same weight.

    Example:
        >>> stored = FunctionValues("float64", (((0.5,), (1.0,)),), ())
        >>> stored.difference(FunctionValues("float64", (((0.5,), (1.0 + 1e-12,)),), ())) is None
        True
        >>> stored.difference(FunctionValues("float64", (((0.5,), (0.7,)),), ()))
        'f has other values on 1 of 2 rows (they differ by up to 30 % of its largest value)'
    """

    precision: str
    outputs: tuple[tuple[tuple[float, ...], ...], ...]
    scores: tuple[float, ...]

    @property
    def tolerance(self) -> float:
        """The largest relative difference of equal functions: the square root of the rounding error."""
        return float(torch.finfo(getattr(torch, self.precision)).eps) ** 0.5

    def difference(self, other: "FunctionValues") -> str | None:
        """Say in which values another function differs from this one; None if it does not."""
        mine, others = np.array(self.outputs), np.array(other.outputs)
        if mine.shape != others.shape:
            return f"f has {others.shape[-1]} outputs instead of {mine.shape[-1]}"
        scale = np.abs(mine).max(axis=(0, 1))
        rows = np.any(_differs(mine, others, scale, self.tolerance), axis=(0, 2))
        if rows.any():
            share = float((np.abs(others - mine) / np.where(scale > 0, scale, 1.0)).max())
            return (
                f"f has other values on {rows.sum()} of {len(rows)} rows (they differ by up to {100 * share:.3g} % of "
                "its largest value)"
            )
        scores, other_scores = np.array(self.scores), np.array(other.scores)
        if scores.shape != other_scores.shape:
            return "the weighting gives another number of scores"
        if _differs(scores, other_scores, np.abs(scores).max(initial=0.0), self.tolerance).any():
            return f"the weighting gives the score {other.scores[0]:.6g} where it gave {self.scores[0]:.6g}"
        return None


def _differs(mine: np.ndarray, others: np.ndarray, scale: np.ndarray, tolerance: float) -> Bool[np.ndarray, "..."]:
    return ~(np.abs(others - mine) <= tolerance * scale)
