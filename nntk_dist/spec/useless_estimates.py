"""The warning about a kernel whose estimate is mostly noise, and what helps against it.

Library and pipeline say the same. Only options that the kernel's kind has are named.

Axes: none.
"""

import math

from nntk_dist.sampling.laws import LowRank
from nntk_dist.spec.choices import EstimatorChoice, Kind
from nntk_dist.spec.kernel_spec import KernelSpec

USELESS_ERROR = 0.5


def useless_estimate(spec: KernelSpec, relative_error: float, draws: int) -> str:
    """Return a warning about a relative error of 50 % or more, or NaN or infinite; empty for a smaller one.

    It is also empty if an accuracy was requested: then the end of the search says whether it was reached.

    Args:
        spec: the kernel; it must have draws or a sketch.
        relative_error: the estimate of ‖U − Θ‖/‖Θ‖, for a kernel with error bars.
        draws: the number of draws that were made.

    Example:
        >>> useless_estimate(KernelSpec(kind="covariance"), 3.4, 16)
        'the kernel is mostly noise: with 16 draws its estimated relative error is 340 %; take more draws, or set rtol'
    """
    if spec.rtol is not None or relative_error < USELESS_ERROR:
        return ""
    others = (
        " or estimator auto, which takes the best one that the model allows," if _has_other_estimators(spec) else ""
    )
    if math.isnan(relative_error):
        return (
            f"nothing is known of the kernel: with {draws} draws no entry is resolved, since hardly a draw changed an "
            f"output; take more draws,{others} or a larger gamma"
        )
    found = "infinite" if math.isinf(relative_error) else f"{100 * relative_error:.0f} %"
    if spec.kind == Kind.LOCAL:
        return f"the kernel is mostly noise: its sketch's estimated relative error is {found}; make sketch larger"
    return (
        f"the kernel is mostly noise: with {draws} draws its estimated relative error is {found}; take more draws,"
        f"{others} or set rtol"
    )


def _has_other_estimators(spec: KernelSpec) -> bool:
    """Whether `estimator: auto` may take another estimator than the one that was asked for."""
    asked = spec.kind == Kind.NONLOCAL and spec.estimator != EstimatorChoice.AUTO
    return asked and spec.weighting.is_fixed and not isinstance(spec.distribution, LowRank)
