"""The sketched local kernel: made of independent groups of numbers, whose scatter is its error.

Axes: T seeds, Q groups, n examples, k numbers of a sketch.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nntk_dist import NNTKWarning, local_kernel, prepare_kernel
from nntk_dist.estimators.gradients import GradientFeatures
from tests.harness.tools import assert_equal
from tests.oracles.cases import case
from tests.oracles.statistics import assert_coverage, assert_mean_agrees, covered

GROUPS = 8


def kernel_of(name: str, **options):
    model, x = case(name).build(), case(name).inputs(4)
    return prepare_kernel(model, x, kind="local", **options), model, x


@pytest.mark.parametrize(("name", "outputs"), [("relu_mlp", "trace"), ("raw_parameters", "full"), ("convnet", 1)])
def test_kernel_and_error_are_mean_and_scatter_of_the_groups(name, outputs):
    kernel, _, x = kernel_of(name, outputs=outputs, sketch=128)
    features = kernel.features
    (numbers,) = features.compute(x, torch.arange(len(x)), range(1), features.columns).values()
    groups = numbers.reshape(-1, GROUPS, 128 // GROUPS).numpy()
    each = GROUPS * np.einsum("nqk,mqk->qnm", groups, groups)
    for found in (kernel(x), kernel(x, x)):
        assert found.stderr is not None
        assert_equal(found.kernel, each.mean(0))
        assert_equal(found.stderr, np.sqrt(each.var(0, ddof=1) / GROUPS))
    assert (found.draws, found.blocks) == (1, GROUPS)
    assert repr(found).startswith(f"KernelEstimate(shape {tuple(found.kernel.shape)}, autodiff, 1 draw, relative")


@pytest.mark.parametrize("options", [{"sketch": 64}, {"contraction": "sketch"}])
def test_a_sketch_is_made_only_if_asked_for(options):
    kernel, model, x = kernel_of("relu_mlp", **options)
    assert "contraction: sketch (k = " in kernel.decision.contraction
    assert torch.equal(local_kernel(model, x, **options), kernel(x).kernel)
    assert not torch.equal(local_kernel(model, x, seed=1, **options), kernel(x).kernel)
    assert "sketch" not in kernel_of("relu_mlp")[0].decision.contraction


def test_a_sketch_that_is_mostly_noise_is_warned_of():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(300, 1), torch.randn(300, 300)  # an identity, to a sketch of 64 numbers
    with pytest.warns(NNTKWarning, match=r"its sketch's estimated relative error is .*; make sketch larger"):
        prepare_kernel(model, x, kind="local", sketch=64)(x)


@pytest.mark.statistical
@pytest.mark.parametrize(("name", "outputs"), [("relu_mlp", "trace"), ("raw_parameters", "full")])
def test_sketches_are_unbiased_and_their_intervals_cover(name, outputs):
    kernel, model, x = kernel_of(name, outputs=outputs, sketch=256)
    assert isinstance(kernel.features, GradientFeatures)
    assert kernel.features.sketch is not None
    values, errors = [], []
    for seed in range(200):
        features = replace(kernel.features, sketch=replace(kernel.features.sketch, seed=seed))
        found = replace(kernel, features=features)(x)
        assert found.stderr is not None
        values.append(found.kernel.numpy())
        errors.append(found.stderr.numpy())
    exact = local_kernel(model, x, outputs=outputs).numpy()
    assert_mean_agrees(np.stack(values), exact)
    assert_coverage(covered(np.stack(values), exact, np.stack(errors), GROUPS))
