"""The laws ρ of a perturbation, one per file. All are scaled to E|z|² = P·γ²/2, so that γ means the same for each.

A law is a frozen object with its range and options, such as `Student(gamma=0.1, nu=5)`. To add one, write a class with
the members of `RadialLaw` and name it in the table `LAWS` of `nntk_dist.sampling.laws.registry`, in the entry-point
group `nntk_dist.laws` of your own package, or as `python:module:Name`. No number is drawn here.
"""

from nntk_dist.sampling.laws.ball import Ball
from nntk_dist.sampling.laws.base import Law, RadialLaw, Uniforms
from nntk_dist.sampling.laws.fractional import Fractional
from nntk_dist.sampling.laws.gaussian import Gaussian
from nntk_dist.sampling.laws.low_rank import LowRank
from nntk_dist.sampling.laws.registry import LAWS, as_law, has_gamma, law_options, make_law, option_owners, radial_names
from nntk_dist.sampling.laws.sphere import Sphere
from nntk_dist.sampling.laws.student import Student

__all__ = [
    "LAWS",
    "Ball",
    "Fractional",
    "Gaussian",
    "Law",
    "LowRank",
    "RadialLaw",
    "Sphere",
    "Student",
    "Uniforms",
    "as_law",
    "has_gamma",
    "law_options",
    "make_law",
    "option_owners",
    "radial_names",
]
