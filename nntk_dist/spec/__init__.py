"""What a kernel is, for any model and data: `KernelSpec` and the choices that its options allow.

Function signatures, the section `kernel` of a configuration, error messages and the reference page derive from
`KernelSpec`. No model is called here; `nntk_dist.planning` decides how a kernel of a given model is computed.
"""

from nntk_dist.spec.choices import (
    ContractionChoice,
    EstimatorChoice,
    GammaScale,
    Kind,
    Outputs,
    Scale,
    Statistic,
    VarianceReduction,
)
from nntk_dist.spec.kernel_spec import KernelSpec
from nntk_dist.spec.options import kernel_option_rows, kernel_options, kernel_signature, make_spec
from nntk_dist.spec.useless_estimates import useless_estimate

__all__ = [
    "ContractionChoice",
    "EstimatorChoice",
    "GammaScale",
    "KernelSpec",
    "Kind",
    "Outputs",
    "Scale",
    "Statistic",
    "VarianceReduction",
    "kernel_option_rows",
    "kernel_options",
    "kernel_signature",
    "make_spec",
    "useless_estimate",
]
