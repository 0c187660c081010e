"""Every kernel under every radial law against quadrature, at a corrected 0.1 % and with power; one seed, many draws.

`test_unbiased` tests the Gaussian law; `test_laws` tests the laws themselves.

Axes: S draws, n examples.
"""

import pytest

from nntk_dist.sampling.laws import radial_names
from tests.harness.many_seeds import Problem, runs
from tests.oracles import closed_forms
from tests.oracles.statistics import assert_agrees, assert_power

pytestmark = pytest.mark.statistical

LAWS = [name for name in radial_names() if name != "gaussian"]
BLOCKS = 32


def enough(unit: str, name: str) -> int:
    """The draws needed for power; the fractional law concentrates at lengths that rarely flip a sign."""
    return 1 << 19 if (unit, name) == ("sign", "fractional") else 1 << 17


def assert_unbiased(problem: Problem, estimator: str, *, draws: int, design: str = "iid") -> None:
    """Compare one estimate with the exact kernel by its own standard error and Student's t."""
    result = runs(problem, estimator, range(1), draws=draws, blocks=BLOCKS, design=design)
    exact = problem.exact()
    assert_agrees(result.centre[0], exact, result.stderr[0], BLOCKS, rounding=1e-12)
    assert_power(result.stderr[0], exact, problem.local())


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("unit", closed_forms.UNITS)
def test_weight(unit, name):
    assert_unbiased(Problem(unit, 3, distribution=name), "weight", draws=enough(unit, name))


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("unit", closed_forms.LIPSCHITZ_UNITS)
def test_autodiff(unit, name):
    assert_unbiased(Problem(unit, 3, distribution=name), "autodiff", draws=1 << 16, design="antithetic")


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("unit", closed_forms.UNITS)
def test_covariance(unit, name):
    assert_unbiased(Problem(unit, 2, "covariance", distribution=name), "weight", draws=1 << 17)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("unit", closed_forms.LIPSCHITZ_UNITS)
def test_averaged(unit, name):
    assert_unbiased(Problem(unit, 2, "averaged", distribution=name), "autodiff", draws=1 << 15)


@pytest.mark.parametrize("name", radial_names())
@pytest.mark.parametrize(("unit", "estimator"), [("sign", "weight"), ("relu", "weight"), ("relu", "autodiff")])
def test_orthogonal_groups(unit, estimator, name):
    """Complete groups of four directions."""
    assert_unbiased(Problem(unit, 4, distribution=name), estimator, draws=enough(unit, name), design="orthogonal")


@pytest.mark.parametrize("name", ["gaussian", "fractional"])
@pytest.mark.parametrize(("kind", "estimator"), [("covariance", "weight"), ("averaged", "autodiff")])
def test_other_kernels_of_orthogonal_groups(kind, estimator, name):
    assert_unbiased(Problem("relu", 2, kind, distribution=name), estimator, draws=1 << 15, design="orthogonal")
