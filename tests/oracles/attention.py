"""Weights of draws by their definition: dense queries and keys, one draw and one example after the other, in NumPy.

It draws nothing: perturbations and, for the score of parameters, the matrices are arguments. Products are computed
without algebraic shortcuts.

Axes: S draws, R blocks, n examples, C outputs, P parameters, k numbers of a query or key.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

Array = np.ndarray
Function = Callable[[Array], Array]


def parameter_scores(
    query: Float[Array, "k P"], key: Float[Array, "k P"], theta: Float[Array, " P"], z: Float[Array, "S P"]
) -> Float[Array, " S"]:
    """⟨Qθ, Kθ_s⟩/√k."""
    return np.array([float(np.dot(query @ theta, key @ (theta + each))) / np.sqrt(len(query)) for each in z])


def output_scores(
    function: Function, theta: Array, z: Float[Array, "S P"], own: Function | None = None
) -> Float[Array, "S *n"]:
    """−mean |f(x_i;θ_s) − f(x_i;θ)|²/m, m = mean |f(x_i;θ)|², over the examples of `function`; of each example of `own`
    its own distance, m as before.
    """
    base = function(theta)
    mean_square = np.mean([np.dot(row, row) for row in base])
    examined = function if own is None else own
    centre = examined(theta)
    scores = np.array(
        [[-np.sum((a - b) ** 2) for a, b in zip(examined(theta + each), centre, strict=True)] for each in z]
    )
    return scores.mean(1) / mean_square if own is None else scores / mean_square


def loss_scores(
    function: Function, theta: Array, z: Float[Array, "S P"], targets: Int[Array, " n"] | Float[Array, "n C"]
) -> Float[Array, " S"]:
    """Minus the mean cross-entropy for labels, minus the mean squared error for numbers."""
    scores = []
    for each in z:
        outputs = function(theta + each)
        if targets.dtype.kind == "f":
            scores.append(-np.mean((outputs - targets) ** 2))
            continue
        probabilities = [np.exp(row)[label] / np.exp(row).sum() for row, label in zip(outputs, targets, strict=True)]
        scores.append(np.mean(np.log(probabilities)))
    return np.array(scores)


def weighted(
    draws: Float[Array, "S n C P"], scores: Float[Array, "S *n"], block: Int[Array, " S"], temperature: float
) -> Float[Array, "S n C P"]:
    """B·α_s(x)·g_s(x), so that means over a block are Σ α_s g_s, α = softmax of score/τ over the draws of the block."""
    result = np.empty_like(draws)
    for r in np.unique(block):
        members = np.flatnonzero(block == r)
        for i in range(draws.shape[1]):
            own = scores[members] if scores.ndim == 1 else scores[members, i]
            weights = np.exp(own / temperature)
            weights /= weights.sum()
            result[members, i] = len(members) * weights[:, None, None] * draws[members, i]
    return result
