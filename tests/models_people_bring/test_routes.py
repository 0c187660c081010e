"""A model that routes its examples, planned on examples of one way and computed on others.

Axes: n examples.
"""

import pytest
import torch

from nntk_dist import local_kernel, prepare_kernel
from nntk_dist.errors import ModelError
from tests.models_people_bring.control_flow import Routed


def test_a_way_that_the_plan_has_not_seen_is_an_error_that_names_the_module():
    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(6, 3, dtype=torch.float64)
    positive = x.clone()
    positive[:, 0] = x[:, 0].abs()
    kernel = prepare_kernel(model, positive, kind="local")
    torch.testing.assert_close(kernel(positive).kernel, local_kernel(model, positive))
    with pytest.raises(ModelError, match=r"module 'experts.1' gets \d rows of 6, and got all rows of the examples"):
        kernel(x)
