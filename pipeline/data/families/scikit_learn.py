"""The data sets that come with scikit-learn; those that it would download are refused.

`digits` are grey images (1, 8, 8) with values in [0, 1]; all others are vectors of features as scikit-learn gives them.
"""

from types import MappingProxyType

import numpy as np
from sklearn import datasets

from nntk_dist.errors import check_choice
from pipeline.data.families.arrays import source_from_arrays
from pipeline.data.source import Source

LOADERS = MappingProxyType(
    {
        "digits": datasets.load_digits,
        "iris": datasets.load_iris,
        "wine": datasets.load_wine,
        "breast_cancer": datasets.load_breast_cancer,
        "diabetes": datasets.load_diabetes,
        "linnerud": datasets.load_linnerud,
    }
)


def open_sklearn(location: str) -> Source:
    """Open one of scikit-learn's own data sets, as one set.

    Args:
        location: a key of `LOADERS`.

    Raises:
        ArgumentError: the name is unknown.
    """
    check_choice("data set of sklearn:", location, LOADERS)
    inputs, targets = LOADERS[location](return_X_y=True)
    if location == "digits":
        inputs = inputs.reshape(-1, 1, 8, 8) / 16
    return source_from_arrays({"x": np.asarray(inputs), "y": np.asarray(targets)}, what=f"sklearn:{location}")
