"""The values of f, of scores and of draws, by which changed code is noticed although all parameters are the same.

Values, not a hash of them: another processor, number of threads or version of torch changes the last bits. Two sets of
values agree to a tolerance that follows from the precision in which the model computes. A fingerprint is a hash, so a
continued run takes over the stored values once its own agree with them. Nothing is computed here.

Axes: e evaluations (at θ and at perturbed parameters), n rows, k numbers of an output.
"""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool

_FURTHER = MappingProxyType(
    {
        "scores": "the weighting gives other scores",
        "gradient": "f has the same values and another gradient",
        "draw": "the distribution gives other draws",
    }
)


@dataclass(frozen=True)
class FunctionValues:
    """What a model, the score of draws and their distribution return for a few rows.

    Attributes:
        precision: the coarsest floating-point type in which the model computes, such as `float64`.
        outputs: numbers of f, (e, n, k); e is 1 if f cannot be evaluated at perturbed parameters.
        scores: the scores of a draw; none if all draws have the same weight.
        gradient: numbers of the gradient of f; none if f has no gradient.
        draw: numbers of the first draw.

    Example:
        >>> stored = FunctionValues("float64", (((0.5,), (1.0,)),))
        >>> stored.difference(FunctionValues("float64", (((0.5,), (1.0 + 1e-12,)),))) is None
        True
        >>> stored.difference(FunctionValues("float64", (((0.5,), (0.7,)),)))
        'f has other values on 1 of 2 rows (they differ by up to 30 % of its largest value)'
    """

    precision: str
    outputs: tuple[tuple[tuple[float, ...], ...], ...]
    scores: tuple[float, ...] = ()
    gradient: tuple[float, ...] = ()
    draw: tuple[float, ...] = ()

    @property
    def tolerance(self) -> float:
        """The largest relative difference of equal functions: the square root of the rounding error."""
        return float(torch.finfo(getattr(torch, self.precision)).eps) ** 0.5

    def difference(self, other: "FunctionValues") -> str | None:
        """Say in which values another function differs from this one; None if it does not."""
        mine, others = np.array(self.outputs), np.array(other.outputs)
        if mine.shape[1:] != others.shape[1:]:
            return f"f has {others.shape[-1]} outputs instead of {mine.shape[-1]}"
        if len(mine) != len(others):
            return "f can be evaluated at other parameters than before"
        scale = np.abs(mine).max(axis=(0, 1))
        rows = np.any(_differs(mine, others, scale, self.tolerance), axis=(0, 2))
        if rows.any():
            share = float((np.abs(others - mine) / np.where(scale > 0, scale, 1.0)).max())
            return (
                f"f has other values on {rows.sum()} of {len(rows)} rows (they differ by up to {100 * share:.3g} % of "
                "its largest value)"
            )
        for name, said in _FURTHER.items():
            mine, others = np.array(getattr(self, name)), np.array(getattr(other, name))
            scale = np.abs(mine).max(initial=0.0)
            if mine.shape != others.shape or _differs(mine, others, scale, self.tolerance).any():
                return f"{said} ({_shown(others)} instead of {_shown(mine)})"
        return None


def _shown(values: np.ndarray) -> str:
    return f"{values[0]:.6g}, …" if len(values) > 1 else f"{values[0]:.6g}" if len(values) else "none"


def _differs(mine: np.ndarray, others: np.ndarray, scale: np.ndarray, tolerance: float) -> Bool[np.ndarray, "..."]:
    return ~(np.abs(others - mine) <= tolerance * scale)
