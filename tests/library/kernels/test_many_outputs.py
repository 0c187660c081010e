"""Kernels whose features do not fit into the memory that they may take: each tile computes its own, some outputs at a
time, and the kernel is the same to rounding.
"""

from typing import Any

import pytest
import torch
from torch import nn

from nntk_dist import ArgumentError, prepare_kernel
from nntk_dist.kernels import prepared, tiles
from nntk_dist.kernels.tiles import output_portions

OPTIONS: dict[str, dict[str, Any]] = {
    "local": {"kind": "local"},
    "full": {"kind": "local", "outputs": "full"},
    "autodiff": {"gamma": 0.1, "draws": 8},
    "layered": {"gamma": 0.1, "contraction": "layered"},
    "activation": {"gamma": 0.1, "draws": 8, "estimator": "activation"},
    "weight": {"gamma": 0.1, "draws": 8, "estimator": "weight"},
    "averaged": {"kind": "averaged", "gamma": 0.1, "draws": 8},
    "covariance": {"kind": "covariance", "gamma": 0.1, "draws": 8},
}


@pytest.mark.parametrize(
    ("outputs", "allowed"), [("full", "outputs: trace, fewer examples"), ("trace", "fewer examples")]
)
def test_a_kernel_that_the_memory_cannot_hold_is_refused_before_it_is_computed(outputs, allowed, monkeypatch):
    model, x = nn.Linear(2, 3), torch.randn(6, 2)
    kernel = prepare_kernel(model, x, kind="local", outputs=outputs)
    monkeypatch.setattr(tiles, "feature_limit", lambda device: 50)
    message = rf"^x1 and x2 give a kernel of .* entries, which take .* GiB .*; allowed: {allowed}, or a run"
    with pytest.raises(ArgumentError, match=message):
        kernel(x)


@pytest.mark.parametrize("name", OPTIONS)
def test_portions_of_the_outputs_give_the_same_kernel(name, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 6)).double()
    x, others = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    sizes = []

    def in_a_third(features, num_rows, item_bytes, **options):
        whole = num_rows * item_bytes * sum(array.num_numbers for array in features.arrays)
        portions = output_portions(features, num_rows, item_bytes, **options | {"limit": whole // 3})
        sizes.extend(map(len, portions or ()))
        return portions

    kernel = prepare_kernel(model, x, **OPTIONS[name])
    held = [kernel(x), kernel(x, others)]
    monkeypatch.setattr(prepared, "output_portions", in_a_third)
    computed = [kernel(x), kernel(x, others)]
    assert sum(sizes) == 2 * 6
    if name in ("local", "layered", "autodiff"):
        assert max(sizes) <= 2
    for expected, values in zip(held, computed, strict=True):
        torch.testing.assert_close(values.kernel, expected.kernel, rtol=1e-10, atol=1e-12)
        if expected.stderr is not None:
            rounding = 1e-10 * float(expected.kernel.abs().max())  # of differences between products of this size
            torch.testing.assert_close(values.stderr, expected.stderr, rtol=1e-10, atol=rounding, equal_nan=True)
