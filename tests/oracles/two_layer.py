"""Nonlocal gradients of two-layer networks V φ(W x + b) + c, sign or relu, of any width: quadrature over one number.

The nonlocal gradient is the gradient of the network averaged over θ + σ n, n standard normal, σ = (γ/√2) U^{1/P} and U
uniform. Given σ the units are independent, V averages to its centre, and pre-activation a of unit j is normal
with mean W_j·h̃ and deviation s = σ|h̃|, h̃ = (x, 1). So only the mean of φ and its derivative are needed:

    sign   2Φ(a/s) − 1,  2φ(a/s)/s              relu   a Φ(a/s) + s φ(a/s),  Φ(a/s)

Under another radial law U^{1/P} z is uniform on a ball whose radius r is drawn by the law. V still averages to its
centre, as z and its mirror image in V's coordinates are equally likely; and (z·h̃)/(r|h̃|) is one coordinate t of a
uniform point of the unit ball, with density f(t) = k (1 − t²)^((P−1)/2) and distribution F. With ratio = a/(r|h̃|):

    sign   2F(ratio) − 1,  2f(ratio)/(r|h̃|)    relu   a F(ratio) + r|h̃| k (1 − ratio²)^((P+1)/2)/(P+1),  F(ratio)

All parameters are perturbed. Axes: n examples, u hidden units, c outputs, i inputs, P parameters, m radii.
"""

import numpy as np
from jaxtyping import Float
from scipy import integrate, special, stats

Array = np.ndarray


def smoothed(unit: str, a: Array, s: Array) -> tuple[Array, Array]:
    """E φ(a + s ξ) and its derivative in a."""
    ratio = a / s
    if unit == "sign":
        return 2.0 * stats.norm.cdf(ratio) - 1.0, 2.0 * stats.norm.pdf(ratio) / s
    if unit == "relu":
        return a * stats.norm.cdf(ratio) + s * stats.norm.pdf(ratio), stats.norm.cdf(ratio)
    raise ValueError(f"no such unit: {unit}")


def nonlocal_gradient(
    unit: str, x: Float[Array, "n i"], w: Float[Array, "u i"], b: Array, v: Float[Array, "c u"], gamma: float
) -> Float[Array, "n c P"]:
    """g(x) with respect to (W, b, V, c), each flattened by rows; the offset c of the outputs does not matter."""
    num_parameters = w.size + b.size + v.size + len(v)
    extended = _extended(x)
    a, lengths = x @ w.T + b, np.linalg.norm(extended, axis=1, keepdims=True)

    def at(u: float) -> Array:
        return np.stack(smoothed(unit, a, gamma / np.sqrt(2.0) * u ** (1.0 / num_parameters) * lengths))

    (mean, slope), _ = integrate.quad_vec(at, 0.0, 1.0, epsabs=1e-12, epsrel=1e-11)
    return _gradient(mean, slope, extended, v)


def radial_gradient(
    unit: str,
    x: Float[Array, "n i"],
    w: Float[Array, "u i"],
    b: Array,
    v: Float[Array, "c u"],
    radii: Float[Array, "m"],
) -> Float[Array, "n c P"]:
    """g(x) as above, under a law of the radius |z| represented by m equally likely radii."""
    num_parameters = w.size + b.size + v.size + len(v)
    extended = _extended(x)
    a, lengths = x @ w.T + b, np.linalg.norm(extended, axis=1, keepdims=True)
    mean, slope = np.zeros_like(a), np.zeros_like(a)
    for r in radii:
        values, slopes = _smoothed_by_ball(unit, a, r * lengths, num_parameters)
        mean += values / len(radii)
        slope += slopes / len(radii)
    return _gradient(mean, slope, extended, v)


def _smoothed_by_ball(unit: str, a: Array, reach: Array, num_parameters: int) -> tuple[Array, Array]:
    """E φ(a + reach·t) and its derivative in a."""
    half = (num_parameters + 1) / 2.0
    ratio = np.clip(a / reach, -1.0, 1.0)
    below = special.betainc(half, half, 0.5 + 0.5 * ratio)
    constant = np.exp(special.gammaln(half + 0.5) - special.gammaln(half)) / np.sqrt(np.pi)
    if unit == "sign":
        return 2.0 * below - 1.0, 2.0 * constant * (1.0 - ratio**2) ** (half - 1.0) / reach
    if unit == "relu":
        return a * below + reach * constant * (1.0 - ratio**2) ** half / (2.0 * half), below
    raise ValueError(f"no such unit: {unit}")


def _extended(x: Float[Array, "n i"]) -> Float[Array, "n h"]:
    """h̃ = (x, 1)."""
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def _gradient(mean: Array, slope: Array, extended: Array, v: Float[Array, "c u"]) -> Float[Array, "n c P"]:
    """The gradient from the units' means and their derivatives, (n, u) each."""
    (num_outputs, num_units), num_examples = v.shape, len(extended)
    hidden = slope[:, None, :, None] * v[None, :, :, None] * extended[:, None, None, :]  # n c u (i + 1)
    first = hidden[..., :-1].reshape(num_examples, num_outputs, -1)
    eye = np.eye(num_outputs)
    second = (eye[None, :, :, None] * mean[:, None, None, :]).reshape(
        num_examples, num_outputs, num_outputs * num_units
    )
    last = np.broadcast_to(eye, (num_examples, *eye.shape))
    return np.concatenate([first, hidden[..., -1], second, last], axis=2)
