"""Nominal 95 % intervals contain the closed form as often as they should: 1,000 seeds, 8 blocks of 32 draws, many
flips.

Axes: T seeds, n examples.
"""

import numpy as np
import pytest
import torch

from nntk_dist import nonlocal_kernel
from nntk_dist.spec import KernelSpec
from tests.harness.many_seeds import Problem, check, runs
from tests.harness.tools import under_seeds
from tests.oracles.statistics import assert_coverage, assert_power, covered

SEEDS = range(1000)
BOUNDS = (0.92, 0.98)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("kind", "unit", "estimator", "design"),
    [
        ("nonlocal", "sign", "weight", "iid"),
        ("nonlocal", "relu", "weight", "iid"),
        ("nonlocal", "relu", "autodiff", "iid"),
        ("covariance", "sign", "weight", "iid"),
        ("averaged", "relu", "autodiff", "iid"),
        ("nonlocal", "sign", "weight", "orthogonal"),
        ("nonlocal", "relu", "autodiff", "orthogonal"),
        ("nonlocal", "sign", "weight", "antithetic"),
        ("nonlocal", "relu", "autodiff", "antithetic"),
    ],
)
def test_intervals_cover_the_closed_form(kind: str, unit: str, estimator: str, design: str):
    """Their centres are unbiased, too."""
    problem = Problem(unit, 4, kind)
    result = runs(problem, estimator, SEEDS, draws=256, design=design)
    assert_coverage(covered(result.centre, problem.exact(), result.stderr, 8), BOUNDS)
    assert_power(check(result.centre, problem.exact()), problem.exact(), problem.local())


@pytest.mark.statistical
def test_intervals_under_heavy_tails():
    """The law whose radii vary most."""
    problem = Problem("relu", 4, distribution="student")
    result = runs(problem, "weight", SEEDS, draws=256)
    assert_coverage(covered(result.centre, problem.exact(), result.stderr, 8), BOUNDS)
    assert_power(check(result.centre, problem.exact()), problem.exact(), problem.local())


@pytest.mark.statistical
@pytest.mark.parametrize("unit", ["sign", "relu"])
def test_stated_relative_error_is_the_error_made(unit: str):
    """Over seeds, the root mean squares of the stated and of the actual errors agree within a quarter."""
    problem = Problem(unit, 4)
    x, exact = torch.from_numpy(problem.x), problem.exact()
    stated, made = [], []
    spec = KernelSpec(gamma=1.5, estimator="weight", draws=256)
    for estimate in under_seeds(problem.model(), x, spec, range(300)):
        stated.append(estimate.relative_error)
        made.append(np.linalg.norm(estimate.unbiased.numpy() - exact) / np.linalg.norm(exact))
    ratio = np.sqrt(np.mean(np.square(stated)) / np.mean(np.square(made)))
    assert 0.8 < ratio < 1.25


def test_intervals_of_the_result_are_those_that_were_counted():
    problem = Problem("relu", 4)
    result = runs(problem, "weight", range(3), draws=256)
    hits = covered(result.centre, problem.exact(), result.stderr, 8)
    x, exact = torch.from_numpy(problem.x), torch.from_numpy(problem.exact())
    for seed in range(3):
        low, high = nonlocal_kernel(problem.model(), x, gamma=1.5, estimator="weight", draws=256, seed=seed).interval()
        assert np.array_equal(((low <= exact) & (exact <= high)).numpy(), hits[seed])
