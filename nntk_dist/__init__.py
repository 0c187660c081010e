"""Nonlocal neural tangent kernels: the library. It computes kernels of models and reads kernels from a store.

`open_kernel` and the scikit-learn estimators are imported when they are first asked for: computing kernels needs no
zarr, no object store and no scikit-learn.
"""

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nntk_dist.errors import NNTKError, NNTKWarning
from nntk_dist.kernels.functions import (
    KernelEstimate,
    averaged_kernel,
    covariance_kernel,
    local_kernel,
    nonlocal_kernel,
)
from nntk_dist.models.black_box import BlackBox
from nntk_dist.models.brownian import BrownianActivation
from nntk_dist.models.dropout import Dropout, replace_dropout
from nntk_dist.models.noise import StochasticModule, fixed_noise
from nntk_dist.planning.model_probes import ModelProbes
from nntk_dist.weighting.options import Weighting

if TYPE_CHECKING:
    from nntk_dist.learning import NNTKClassifier, NNTKRegressor
    from nntk_dist.store.stored_kernel import StoredKernel, open_kernel

__all__ = [
    "BlackBox",
    "BrownianActivation",
    "Dropout",
    "KernelEstimate",
    "ModelProbes",
    "NNTKClassifier",
    "NNTKError",
    "NNTKRegressor",
    "NNTKWarning",
    "StochasticModule",
    "StoredKernel",
    "Weighting",
    "averaged_kernel",
    "covariance_kernel",
    "fixed_noise",
    "local_kernel",
    "nonlocal_kernel",
    "open_kernel",
    "replace_dropout",
]


_HOMES = MappingProxyType(
    {
        "NNTKClassifier": "nntk_dist.learning",
        "NNTKRegressor": "nntk_dist.learning",
        "StoredKernel": "nntk_dist.store.stored_kernel",
        "open_kernel": "nntk_dist.store.stored_kernel",
    }
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nntk_dist' has no attribute '{name}'")
