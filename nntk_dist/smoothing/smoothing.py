"""What smoothed functions have in common, and the search for the one that a function is.

Axes: none; means are of any shape.
"""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from nntk_dist.smoothing.elementwise import Function
from nntk_dist.smoothing.periodic import find_periodic
from nntk_dist.smoothing.piecewise_linear import find_piecewise_linear
from nntk_dist.smoothing.smooth_trials import find_piecewise_smooth


class Smoothing(Protocol):
    """φ̃(a, s) = E φ(a + s ξ) of an elementwise function φ, ξ standard normal, and its derivative in a."""

    @property
    def is_line(self) -> bool:
        """Whether φ is a straight line, which noise leaves as it is."""

    @property
    def text(self) -> str:
        """What φ is, in words."""

    def values(
        self, a: Float[Tensor, "*shape"], s: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return φ̃(a, s) and φ̃'(a, s), with errors below the rounding of float32, in the dtype of a.

        With s = 0 they are φ(a), at a break perhaps a mean of both sides, and the slope there.

        Args:
            a: means.
            s: standard deviations, 0 or more, of a shape that broadcasts to that of a.
        """


def find_smoothing(function: Function) -> Smoothing | None:
    """Return how to smooth a function, found by trial: piecewise linear, periodic, or piecewise smooth.

    None if it is not elementwise or not deterministic, has no end of breaks that do not repeat, a pole, or grows much
    faster than x⁴. It takes a few tenths of a second at most for functions whose features are wider than about 1/20.

    Args:
        function: takes and returns a tensor; a module is copied.

    Example:
        >>> import torch
        >>> find_smoothing(torch.tanh).text
        'smooth, by quadrature'
        >>> find_smoothing(lambda x: x / x.sum()) is None
        True
    """
    return find_piecewise_linear(function) or find_periodic(function) or find_piecewise_smooth(function)
