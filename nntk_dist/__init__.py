"""Nonlocal neural tangent kernels: the library. It computes kernels of models and reads kernels from a store.

Names that need more than torch and NumPy are imported when they are first used: computing kernels needs no zarr, no
object store and no scikit-learn.
"""

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nntk_dist.errors import (
    ArgumentError,
    DataError,
    ModelError,
    NNTKError,
    NNTKWarning,
    StoreError,
    Unavailable,
)
from nntk_dist.kernels.estimate import KernelEstimate
from nntk_dist.kernels.functions import (
    averaged_kernel,
    covariance_kernel,
    local_kernel,
    nonlocal_kernel,
    prepare_kernel,
)
from nntk_dist.kernels.prepared import PreparedKernel
from nntk_dist.models.black_box import BlackBox
from nntk_dist.models.brownian import BrownianActivation
from nntk_dist.models.dropout import Dropout, replace_dropout
from nntk_dist.models.noise import StochasticModule, fixed_noise
from nntk_dist.planning.model_probes import ModelProbes
from nntk_dist.sampling.laws import Ball, Fractional, Gaussian, LowRank, Sphere, Student
from nntk_dist.spec import KernelSpec
from nntk_dist.weighting.options import Weighting

if TYPE_CHECKING:
    from nntk_dist.learning import NNTKClassifier, NNTKRegressor
    from nntk_dist.store.opening import open_groups, open_kernel
    from nntk_dist.store.stored_kernel import StoredKernel

__all__ = [  # noqa: RUF022  # in sections, not sorted
    # Kernels of a model in memory
    "nonlocal_kernel",
    "covariance_kernel",
    "averaged_kernel",
    "local_kernel",
    "prepare_kernel",
    "KernelEstimate",
    "PreparedKernel",
    "KernelSpec",
    "ModelProbes",
    # Laws of the perturbations, and weights of draws
    "Gaussian",
    "Sphere",
    "Ball",
    "Fractional",
    "Student",
    "LowRank",
    "Weighting",
    # Models: black boxes, and models with noise
    "BlackBox",
    "BrownianActivation",
    "Dropout",
    "StochasticModule",
    "fixed_noise",
    "replace_dropout",
    # Stored kernels
    "StoredKernel",
    "open_groups",
    "open_kernel",
    # scikit-learn estimators
    "NNTKClassifier",
    "NNTKRegressor",
    # Errors
    "NNTKError",
    "ArgumentError",
    "DataError",
    "ModelError",
    "StoreError",
    "Unavailable",
    "NNTKWarning",
]


_HOMES = MappingProxyType(
    {
        "NNTKClassifier": "nntk_dist.learning",
        "NNTKRegressor": "nntk_dist.learning",
        "StoredKernel": "nntk_dist.store.stored_kernel",
        "open_groups": "nntk_dist.store.opening",
        "open_kernel": "nntk_dist.store.opening",
    }
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            if error.name != "sklearn":
                raise
            raise ImportError(f"{name} needs scikit-learn; run: pip install 'nntk-dist[sklearn]'") from error
    raise AttributeError(f"module 'nntk_dist' has no attribute '{name}'")
