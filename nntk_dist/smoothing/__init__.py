"""Gaussian smoothing of elementwise functions: φ̃(a, s) = E φ(a + s ξ), ξ standard normal, and its derivative in a.

Which function it is, is found by trial, not by name. No layers and no models here.
"""

from nntk_dist.smoothing.periodic import PeriodicPiecewiseLinear, find_periodic
from nntk_dist.smoothing.piecewise_linear import PiecewiseLinear, find_piecewise_linear
from nntk_dist.smoothing.piecewise_smooth import PiecewiseSmooth
from nntk_dist.smoothing.smooth_trials import find_piecewise_smooth
from nntk_dist.smoothing.smoothing import Smoothing, find_smoothing

__all__ = [
    "PeriodicPiecewiseLinear",
    "PiecewiseLinear",
    "PiecewiseSmooth",
    "Smoothing",
    "find_periodic",
    "find_piecewise_linear",
    "find_piecewise_smooth",
    "find_smoothing",
]
