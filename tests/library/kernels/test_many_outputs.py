"""Kernels whose features do not fit into the memory that they may take: each tile computes its own, some outputs at a
time, and the kernel is the same to rounding.
"""

from typing import Any

import pytest
import torch
from torch import nn

from nntk_dist import averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel
from nntk_dist.kernels import prepared

KERNELS: dict[str, Any] = {
    "local": lambda model, *x: local_kernel(model, *x),
    "full": lambda model, *x: local_kernel(model, *x, outputs="full"),
    "autodiff": lambda model, *x: nonlocal_kernel(model, *x, gamma=0.1, draws=16),
    "layered": lambda model, *x: nonlocal_kernel(model, *x, gamma=0.1, contraction="layered"),
    "activation": lambda model, *x: nonlocal_kernel(model, *x, gamma=0.1, draws=16, estimator="activation"),
    "weight": lambda model, *x: nonlocal_kernel(model, *x, gamma=0.1, draws=16, estimator="weight"),
    "averaged": lambda model, *x: averaged_kernel(model, *x, gamma=0.1, draws=16),
    "covariance": lambda model, *x: covariance_kernel(model, *x, gamma=0.1, draws=16),
}


@pytest.mark.parametrize("name", KERNELS)
def test_portions_of_the_outputs_give_the_same_kernel(name, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12)).double()
    x, others = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randn(3, 1, 6, 6, dtype=torch.float64)
    held: list[torch.Tensor] = []
    computed: list[torch.Tensor] = []
    sizes: list[list[int] | None] = []

    def counted(features, num_rows, item_bytes, **options):
        portions = output_portions(features, num_rows, item_bytes, **options)
        sizes.append(portions and [len(portion) for portion in portions])
        return portions

    output_portions = prepared.output_portions
    monkeypatch.setattr(prepared, "output_portions", counted)
    for results in (held, computed):
        for inputs in ((x,), (x, others)):
            kernel = KERNELS[name](model, *inputs)
            results.extend([kernel] if isinstance(kernel, torch.Tensor) else [kernel.kernel, kernel.stderr])
        monkeypatch.setattr(prepared, "feature_limit", lambda device: 1000)
    assert sizes[:2] == [None, None]
    assert all(portions is not None and sum(portions) == 12 for portions in sizes[2:])
    if name in ("local", "layered", "autodiff"):
        assert all(len(portions) > 1 for portions in sizes[2:])
    for expected, values in zip(held, computed, strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
