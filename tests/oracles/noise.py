"""Kernels of single units with noise, by enumeration of masks and by quadrature: no sampling, no library.

Dropout of the inputs of a unit: f(x; θ, m) = φ(θ·(m∘x)/(1 − p)). Under one mask it is a unit at other inputs, so every
expectation over masks is a sum of 2^P closed forms. Gaussian perturbations only.

Axes: n examples, P parameters (and inputs), m masks.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from scipy import special

from tests.oracles import closed_forms

Array = np.ndarray


def masked_inputs(x: Array, p: float) -> Iterator[tuple[float, Array]]:
    """The probability of every mask, and the masked inputs, (n, P)."""
    for mask in itertools.product((0, 1), repeat=x.shape[1]):
        kept = sum(mask)
        yield (1 - p) ** kept * p ** (len(mask) - kept), x * np.array(mask) / (1 - p)


def dropout_gradient(unit: str, theta: Array, x: Array, gamma: float, p: float) -> Array:
    """E_m g(x): the nonlocal gradient of the mean function, (n, P)."""
    parts = masked_inputs(x, p)
    each = [chance * closed_forms.nonlocal_gradient(unit, theta, inputs, gamma) for chance, inputs in parts]
    return np.sum(each, axis=0)


def dropout_kernel(kind: str, unit: str, theta: Array, x: Array, gamma: float, p: float) -> Array:
    """nonlocal: ⟨E g, E g'⟩; covariance and averaged: means of the masks' kernels, (n, n)."""
    if kind == "nonlocal":
        gradient = dropout_gradient(unit, theta, x, gamma, p)
        return gradient @ gradient.T
    kernel = {"covariance": closed_forms.covariance_kernel, "averaged": closed_forms.averaged_kernel}[kind]
    total = np.zeros((len(x), len(x)))
    for chance, inputs in masked_inputs(x, p):
        if inputs.any():  # a unit without inputs is constant
            total += chance * kernel(unit, theta, inputs, inputs, gamma)
    return total


def dropout_local_kernel(unit: str, theta: Array, x: Array, p: float) -> Array:
    """⟨E ∇f, E ∇f'⟩, the ordinary kernel of the mean function, (n, n)."""
    gradient = sum(chance * closed_forms.local_gradient(unit, theta, inputs) for chance, inputs in masked_inputs(x, p))
    return gradient @ gradient.T


def brownian_covariance(theta: Array, x: Array, gamma: float, sigma: float) -> Array:
    """P·E[Δ Δ'/|z|²] of relu(u) + σB(u), u = θ·x, (n, n): the relu's and σ² times the paths'; P of 3 or more.

    E over paths of (B(u+a) − B(u))(B(u'+a') − B(u')) is the length of the intersection of the intervals from u to u + a
    and from u' to u' + a', negative if they run in opposite directions. It is |a| for equal intervals. With z = s n,
    E[h/|n|²] = ∫₀¹ σ^(P−3) E[h(σn)] dσ, and h sees n in the plane of x and x' alone: radii q = σr there have the weight
    q ∫ σ^(P−5) exp(−q²/2σ²) dσ. Over a grid of radii and angles; relative accuracy 1e-4.
    """
    num_parameters, s = len(theta), gamma / np.sqrt(2)
    radius, angle = 9.0 * (np.arange(1500) + 0.5) / 1500, 2 * np.pi * (np.arange(600) + 0.5) / 600
    weight = radius * closed_forms.tail_moment(0, num_parameters - 5, radius) * (radius[1] - radius[0]) / len(angle)
    paths = np.zeros((len(x), len(x)))
    for i, j in itertools.product(range(len(x)), repeat=2):
        inner, lengths = x[i] @ x[j], (np.linalg.norm(x[i]), np.linalg.norm(x[j]))
        turn = np.arccos(np.clip(inner / lengths[0] / lengths[1], -1.0, 1.0))
        intervals = []
        for k, length, shift in ((i, lengths[0], 0.0), (j, lengths[1], turn)):
            step = s * length * radius[:, None] * np.cos(angle - shift)
            intervals.append((x[k] @ theta + np.minimum(step, 0), x[k] @ theta + np.maximum(step, 0), np.sign(step)))
        (low, high, sign), (low2, high2, sign2) = intervals
        common = np.maximum(np.minimum(high, high2) - np.maximum(low, low2), 0.0) * sign * sign2
        paths[i, j] = num_parameters / s**2 * (common.sum(1) @ weight)
    return closed_forms.covariance_kernel("relu", theta, x, x, gamma) + sigma**2 * paths


def brownian_diagonal(x: Array, gamma: float) -> Array:
    """P·E[|z·x|/|z|²], the paths' part for an example with itself, (n,), any P of 2 or more.

    z = (γ/√2) r e: E|e·x| = |x| Γ(P/2)/(√π Γ((P+1)/2)) and E[1/r] = Γ((P−1)/2)/(√2 Γ(P/2)), r of the chi law.
    """
    size = x.shape[1]
    ratio = np.exp(special.gammaln((size - 1) / 2) - special.gammaln((size + 1) / 2))
    return size / gamma * np.linalg.norm(x, axis=1) * ratio / np.sqrt(np.pi)
