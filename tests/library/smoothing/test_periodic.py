"""Staircases and other periodic piecewise linear functions are found, and smoothed as quadrature smooths them.

Axes: none.
"""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from torch import nn

from nntk_dist.smoothing import find_periodic

# with the period, the mean slope, and the places of the breaks in one period
FOUND = {
    "floor": (torch.floor, 1.0, 1.0, (0.0,)),
    "round": (torch.round, 1.0, 1.0, (0.5,)),
    "grid": (lambda x: 0.1 * torch.round(x / 0.1), 0.1, 1.0, (0.05,)),
    "wide grid": (lambda x: 7.3 * torch.round(x / 7.3), 7.3, 1.0, (3.65,)),
    "fraction": (lambda x: x - torch.floor(x), 1.0, 0.0, (0.0,)),
    "stairs on a slope": (lambda x: 0.3 * x + 2.0 * torch.floor(x / 3.0 + 0.2) + 1.0, 3.0, 0.3 + 2.0 / 3.0, (2.4,)),
    "triangles": (lambda x: (x - torch.round(x)).abs(), 1.0, 0.0, (0.0, 0.5)),
    "two stairs": (lambda x: torch.floor(x) + 0.5 * torch.floor(x / 2.0 + 0.3), 2.0, 1.25, (0.0, 1.0, 1.4)),
}


def smoothed_by_quadrature(function, places: list[float], a: float, s: float, weight) -> float:
    ends = [-9.0, *sorted(t for t in ((b - a) / s for b in places) if abs(t) < 9.0), 9.0]

    def integrand(t: float) -> float:
        value = float(function(torch.tensor([[a + s * t]], dtype=torch.float64)))
        return weight(t) * value * math.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)

    return sum(quad(integrand, low, high, epsabs=1e-11, epsrel=1e-11)[0] for low, high in pairwise(ends))


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("share", [1e-3, 0.2499, 0.2501, 1.0])
def test_values_are_those_of_quadrature(name, share):
    function, period, slope, breaks = FOUND[name]
    found = find_periodic(function)
    assert found is not None
    assert found.period == pytest.approx(period, rel=1e-12)
    assert found.slope == pytest.approx(slope, rel=1e-12, abs=1e-12)
    assert found.num_breaks == len(breaks)
    s = share * period
    for a in (0.0, 0.013 * period, 0.4999 * period, -7.31 * period, 103.2 * period):
        middle = round(a / period)
        places = [b + (middle + k) * period for k in range(-11, 12) for b in breaks]
        value, found_slope = (
            float(part) for part in found.values(torch.tensor(a).double(), torch.tensor(s, dtype=torch.float64))
        )
        a = float(torch.tensor(a).double())
        size = period * max(1.0, abs(a / period))
        expected = smoothed_by_quadrature(function, places, a, s, lambda t: 1.0)
        assert value == pytest.approx(expected, rel=0, abs=1e-10 * size)
        expected = smoothed_by_quadrature(function, places, a, s, lambda t: t) / s
        assert found_slope == pytest.approx(expected, rel=1e-8, abs=1e-10 * size / s)


def test_at_large_spreads_only_the_line_is_left():
    found = find_periodic(torch.floor)
    assert found is not None
    a = torch.linspace(-1e6, 1e6, 1001, dtype=torch.float64)
    values, slopes = found.values(a, torch.tensor(30.0))
    torch.testing.assert_close(values, a - 0.5, rtol=1e-12, atol=1e-7)
    torch.testing.assert_close(slopes, torch.ones_like(a), rtol=1e-12, atol=0.0)


def test_without_noise_it_is_the_function_itself():
    for function, period, _, breaks in FOUND.values():
        found = find_periodic(function)
        assert found is not None
        a = (torch.linspace(-40.0, 40.0, 801, dtype=torch.float64) + 1.3e-3) * period
        values, slopes = found.values(a, torch.zeros(1, dtype=torch.float64))
        torch.testing.assert_close(values, function(a[None])[0], rtol=1e-9, atol=1e-9)
        ahead = function(a[None] + 1e-5 * period)[0]
        torch.testing.assert_close(slopes, (ahead - values) / (1e-5 * period), rtol=1e-6, atol=1e-6)
        assert bool(torch.isfinite(found.values(torch.tensor(breaks).double(), torch.zeros(1).double())[1]).all())


def test_results_have_the_dtype_of_the_means():
    found = find_periodic(torch.round)
    assert found is not None
    a = torch.linspace(-9.0, 9.0, 97)
    for s in (0.1, 0.8):
        rough, exact = found.values(a, torch.full((1,), s)), found.values(a.double(), torch.full((1,), s).double())
        for value, expected in zip(rough, exact, strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        nn.ReLU(),
        torch.sign,
        torch.tanh,
        torch.sin,
        torch.trunc,
        lambda x: x,
        lambda x: torch.floor(x) ** 2,
        lambda x: torch.floor(x * x.abs()),
        lambda x: torch.floor(x) + torch.rand_like(x),
        lambda x: torch.floor(x) + 0.5 * torch.floor(math.sqrt(2.0) * x),
    ],
)
def test_other_functions_are_not_taken_for_one(function):
    assert find_periodic(function) is None


def test_it_says_what_it_is():
    assert find_periodic(FOUND["triangles"][0]).text == "periodic and piecewise linear, 2 breaks in each 1"
