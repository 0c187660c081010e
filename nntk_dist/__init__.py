"""Nonlocal neural tangent kernels: the library. It computes kernels of models and reads kernels from a store.

`open_kernel` is imported when it is first asked for: computing kernels needs neither zarr nor an object store.
"""

from typing import TYPE_CHECKING, Any

from nntk_dist.black_box import BlackBox
from nntk_dist.errors import NNTKError
from nntk_dist.kernels import KernelEstimate, averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel

if TYPE_CHECKING:
    from nntk_dist.reading import StoredKernel, open_kernel

__all__ = [
    "BlackBox",
    "KernelEstimate",
    "NNTKError",
    "StoredKernel",
    "averaged_kernel",
    "covariance_kernel",
    "local_kernel",
    "nonlocal_kernel",
    "open_kernel",
]


def __getattr__(name: str) -> Any:
    if name in ("StoredKernel", "open_kernel"):
        from nntk_dist import reading

        return getattr(reading, name)
    raise AttributeError(f"module 'nntk_dist' has no attribute '{name}'")
