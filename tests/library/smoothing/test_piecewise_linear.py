"""Piecewise linear functions are found and smoothed as adaptive quadrature smooths them; others are not taken for such.

Axes: b breaks.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from nntk_dist.models.builders.activations import make_activation
from nntk_dist.smoothing import find_piecewise_linear

QUANTISED = make_activation({"name": "quantize", "levels": 4})
FOUND = {
    "sign": (make_activation("sign"), (0.0,)),
    "step": (make_activation("step"), (0.0,)),
    "relu": (nn.ReLU(), (0.0,)),
    "leaky relu": (nn.LeakyReLU(0.1), (0.0,)),
    "prelu": (nn.PReLU().requires_grad_(False), (0.0,)),
    "hard tanh": (nn.Hardtanh(-0.5, 2.0), (-0.5, 2.0)),
    "hard sigmoid": (nn.Hardsigmoid(), (-3.0, 3.0)),
    "threshold": (nn.Threshold(0.3, -1.0), (0.3,)),
    "quantised": (QUANTISED, (-2 / 3, 0.0, 2 / 3)),
    "far jump": (lambda x: torch.sign(x - 1000.3), (1000.3,)),
    "close jumps": (lambda x: torch.sign(x - 0.1) + 0.5 * torch.sign(x - 0.1007), (0.1, 0.1007)),
    "jump and kink": (lambda x: torch.relu(x) + 0.25 * torch.sign(x - 1.0), (0.0, 1.0)),
}
POINTS = [(0.0, 1.0), (0.3, 0.05), (-2.1, 0.7), (0.7, 3.0), (25.0, 0.4), (-1e3, 2.0), (0.1003, 1e-4), (1000.2, 0.3)]


def smoothed_by_quadrature(function, breaks: tuple[float, ...], a: float, s: float, weight=lambda t: 1.0) -> float:
    """E w(ξ) φ(a + s ξ), panel by panel between the breaks."""
    ends = [-9.0, *sorted(t for t in ((b - a) / s for b in breaks) if abs(t) < 9.0), 9.0]

    def integrand(t: float) -> float:
        value = float(function(torch.tensor([[a + s * t]], dtype=torch.float64)))
        return weight(t) * value * math.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)

    return sum(quad(integrand, low, high, epsabs=1e-12, epsrel=1e-12)[0] for low, high in pairwise(ends))


@pytest.mark.parametrize("name", FOUND)
def test_values_are_those_of_quadrature(name):
    function, breaks = FOUND[name]
    found = find_piecewise_linear(function)
    assert found is not None
    np.testing.assert_allclose(found.breaks, breaks, rtol=1e-12, atol=1e-12)
    function = function.double() if isinstance(function, nn.Module) else function
    a, s = (torch.tensor(part, dtype=torch.float64) for part in zip(*POINTS, strict=True))
    values, slopes = found.values(a, s)
    for (mean, spread), value, slope in zip(POINTS, values.tolist(), slopes.tolist(), strict=True):
        size = max(1.0, abs(mean))
        expected = smoothed_by_quadrature(function, breaks, mean, spread)
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9 * size)
        # Stein's identity: the slope in a is E φ(a + s ξ) ξ / s
        expected = smoothed_by_quadrature(function, breaks, mean, spread, weight=lambda t: t) / spread
        assert slope == pytest.approx(expected, rel=1e-7, abs=1e-9 * size / spread)


@pytest.mark.parametrize(
    "function",
    [
        nn.Tanh(),
        nn.GELU(),
        nn.Hardswish(),
        torch.floor,
        torch.sin,
        nn.Softmax(-1),
        nn.LayerNorm(48),
        lambda x: x * x.mean(),
        lambda x: torch.cumsum(x, -1),
        lambda x: x + torch.rand_like(x),
        lambda x: x[..., :1],
        lambda x: torch.sign(x) / 0.0,
        lambda x: torch.relu(x).float(),
        lambda x: x.numpy() if x.shape[0] == 1 else x,
    ],
)
def test_other_functions_are_not_taken_for_one(function):
    assert find_piecewise_linear(function) is None


def test_without_noise_it_is_the_function_itself():
    for name, (function, breaks) in FOUND.items():
        found = find_piecewise_linear(function)
        assert found is not None, name
        a = torch.linspace(-4.0, 4.0, 801, dtype=torch.float64) + 1e-3
        function = function.double() if isinstance(function, nn.Module) else function
        values, slopes = found.values(a, torch.zeros(1, dtype=torch.float64))
        torch.testing.assert_close(values, function(a[None])[0], rtol=1e-9, atol=1e-9)
        assert bool(torch.isfinite(slopes).all())
        assert bool(torch.isfinite(found.values(torch.tensor(breaks).double(), torch.zeros(1).double())[1]).all())


def test_results_have_the_dtype_of_the_means_and_its_rounding():
    for function, _ in FOUND.values():
        found = find_piecewise_linear(function)
        assert found is not None
        a = torch.linspace(-3.0, 3.0, 97)
        rough, exact = found.values(a, torch.full((1,), 0.3)), found.values(a.double(), torch.full((1,), 0.3).double())
        for value, expected in zip(rough, exact, strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(30))
def test_random_functions_are_found(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 20))
    scale = 10.0 ** generator.uniform(-1.0, 1.3)
    breaks = np.sort(generator.normal(size=count) * scale)
    jumps, bends = generator.normal(size=count), generator.normal(size=count) * (generator.random(count) < 0.5)

    def function(x: torch.Tensor) -> torch.Tensor:
        total = 0.5 * x
        for place, jump, bend in zip(breaks, jumps, bends, strict=True):
            total = total + torch.where(x > place, jump + bend * (x - place), 0.0)
        return total

    found = find_piecewise_linear(function)
    assert found is not None
    np.testing.assert_allclose(found.breaks, breaks, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.jumps, jumps, rtol=0, atol=1e-7 * scale)
    np.testing.assert_allclose(found.bends, bends, rtol=0, atol=1e-7)


def test_it_says_what_it_is():
    assert find_piecewise_linear(QUANTISED).text == "piecewise linear, 3 jumps and 0 kinks"
    assert find_piecewise_linear(nn.ReLU()).text == "piecewise linear, 0 jumps and 1 kinks"
