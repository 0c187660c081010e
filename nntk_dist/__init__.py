"""Nonlocal neural tangent kernels: the library. It computes kernels of models and reads kernels from a store."""

from nntk_dist.errors import NNTKError
from nntk_dist.kernels import KernelEstimate, averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel

__all__ = [
    "KernelEstimate",
    "NNTKError",
    "averaged_kernel",
    "covariance_kernel",
    "local_kernel",
    "nonlocal_kernel",
]
