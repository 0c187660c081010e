"""Estimates against closed forms in float64: unbiased at a corrected 0.1 %, tested with power.

The mean over independent seeds of few draws each is compared, as a bias is largest with few draws. Its standard error
is the seeds' own scatter; every comparison must have the power that `assert_power` requires.

Axes: T seeds, S draws, n examples.
"""

import numpy as np
import pytest
import torch

from nntk_dist import nonlocal_kernel
from nntk_dist.spec import KernelSpec
from tests.harness.many_seeds import Problem, check, filled_in, gradient_features, runs
from tests.harness.tools import all_rows
from tests.oracles import closed_forms
from tests.oracles.statistics import assert_agrees, assert_power


@pytest.mark.statistical
@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("num_parameters", [3, 10])
@pytest.mark.parametrize("unit", closed_forms.UNITS)
def test_weight_with_gradients_formed(unit: str, num_parameters: int, design: str):
    problem = Problem(unit, num_parameters)
    result = runs(problem, "weight", range(64), draws=8192, design=design)
    assert_power(check(result.centre, problem.exact()), problem.exact(), problem.local())


@pytest.mark.statistical
@pytest.mark.parametrize(("unit", "num_parameters"), [("sign", 3), ("relu", 5)])
def test_weight_with_a_metric(unit: str, num_parameters: int):
    """With antithetic pairs; the tests of coverage use independent draws."""
    problem = Problem(unit, num_parameters)
    result = runs(problem, "weight", range(500), draws=256, design="antithetic")
    assert_power(check(result.centre, problem.exact()), problem.exact(), problem.local())


@pytest.mark.statistical
@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("num_parameters", [3, 10])
@pytest.mark.parametrize("unit", closed_forms.LIPSCHITZ_UNITS)
def test_autodiff(unit: str, num_parameters: int, design: str):
    problem = Problem(unit, num_parameters)
    result = runs(problem, "autodiff", range(1000), draws=64, design=design)
    assert_power(check(result.centre, problem.exact()), problem.exact(), problem.local())


@pytest.mark.statistical
@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("unit", closed_forms.UNITS)
def test_covariance(unit: str, design: str):
    problem = Problem(unit, 5, "covariance")
    result = runs(problem, "weight", range(500), draws=128, design=design)
    assert_power(check(result.centre, problem.exact()), problem.exact(), problem.local())


@pytest.mark.statistical
@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("unit", closed_forms.LIPSCHITZ_UNITS)
def test_averaged(unit: str, design: str):
    problem = Problem(unit, 5, "averaged")
    result = runs(problem, "autodiff", range(500), draws=64, design=design)
    assert_power(check(result.centre, problem.exact()), problem.exact(), problem.local())


@pytest.mark.statistical
@pytest.mark.parametrize("unit", ["linear", "sign", "relu"])
def test_plugin_is_inflated_by_as_much_as_is_said(unit: str):
    """E[plugin] = (1 − 1/S) Θ + (P/S) C for independent draws, hence E[plugin − U] = (P·C − Θ)/S, to 3 % of itself."""
    problem, draws = Problem(unit, 6), 64
    result = runs(problem, "weight", range(500), draws=draws)
    covariance = closed_forms.covariance_kernel(unit, problem.theta, problem.x, problem.x, problem.gamma)
    inflation = (6 * covariance - problem.exact()) / draws
    stderr = check(result.plugin - result.centre, inflation)
    assert stderr.max() < 0.03 * inflation.diagonal().mean()
    check(result.plugin, (1 - 1 / draws) * problem.exact() + 6 / draws * covariance)


@pytest.mark.parametrize("unit", closed_forms.LIPSCHITZ_UNITS)
@pytest.mark.parametrize("kind", ["nonlocal", "averaged"])
@pytest.mark.parametrize("design", ["iid", "antithetic"])
def test_gradients_filled_in_are_those_of_the_library(kind: str, unit: str, design: str):
    problem = Problem(unit, 5, kind)
    for seed in range(3):
        features = gradient_features(
            problem, KernelSpec(kind, problem.gamma, draws=32, blocks=4, design=design, seed=seed)
        )
        ours = all_rows(features, torch.from_numpy(problem.x))
        filled = filled_in(problem, features.drawing, features.draws_per_slot)
        torch.testing.assert_close(filled["dense"], ours["dense"], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("unit", ["sign", "relu"])
def test_one_estimate_of_many_draws_tells_its_own_error(unit: str):
    """The same statement with the library's standard error and Student's t, from one seed and 16,384 draws."""
    problem = Problem(unit, 4)
    x = torch.from_numpy(problem.x)
    estimate = nonlocal_kernel(problem.model(), x, gamma=problem.gamma, estimator="weight", draws=16_384, blocks=32)
    assert_agrees(estimate.unbiased, problem.exact(), estimate.stderr, 32)
    error = np.linalg.norm(estimate.unbiased.numpy() - problem.exact()) / np.linalg.norm(problem.exact())
    assert error < 3 * estimate.relative_error < 0.2
