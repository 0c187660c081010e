"""Gaussian smoothing of elementwise functions: φ̃(a, s) = E φ(a + s ξ), ξ standard normal, and its derivative in a.

Which function it is, is found by trial, not by name. No layers and no models here.
"""

from nntk_dist.smoothing.piecewise_linear import PiecewiseLinear, find_piecewise_linear

__all__ = ["PiecewiseLinear", "find_piecewise_linear"]
