"""Curved functions are smoothed as adaptive quadrature smooths them, with and without breaks, from small to large s.

Axes: m means.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from nntk_dist.smoothing import PiecewiseSmooth, find_piecewise_smooth, find_smoothing

# with the places where the function is not smooth
FOUND = {
    "tanh": (nn.Tanh(), ()),
    "gelu": (nn.GELU(), ()),
    "silu": (nn.SiLU(), ()),
    "softplus": (nn.Softplus(), ()),
    "mish": (nn.Mish(), ()),
    "sine": (torch.sin, ()),
    "fast sine": (lambda x: x + torch.sin(5.0 * x), ()),
    "steep": (lambda x: torch.tanh(20.0 * (x - 0.7)), ()),
    "cubic": (lambda x: x**3 - x, ()),
    "elu": (nn.ELU(), (0.0,)),
    "selu": (nn.SELU(), (0.0,)),
    "hard swish": (nn.Hardswish(), (-3.0, 3.0)),
    "jumps and curves": (lambda x: torch.sign(x) * x**2 + 0.3 * torch.sign(x - 1.0), (0.0, 1.0)),
    "jump of a wave": (lambda x: torch.where(x > 0.2, torch.cos(x), -1.0), (0.2,)),
}


@cache
def found_of(name: str) -> PiecewiseSmooth:
    found = find_piecewise_smooth(FOUND[name][0])
    assert found is not None
    return found


MEANS = (0.0, 1e-3, 0.3, -0.7, 2.9, -3.01, -12.0, 25.0, 1000.3)
SPREADS = (1e-6, 3e-4, 2e-2, 0.3, 1.0, 2.9, 30.0)


def smoothed_by_quadrature(function, breaks: tuple[float, ...], a: float, s: float) -> tuple[float, float]:
    """E φ(a + s ξ) and, by Stein's identity, E (φ(a + s ξ) − φ(a)) ξ/s, panel by panel."""
    ends = [-9.0, *sorted(t for t in ((b - a) / s for b in (*breaks, 0.0, 0.7)) if abs(t) < 9.0), 9.0]

    def value(x: float) -> float:
        return float(function(torch.tensor([[x]], dtype=torch.float64)))

    def mean(weight) -> float:
        def integrand(t: float) -> float:
            return weight(t) * math.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)

        return sum(quad(integrand, low, high, epsabs=1e-9, epsrel=1e-9, limit=400)[0] for low, high in pairwise(ends))

    at_mean = value(a)
    return mean(lambda t: value(a + s * t)), mean(lambda t: (value(a + s * t) - at_mean) * t) / s


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("s", SPREADS)
def test_values_are_those_of_quadrature(name, s):
    function, breaks = FOUND[name]
    found = found_of(name)
    np.testing.assert_allclose(found.breaks, breaks, rtol=0, atol=1e-4)
    function = function.double() if isinstance(function, nn.Module) else function
    values, slopes = found.values(torch.tensor(MEANS, dtype=torch.float64), torch.tensor([s], dtype=torch.float64))
    steepest = float(slopes.abs().max())
    for place, (mean, value, slope) in enumerate(zip(MEANS, values.tolist(), slopes.tolist(), strict=True)):
        if name in ("sine", "fast sine") and (s == 30.0 or place % 2):
            continue  # quadrature of many waves takes long; and E sin(a + s ξ) is 0
        expected, expected_slope = smoothed_by_quadrature(function, breaks, mean, s)
        assert value == pytest.approx(expected, rel=5e-8, abs=3e-8)
        rounding = 1e-14 * max(1.0, abs(expected), abs(mean)) / s
        assert slope == pytest.approx(expected_slope, rel=1e-7, abs=1e-7 * min(steepest, 1.0) + rounding)


@pytest.mark.parametrize("s", [0.0, 0.7, 30.0])
def test_waves_have_closed_forms(s):
    found = find_piecewise_smooth(lambda x: torch.sin(3.0 * x))
    assert found is not None
    a = torch.linspace(-20.0, 20.0, 401, dtype=torch.float64)
    values, slopes = found.values(a, torch.tensor(s, dtype=torch.float64))
    size = math.exp(-4.5 * s * s)
    torch.testing.assert_close(values, size * torch.sin(3.0 * a), rtol=0, atol=2e-8)
    torch.testing.assert_close(slopes, 3.0 * size * torch.cos(3.0 * a), rtol=0, atol=6e-8)


@pytest.mark.parametrize("name", FOUND)
def test_without_noise_it_is_the_function_itself(name):
    function, _ = FOUND[name]
    found = found_of(name)
    a = torch.linspace(-6.0, 6.0, 401, dtype=torch.float64) + 1e-3
    function = function.double() if isinstance(function, nn.Module) else function
    a = a.requires_grad_()
    expected = function(a[None])[0]
    (slope,) = torch.autograd.grad(expected.sum(), a)
    values, slopes = found.values(a.detach(), torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(values, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slopes, slope, rtol=1e-7, atol=1e-7)
    at_breaks = found.values(torch.tensor(found.breaks, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert all(bool(torch.isfinite(part).all()) for part in at_breaks)


@pytest.mark.parametrize("name", FOUND)
def test_single_precision_has_its_rounding(name):
    """φ and its argument are rounded to 6e-8 of their size, and slopes are sums of φ/s."""
    found = found_of(name)
    a = torch.linspace(-6.0, 6.0, 97)
    still, steepness = found.values(a.double(), torch.zeros(1))
    size = float(torch.maximum(still.abs(), (a * steepness).abs()).max())
    for s in (1e-3, 0.1, 0.3, 1.0, 3.0):
        spread = torch.full((1,), s)
        rough, exact = found.values(a, spread), found.values(a.double(), spread.double())
        for value, expected, bound in zip(rough, exact, (2e-7 * size, 2e-7 * size / max(s, 0.25)), strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, rtol=3e-7, atol=bound)


def test_spreads_may_differ_and_broadcast():
    found = find_piecewise_smooth(nn.ELU())
    assert found is not None
    a = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.logspace(-5.0, 2.0, 40, dtype=torch.float64)[:, None]
    together = found.values(a, s)
    for row in range(40):
        alone = found.values(a[row], s[row])
        for part, own in zip(together, alone, strict=True):
            torch.testing.assert_close(part[row], own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tanh", "elu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_other_means(name, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(101, 37, dtype=dtype, generator=generator)
    s = torch.rand(101, 1, dtype=dtype, generator=generator) * 2.0 + 1e-3
    together = found_of(name).values(a, s)
    for count in (1, 2, 30, 77):
        some = torch.randperm(101, generator=generator)[:count]
        for part, own in zip(together, found_of(name).values(a[some], s[some]), strict=True):
            assert torch.equal(part[some], own)


@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        torch.log,
        torch.reciprocal,
        lambda x: x.abs().sqrt(),
        lambda x: x.abs().log(),
        lambda x: torch.round(x) * torch.tanh(x),
        lambda x: torch.sin(1e3 * x),
        lambda x: torch.tanh(x).float().double(),
        nn.Softmax(-1),
        nn.LayerNorm(48),
        lambda x: torch.tanh(x) + 0.1 * torch.rand_like(x),
        lambda x: torch.tanh(x) / x.numel(),
    ],
)
def test_other_functions_are_not_taken_for_one(function):
    assert find_smoothing(function) is None


def test_the_search_finds_each_kind():
    assert find_smoothing(nn.ReLU()).text == "piecewise linear, 0 jumps and 1 kinks"
    assert find_smoothing(torch.round).text == "periodic and piecewise linear, 1 breaks in each 1"
    assert find_smoothing(nn.Tanh()).text == "smooth, by quadrature"
    assert find_smoothing(nn.ELU()).text == "smooth but for 1 breaks, by quadrature"
    lines = [find_smoothing(function).is_line for function in (nn.Identity(), nn.ReLU(), torch.floor, nn.Tanh())]
    assert lines == [True, False, False, False]
