"""The table of models people bring, crossed with the public functions.

Axes: n examples.
"""

import importlib
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import Tensor, nn

from nntk_dist import averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel
from nntk_dist.errors import NNTKError
from tests.models_people_bring.case import Case, Computed, Refused

FILES = ("recurrent", "attention", "layers", "control_flow", "precision", "wrappers", "inputs", "refused")
CASES: tuple[Case, ...] = tuple(
    case for name in FILES for case in importlib.import_module(f"tests.models_people_bring.{name}").CASES
)
NAMES = [case.name for case in CASES]
EVERY = pytest.mark.parametrize("case", CASES, ids=NAMES)
OTHERS = {
    "covariance": lambda model, x, **options: covariance_kernel(model, x, gamma=0.01, draws=16, **options).kernel,
    "averaged": lambda model, x, **options: averaged_kernel(model, x, gamma=1e-3, draws=8, **options).kernel,
}


def test_the_table_is_large_and_its_names_are_unique():
    assert len(CASES) >= 60
    assert len(set(NAMES)) == len(NAMES)


@EVERY
def test_local_kernels(case: Case):
    given = case.given()
    if isinstance(case.right, Refused):
        with pytest.raises(case.right.error, match=case.right.match):
            local_kernel(given.model, given.x, **given.options)
        return
    expected = case.expected()
    kernel = local_kernel(given.model, given.x, **given.options).double()
    assert (kernel - expected).abs().max() <= case.right.tolerance * expected.abs().max()


@pytest.mark.statistical
@EVERY
def test_nonlocal_kernels_at_a_small_range(case: Case):
    """At γ = 1e-3 the nonlocal kernel of a smooth model is the local one, but for a term of order γ²."""
    given, right = case.given(), case.right
    if isinstance(right, Refused) and right.estimator is None:
        with pytest.raises(right.error, match=right.match):
            nonlocal_kernel(given.model, given.x, gamma=1e-3, **given.options)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        estimate = nonlocal_kernel(given.model, given.x, gamma=1e-3, **given.options)
    assert estimate.estimator == right.estimator, estimate.reason
    if isinstance(right, Computed) and right.estimator == "autodiff":
        expected = case.expected()
        distance = float((estimate.kernel.double() - expected).norm() / expected.norm())
        assert distance <= 3 * estimate.relative_error_bound + max(1e-5, right.tolerance)


def state(model: object) -> str:
    """The parameters and buffers of a model, in words."""
    return str(model.state_dict()) if isinstance(model, nn.Module) else ""


@pytest.mark.statistical
@EVERY
def test_every_other_kernel_is_finite_or_refused(case: Case):
    """No exception but the library's own, and the user's examples and model stay as they are; both kinds in turn."""
    function = tuple(OTHERS)[CASES.index(case) % 2]
    given = case.given()
    before, x = state(given.model), str(given.x)
    kernel: Tensor | None = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        refused = isinstance(case.right, Refused) or case.right.estimator != "autodiff"
        with suppress(NNTKError) if refused else nullcontext():
            kernel = OTHERS[function](given.model, given.x, **given.options)
    assert kernel is None or torch.isfinite(kernel).all()
    assert (before, x) == (state(given.model), str(given.x))
