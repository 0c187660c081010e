"""The table of estimators: one line for each, with the object that plans it and makes its features.

The table holds names only, so that every layer can check a name without importing an estimator. What an estimator
answers is `nntk_dist.estimators.estimator.Estimator`.
"""

from typing import Any

from nntk_dist.registration.registry import Registry

ESTIMATORS = Registry[Any](
    "estimator",
    "nntk_dist.estimators",
    {
        "weight": "nntk_dist.estimators.weight:WEIGHT",
        "autodiff": "nntk_dist.estimators.autodiff:AUTODIFF",
        "activation": "nntk_dist.estimators.activation:ACTIVATION",
    },
)
"""Estimators by name; other packages register theirs in the entry-point group `nntk_dist.estimators`."""

AUTO_ORDER = ("autodiff", "activation", "weight")
"""The order in which `estimator: auto` tries them; the first one that is available is taken."""
