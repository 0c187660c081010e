"""Arguments that torch would answer with an exception of its own: each is refused with the argument, what came and what
is allowed.
"""

import pytest
import torch
from torch import nn

from nntk_dist import local_kernel, nonlocal_kernel
from nntk_dist.errors import ArgumentError, ModelError

X, IDS = torch.ones(5, 4), torch.arange(10).reshape(5, 2) % 7


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def table():
    return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("make", "inputs", "options", "error", "message"),
    [
        (
            network,
            (X, X[:, :3]),
            {},
            ArgumentError,
            r"x2 has examples of float32 of shape \(3,\); allowed: float32 of s",
        ),
        (
            table,
            (IDS, IDS.float()),
            {},
            ArgumentError,
            r"x2 has examples of float32 of shape \(2,\); allowed: int64 of",
        ),
        (table, (IDS, IDS + 7), {}, ModelError, r"the model fails on its inputs \(index out of range in self\)"),
        (
            table,
            (IDS.float(),),
            {},
            ModelError,
            r"the model fails on its inputs \(Expected tensor for argument #1 'indi",
        ),
        (
            network,
            (X[:, :3],),
            {},
            ModelError,
            r"the model fails on its inputs \(mat1 and mat2 shapes cannot be multip",
        ),
        (network, (X.to_sparse(),), {}, ArgumentError, r"x1 is a tensor that is sparse; allowed: .*, dense"),
        (network, (X.to("meta"),), {}, ArgumentError, r"x1 is a tensor that is without values; allowed: "),
        (network, ({"x": {"y": X}},), {}, ArgumentError, r"x1\['x'\] is dict; allowed: a tensor or NumPy array"),
        (network, (X,), {"dtype": torch.int8}, ArgumentError, r"dtype is torch.int8; allowed: a floating-point dtype"),
        (network, (X,), {"dtype": "float64"}, ArgumentError, r"dtype is 'float64'; allowed: a floating-point dtype"),
        (
            network,
            (X,),
            {"device": "gpu0"},
            ArgumentError,
            r"device is 'gpu0', which cannot be used here \(Invalid dev",
        ),
        (network, (X,), {"batch": 0}, ArgumentError, r"batch is 0; give an integer of at least 1"),
        (network, (X,), {"batch": 2.5}, ArgumentError, r"batch is 2.5; give an integer of at least 1"),
        (
            lambda: network().to("meta"),
            (X,),
            {},
            ModelError,
            r"the model's parameters are on the device meta, without v",
        ),
    ],
)
def test_it_is_refused(make, inputs, options, error, message):
    with pytest.raises(error, match=message):
        local_kernel(make(), *inputs, **options)
    with pytest.raises(error, match=message):
        nonlocal_kernel(make(), *inputs, gamma=0.1, estimator="weight", draws=8, **options)
