"""Networks under every distribution: estimators against quadrature or brute force at a corrected 0.1 %, with power.

A part of the table that `scripts/estimators.py` makes in full, by the same code and with the same seeds. Units are left
to `tests/library/statistics/test_unbiased.py`; for each network only the fast estimators, designs and laws run.

Axes: n examples, S draws.
"""

import numpy as np
import pytest

from scripts.studies import agreement
from scripts.studies.agreement import BLOCKS, LAWS, estimate, reference
from tests.oracles.statistics import assert_agrees, assert_power

pytestmark = pytest.mark.statistical

WEIGHT = {
    "sign network": ("iid", "antithetic", "orthogonal", "iid", "antithetic", "iid"),
    "relu network": ("antithetic", "orthogonal", "iid", "orthogonal", "iid", "antithetic"),
    "quantised network": ("orthogonal", "iid", "antithetic", "orthogonal", "iid", "antithetic"),
}
OTHERS = [
    ("relu network", "ball", "autodiff", "antithetic"),
    ("sign network", "gaussian", "activation", "antithetic"),
    ("relu network", "gaussian", "activation", "iid"),
    ("convnet", "gaussian", "activation", "iid"),
    ("transformer", "fractional", "weight", "orthogonal"),
]
DIFFERENCES = [
    (name, law, "weight", design) for name, designs in WEIGHT.items() for law, design in zip(LAWS, designs, strict=True)
]


@pytest.mark.parametrize(("name", "law", "estimator", "design"), DIFFERENCES + OTHERS)
def test_networks_have_the_kernel_of_the_reference(name: str, law: str, estimator: str, design: str):
    assert (estimator, design) in agreement.valid(name, law)
    truth = reference(name, law)
    kernel, stderr, _ = estimate(name, law, estimator, design)
    error = np.hypot(stderr, truth.stderr)
    assert_agrees(kernel, truth.kernel, error, BLOCKS)
    assert_power(error, truth.kernel, truth.local)
