"""The fixed choices of kernel options, as enums. Each member equals its text, so that text is accepted everywhere."""

from enum import StrEnum


class Kind(StrEnum):
    """Which kernel: the nonlocal one, the covariance of differences, the averaged NTK, or the NTK itself."""

    NONLOCAL = "nonlocal"
    COVARIANCE = "covariance"
    AVERAGED = "averaged"
    LOCAL = "local"


class EstimatorChoice(StrEnum):
    """The requested estimator; `auto` takes the best one that is valid for the model."""

    AUTO = "auto"
    WEIGHT = "weight"
    AUTODIFF = "autodiff"
    ACTIVATION = "activation"


class Statistic(StrEnum):
    """Which statistic of a nonlocal kernel: all pairs of blocks (PSD), pairs of different blocks (unbiased), both."""

    PLUGIN = "plugin"
    UNBIASED = "unbiased"
    BOTH = "both"


class Outputs(StrEnum):
    """Which model outputs the kernel keeps: summed over outputs, or every pair of them."""

    TRACE = "trace"
    FULL = "full"


class Scale(StrEnum):
    """g = P·G f, which tends to ∇f as γ → 0, or G f itself."""

    LOCALIZED = "localized"
    RAW = "raw"


class GammaScale(StrEnum):
    """Whether γ is one length for all parameters, or relative to the root mean square of each tensor."""

    ABSOLUTE = "absolute"
    RELATIVE = "relative"


class VarianceReduction(StrEnum):
    """Whether variance is reduced, if the model allows it: `auto` by `activation`, `all` by the estimator `weight` too.

    `activation` takes smoothed activations and control variates; `weight` takes control variates that a trial found to
    pay.
    """

    NONE = "none"
    AUTO = "auto"
    ALL = "all"


class ContractionChoice(StrEnum):
    """How products of gradients are formed: layer by layer from factors, from block means, or from a sketch."""

    AUTO = "auto"
    LAYERED = "layered"
    MEANS = "means"
    SKETCH = "sketch"
