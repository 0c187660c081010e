"""Products that overflow are an error that names rows; a row too large for the others is warned of."""

import numpy as np
import pytest
import torch
from torch import nn

from nntk_dist import averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel
from nntk_dist.errors import ModelError, NNTKWarning
from nntk_dist.runtime.arrays import magnitude_caution
from nntk_dist.statistics.overflow import check_no_overflow

KERNELS = {
    "local": lambda model, *x: local_kernel(model, *x),
    "nonlocal": lambda model, *x: nonlocal_kernel(model, *x, gamma=0.1),
    "weight": lambda model, *x: nonlocal_kernel(model, *x, gamma=0.1, estimator="weight"),
    "covariance": lambda model, *x: covariance_kernel(model, *x, gamma=0.1),
    "averaged": lambda model, *x: averaged_kernel(model, *x, gamma=0.1),
    "full": lambda model, *x: local_kernel(model, *x, outputs="full"),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.filterwarnings("ignore::nntk_dist.errors.NNTKWarning")
def test_entries_that_overflow_name_their_rows(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    large = x.clone()
    large[2] *= 1e20
    with pytest.raises(ModelError, match=r"entries overflow float32, the first between row 2 of x1 and row 2 of x1: "):
        KERNELS[name](model, large)
    large[2] = x[2] * 1e38
    with pytest.raises(ModelError, match=r"(entries overflow float32|NaN or infinity for 1 of 5 examples)"):
        KERNELS[name](model, large)


def test_examples_of_every_shape_of_tile():
    values = torch.zeros(4, 6)
    check_no_overflow(values, ("a", 0), ("b", 0))
    values[3, 4] = torch.inf
    with pytest.raises(ModelError, match=r"1 of 24 kernel entries .* row 103 of a and row 14 of b"):
        check_no_overflow(values, ("a", 100), ("b", 10))
    with pytest.raises(ModelError, match="row 101 of a and row 12 of b"):
        check_no_overflow(values, ("a", 100), ("b", 10), width=2)
    paired = torch.zeros(3, 2, 2)
    paired[1, 0, 1] = torch.nan
    with pytest.raises(ModelError, match="row 101 of a and row 101 of a"):
        check_no_overflow(paired, ("a", 100), ("a", 100), width=2)
    check_no_overflow(torch.full((2, 2), 3e38), ("a", 0), ("b", 0))  # finite, with a sum that is not


def test_a_row_that_drowns_the_others():
    x = torch.from_numpy(np.linspace(1.0, 2.0, 12).reshape(6, 2)).float()
    assert magnitude_caution(x, "x1") is None
    x[4] *= 1e6
    assert magnitude_caution(x, "x1") is None
    x[4] *= 1e6
    caution = magnitude_caution(x, "x1")
    assert caution is not None
    assert caution.startswith("x1: row 4 holds numbers up to 1.8")
    assert magnitude_caution(x.double(), "x1") is None
    assert magnitude_caution(torch.zeros(3, 2), "x1") is None
    with pytest.warns(NNTKWarning, match="row 4 holds numbers up to .* which float32 cannot hold together"):
        local_kernel(nn.Linear(2, 1), x)
