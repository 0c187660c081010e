"""Kernels of single units f(x; θ) = φ(θ·x), in float64, for any number of parameters: no sampling, no model.

Gaussian perturbations only, z = s·n with n ~ N(0, I_P) and s = γ/√2. Only the units in `UNITS` are accepted.

Everything rests on one identity, 1/|n|² = ½ ∫₀^∞ exp(−τ|n|²/2) dτ, which turns the singular weight into a mixture of
shrunken Gaussians:

    E[h(n)/|n|²]     = ∫₀¹ σ^(P−3) E[h(σn)] dσ
    P·E[Δ z/|z|²]    = ∫₀¹ P σ^(P−1) E[∇f(θ + σz)] dσ          (σ = U^(1/P): the gradient at a shrunken perturbation)

A ridge function sees n only through n·x̂, a pair of them through the plane that x and x' span. There, in polar
coordinates, φ(θ·x + shift) is a piecewise polynomial in the radius along each ray. Its radial integrals are
`tail_moment`; the angle is left for tanh-sinh quadrature. For P = 1 the plane has one dimension too many, but the
Gaussian expectation depends only on covariances.

Axes: n (or n1, n2) examples, P parameters, A quadrature angles. Symbols: a = θ·x, c = s|x|cos(angle), r = radius.
"""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import special

Array = np.ndarray
# One summand of a function of the radius r: (start, coefficients) stands for 1[r > start] · Σ_j coefficients[j] r^j.
Switch = tuple[Array, list[Array]]

UNITS = ("linear", "quadratic", "sign", "relu")
LIPSCHITZ_UNITS = ("linear", "quadratic", "relu")


def unit_value(unit: str, theta: Float[Array, "*m P"], x: Float[Array, "n P"]) -> Float[Array, "*m n"]:
    """f(x; θ) = φ(θ·x): u, ½u², sign(u) with sign(0) = 0, or max(u, 0)."""
    u = theta @ x.T
    values = {"linear": u, "quadratic": 0.5 * u**2, "sign": np.sign(u), "relu": np.maximum(u, 0.0)}
    return values[unit]


def local_gradient(unit: str, theta: Float[Array, "*m P"], x: Float[Array, "n P"]) -> Float[Array, "*m n P"]:
    """∇_θ f(x; θ) = φ'(θ·x) x, with relu'(0) = 0 and sign' = 0 everywhere, as automatic differentiation has it."""
    u = theta @ x.T
    slopes = {"linear": np.ones_like(u), "quadratic": u, "sign": np.zeros_like(u), "relu": (u > 0).astype(float)}
    return slopes[unit][..., None] * x


def local_kernel(unit: str, theta: Array, x1: Array, x2: Array) -> Float[Array, "n1 n2"]:
    """The ordinary tangent kernel ∇f(x)·∇f(x')."""
    return local_gradient(unit, theta, x1) @ local_gradient(unit, theta, x2).T


def nonlocal_gradient(unit: str, theta: Array, x: Float[Array, "n P"], gamma: float) -> Float[Array, "n P"]:
    """The localised nonlocal gradient g(x) = P·E[(f(x; θ+z) − f(x; θ)) z/|z|²] = x · E[φ'(θ·x + U^(1/P) z·x)].

    With κ = a/(s|x|) and m(κ) = ∫₀¹ σ^(P−2) exp(−κ²/2σ²) dσ = ½ E_{(P+1)/2}(κ²/2), the exponential integral:

        linear     x                    sign     x · 2P m(κ) / (√(2π) s|x|)
        quadratic  (θ·x) x              relu     x · (Φ(κ) + κ m(κ)/√(2π))

    Relative accuracy 1e-12 (relu: absolute in the slope). For P = 1 the slope of sign diverges like −log κ at a = 0.
    """
    if unit in ("linear", "quadratic"):
        return local_gradient(unit, theta, x)  # exact: the mean of an affine φ' is its value at the centre
    num_parameters = theta.shape[0]
    spread = gamma / np.sqrt(2.0) * np.linalg.norm(x, axis=1)
    kappa = np.divide(x @ theta, spread, out=np.zeros_like(spread), where=spread > 0)
    mass = tail_moment(0, num_parameters - 2, np.abs(kappa)) / np.sqrt(2.0 * np.pi)
    if unit == "sign":
        slope = np.divide(2.0 * num_parameters * mass, spread, out=np.zeros_like(spread), where=spread > 0)
    elif unit == "relu":
        # κ m(κ) tends to 0 at κ = 0, even if m itself is infinite (P = 1).
        slope = special.ndtr(kappa) + np.multiply(kappa, mass, out=np.zeros_like(mass), where=kappa != 0)
    else:
        raise ValueError(f"unit is '{unit}'; allowed: {', '.join(UNITS)}")
    return np.where(spread > 0, slope, 0.0)[:, None] * x


def gaussian_gradient(unit: str, theta: Array, x: Float[Array, "n P"], gamma: float) -> Float[Array, "n P"]:
    """E[Δ · 2z/γ²] = E[∇f(θ + z)], the gradient of the smoothed unit: what a vector has under low-rank perturbations.

    linear x, quadratic (θ·x) x, sign x · 2φ(κ)/(s|x|), relu x · Φ(κ), with κ = θ·x/(s|x|).
    """
    spread = gamma / np.sqrt(2.0) * np.linalg.norm(x, axis=1)
    kappa = x @ theta / spread
    slopes = {
        "linear": np.ones_like(kappa),
        "quadratic": x @ theta,
        "sign": np.sqrt(2.0 / np.pi) * np.exp(-(kappa**2) / 2.0) / spread,
        "relu": special.ndtr(kappa),
    }
    return slopes[unit][:, None] * x


def nonlocal_kernel(unit: str, theta: Array, x1: Array, x2: Array, gamma: float) -> Float[Array, "n1 n2"]:
    """The nonlocal tangent kernel Θ(x, x') = g(x)·g(x'), localised (divide by P² for `raw`)."""
    return nonlocal_gradient(unit, theta, x1, gamma) @ nonlocal_gradient(unit, theta, x2, gamma).T


def covariance_kernel(unit: str, theta: Array, x1: Array, x2: Array, gamma: float) -> Float[Array, "n1 n2"]:
    """C(x, x') = P·E[Δ Δ'/|z|²] with Δ = f(x; θ+z) − f(x; θ): the mean of ⟨g_s(x), g_s(x')⟩ over P.

    linear: x·x'. quadratic: a a' x·x' + P s² (|x|²|x'|² + 2(x·x')²)/(4(P+2)). sign, relu: an integral over the angle.
    Accuracy 1e-12 of √(C(x,x) C(x',x')). The sign unit at a = a' = 0 is infinite for P ≤ 2.
    """
    inner, centre = x1 @ x2.T, np.outer(x1 @ theta, x2 @ theta)
    num_parameters, variance = theta.shape[0], gamma**2 / 2.0
    if unit == "linear":
        return inner
    if unit == "quadratic":
        squares = np.outer((x1**2).sum(1), (x2**2).sum(1))
        return centre * inner + num_parameters * variance / (4.0 * (num_parameters + 2)) * (squares + 2.0 * inner**2)
    changes = {"sign": _sign_change, "relu": _relu_change}[unit]
    integrals = _plane_integrals(changes, theta, x1, x2, gamma, exponent=num_parameters - 3)
    return num_parameters / variance * integrals


def averaged_kernel(unit: str, theta: Array, x1: Array, x2: Array, gamma: float) -> Float[Array, "n1 n2"]:
    """E[∇f(x; θ + U^(1/P) z)·∇f(x'; θ + U^(1/P) z)], both gradients at the same perturbation.

    linear: x·x'. quadratic: x·x' (a a' + s² x·x' P/(P+2)). relu: x·x' times the probability that both units are on.
    A sign unit has no such kernel: its gradient is not a function.
    """
    inner, centre = x1 @ x2.T, np.outer(x1 @ theta, x2 @ theta)
    num_parameters, variance = theta.shape[0], gamma**2 / 2.0
    if unit == "linear":
        return inner
    if unit == "quadratic":
        return inner * (centre + variance * inner * num_parameters / (num_parameters + 2))
    if unit != "relu":
        raise ValueError(f"unit is '{unit}'; an averaged kernel has only: {', '.join(LIPSCHITZ_UNITS)}")
    integrals = _plane_integrals(_relu_slope, theta, x1, x2, gamma, exponent=num_parameters - 1)
    return num_parameters * inner * integrals


def tail_moment(power: int, exponent: float, start: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """∫₀¹ σ^exponent · E[r^power 1[r > start]] dσ, where r = σ|n| for n ~ N(0, I_2).

    With σ = e^(−v), y = start²/2 and m = exponent + power + 1: 2^(power/2) ∫₀^∞ e^(−mv) Γ(1 + power/2, y e^(2v)) dv,
    taken by the double exponential rule. power = 0 gives ½ E_{(exponent+3)/2}(y). Powers 0, 1 and 2.
    Relative accuracy 1e-12 for start ≥ 1e-3 (1e-8 at 1e-6 for m ≤ 0). Infinite at start = 0 if m ≤ 0.
    """
    start = np.asarray(start, dtype=float)
    decay = exponent + power + 1.0
    at_zero = float(_upper_gamma(power, np.zeros(()))) / decay if decay > 0 else np.inf
    result = np.where(start == 0, at_zero, 0.0)
    live = (start > 0) & (start < 38.0)  # exp(−38²/2) is the smallest double
    y = start[live, None] ** 2 / 2.0
    rate = 1.0 + abs(decay) + y  # v in units of the fastest decay, so that the same nodes serve every P
    node, weight = _half_line_rule()
    v = node / rate
    with np.errstate(over="ignore"):
        integrand = np.exp(-decay * v) * _upper_gamma(power, y * np.exp(2.0 * v))
    result[live] = (integrand * weight / rate).sum(-1)
    return result


def _upper_gamma(power: int, y: Array) -> Array:
    """2^(power/2) Γ(1 + power/2, y) for power 0, 1, 2: the tail ∫ r^(power+1) exp(−r²/2) dr beyond √(2y)."""
    y = np.minimum(y, 800.0)  # exp(−800) is 0; avoids inf · 0
    if power == 0:
        return np.exp(-y)
    if power == 1:
        return np.sqrt(np.pi / 2.0) * special.erfc(np.sqrt(y)) + np.sqrt(2.0 * y) * np.exp(-y)
    return 2.0 * (1.0 + y) * np.exp(-y)


def _half_line_rule(step: float = 1.0 / 64.0) -> tuple[Array, Array]:
    """Nodes and weights of the double exponential rule for ∫₀^∞ of a function that decays exponentially."""
    tau = np.arange(-3.6, 5.5, step)
    node = np.exp(tau - np.exp(-tau))
    return node, node * (1.0 + np.exp(-tau)) * step


def _panel_rule(left: float, right: float, step: float = 1.0 / 32.0) -> tuple[Array, Array]:
    """Nodes and weights of tanh-sinh quadrature on [left, right], which tolerates singularities at the ends."""
    tau = np.arange(-3.3, 3.3 + step / 2, step)
    inner = np.pi / 2.0 * np.sinh(tau)
    node = (left + right) / 2.0 + (right - left) / 2.0 * np.tanh(inner)
    return node, (right - left) / 2.0 * step * np.pi / 2.0 * np.cosh(tau) / np.cosh(inner) ** 2


def _sign_change(a: float, c: Float[Array, " A"]) -> list[Switch]:
    """sign(a + c r) − sign(a)."""
    if a == 0:
        return [(np.zeros_like(c), [np.sign(c)])]
    return [(_crossing(a, c), [np.full_like(c, -2.0 * np.sign(a))])]


def _relu_change(a: float, c: Float[Array, " A"]) -> list[Switch]:
    """relu(a + c r) − relu(a)."""
    zero = np.zeros_like(c)
    if a == 0:
        return [(zero, [zero, np.maximum(c, 0.0)])]
    if a < 0:
        return [(_crossing(a, c), [np.full_like(c, a), c])]
    return [(zero, [zero, c]), (_crossing(a, c), [np.full_like(c, -a), -c])]


def _relu_slope(a: float, c: Float[Array, " A"]) -> list[Switch]:
    """relu'(a + c r)."""
    zero, one = np.zeros_like(c), np.ones_like(c)
    if a == 0:
        return [(zero, [(c > 0).astype(float)])]
    if a < 0:
        return [(_crossing(a, c), [one])]
    return [(zero, [one]), (_crossing(a, c), [-one])]


def _crossing(a: float, c: Float[Array, " A"]) -> Float[Array, " A"]:
    """The radius at which a + c r changes sign; infinite on rays without a sign change."""
    return np.divide(-a, c, out=np.full_like(c, np.inf), where=a * c < 0)


def _plane_integrals(
    switches: Callable[[float, Array], list[Switch]], theta: Array, x1: Array, x2: Array, gamma: float, exponent: float
) -> Float[Array, "n1 n2"]:
    """∫₀¹ σ^exponent E[ψ(x; σz) ψ(x'; σz)] dσ for all pairs, ψ given along rays by `switches`; 0 if x or x' is 0."""
    spread = gamma / np.sqrt(2.0)
    result = np.zeros((len(x1), len(x2)))
    for i, left in enumerate(x1):
        for j, right in enumerate(x2):
            lengths = spread * np.linalg.norm(left), spread * np.linalg.norm(right)
            if min(lengths) == 0:
                continue
            units = left / np.linalg.norm(left), right / np.linalg.norm(right)
            between = 2.0 * np.arctan2(np.linalg.norm(units[0] - units[1]), np.linalg.norm(units[0] + units[1]))
            centres = float(left @ theta), float(right @ theta)
            result[i, j] = _plane_integral(switches, centres, lengths, float(between), exponent)
    return result


def _plane_integral(
    switches: Callable[[float, Array], list[Switch]],
    centres: tuple[float, float],
    lengths: tuple[float, float],
    between: float,
    exponent: float,
) -> float:
    """One pair: x at angle 0, x' at angle `between`; the angle's panels end wherever the integrand is not smooth."""
    # The crossings swap places when a·c' = a'·c: (u + v cos(between)) cos(angle) + v sin(between) sin(angle) = 0.
    u, v = -centres[1] * lengths[0], centres[0] * lengths[1]
    swap = np.arctan2(-(u + v * np.cos(between)), v * np.sin(between))
    breaks = np.array([0.5 * np.pi, between + 0.5 * np.pi, swap])
    edges = np.unique(np.concatenate([[0.0, 2.0 * np.pi], breaks % (2 * np.pi), (breaks + np.pi) % (2 * np.pi)]))
    total = 0.0
    for left, right in itertools.pairwise(edges):
        angle, weight = _panel_rule(left, right)
        first = switches(centres[0], lengths[0] * np.cos(angle))
        second = switches(centres[1], lengths[1] * np.cos(angle - between))
        for start1, coefficients1 in first:
            for start2, coefficients2 in second:
                start = np.maximum(start1, start2)
                for power1, coefficient1 in enumerate(coefficients1):
                    for power2, coefficient2 in enumerate(coefficients2):
                        product = coefficient1 * coefficient2
                        if product.any():  # a moment that nothing multiplies may be infinite
                            total += float((weight * product * tail_moment(power1 + power2, exponent, start)).sum())
    return total / (2.0 * np.pi)
