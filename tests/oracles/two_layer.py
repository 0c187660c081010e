"""Nonlocal kernels of two-layer networks V φ(W x + b) + c, sign or relu, of any width: quadrature over one number.

The nonlocal gradient is the gradient of the network averaged over θ + σ n, n standard normal, σ = (γ/√2) U^{1/P} and U
uniform. Given σ the units are independent, V is met at its centre on average, and pre-activation a of unit j is normal
with mean W_j·h̃ and deviation s = σ|h̃|, h̃ = (x, 1). So everything needed of φ is its mean and that mean's derivative:

    sign   2Φ(a/s) − 1,  2φ(a/s)/s              relu   a Φ(a/s) + s φ(a/s),  Φ(a/s)

Gaussian perturbations of all parameters only. Axes: n examples, u hidden units, c outputs, i inputs, P parameters.
"""

import numpy as np
from jaxtyping import Float
from scipy import integrate, stats

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
    num_units, num_outputs = len(w), len(v)
    num_parameters = w.size + b.size + v.size + num_outputs
    extended = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    a, lengths = x @ w.T + b, np.linalg.norm(extended, axis=1, keepdims=True)

    def at(u: float) -> Array:
        return np.stack(smoothed(unit, a, gamma / np.sqrt(2.0) * u ** (1.0 / num_parameters) * lengths))

    (mean, slope), _ = integrate.quad_vec(at, 0.0, 1.0, epsabs=1e-12, epsrel=1e-11)
    hidden = slope[:, None, :, None] * v[None, :, :, None] * extended[:, None, None, :]  # n c u (i + 1)
    first = hidden[..., :-1].reshape(len(x), num_outputs, -1)
    eye = np.eye(num_outputs)
    second = (eye[None, :, :, None] * mean[:, None, None, :]).reshape(len(x), num_outputs, num_outputs * num_units)
    return np.concatenate([first, hidden[..., -1], second, np.broadcast_to(eye, (len(x), *eye.shape))], axis=2)
