"""Kernels of groups of parameters: parts of one gradient, from one set of passes, that add up to the whole.

Axes: S draws, R blocks, n examples, C outputs, P parameters.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import (
    ArgumentError,
    NNTKClassifier,
    NNTKError,
    Unavailable,
    averaged_kernel,
    covariance_kernel,
    local_kernel,
    nonlocal_kernel,
    prepare_kernel,
)
from nntk_dist.models.parameters import select_parameters
from nntk_dist.spec import KernelSpec
from tests.harness.tools import assert_equal, draws_by_definition
from tests.oracles import brute_force
from tests.oracles.cases import case
from tests.oracles.statistics import assert_agrees

GAMMA = 0.6


def problem(name: str) -> tuple[nn.Module, Tensor, dict[str, list[str]]]:
    """A model, examples, and its parameters in two groups that part the weight and the bias of each layer."""
    model = case(name).build()
    names = [each for each, _ in model.named_parameters()]
    return model, case(name).inputs(4), {"even": names[::2], "odd": names[1::2]}


@pytest.mark.filterwarnings("ignore:the kernel is mostly noise")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relu_mlp", {"draws": 8, "contraction": "layered"}),
        ("deep_relu_mlp", {"draws": 8, "outputs": "full"}),
        ("repeated_layer", {"draws": 8, "contraction": "means", "design": "antithetic"}),
        ("relu_mlp", {"draws": 16, "estimator": "weight", "design": "orthogonal"}),
        ("deep_relu_mlp", {"draws": 16, "estimator": "weight", "gamma_scale": "relative", "outputs": 1}),
    ],
)
def test_a_group_has_the_products_of_its_part_of_the_gradient(name, options):
    model, x, groups = problem(name)
    options = {"gamma": GAMMA, "blocks": 4, "statistic": "both", "scale": "raw"} | options
    whole = nonlocal_kernel(model, x, **options)
    found = nonlocal_kernel(model, x, parameters=groups, **options)
    assert list(found) == list(groups)
    for statistic in ("plugin", "unbiased"):
        assert_equal(sum(getattr(each, statistic) for each in found.values()), getattr(whole, statistic))
    if "gamma_scale" in options:  # which the definition lacks
        return
    spec = KernelSpec(**options)
    draws = draws_by_definition(model, x, spec, whole.estimator, ("*",))
    means = brute_force.block_means(draws, np.arange(len(draws)) * 4 // len(draws))
    space = select_parameters(model)
    for group, each in found.items():
        own = [np.arange(*interval) for interval in space.intervals(groups[group])]
        part = means[..., np.concatenate(own)]
        products = brute_force.block_products(part, part, spec.outputs) / space.num_parameters**2
        assert_equal(each.unbiased, brute_force.unbiased(products))
        assert_equal(each.stderr, brute_force.calibrated_stderr(products))
        assert f"group '{group}' has {part.shape[-1]} of the {space.num_parameters} parameters" in each.reason


@pytest.mark.parametrize("name", ["relu_mlp", "tied_weights", "raw_parameters", "convnet"])
def test_the_local_kernel_of_a_group_is_that_of_its_parameters(name):
    model, x, groups = problem(name)
    groups |= {"both": ["*"], "first": groups["even"][:1]}  # groups may share parameters
    found = local_kernel(model, x, x[:2], parameters=groups)
    for group, kernel in found.items():
        assert_equal(kernel, local_kernel(model, x, x[:2], parameters=groups[group]))
    assert_equal(found["even"] + found["odd"], found["both"])
    averaged = averaged_kernel(model, x, gamma=1e-9, parameters=groups)
    assert_equal(averaged["odd"].kernel, local_kernel(model, x, parameters=groups["odd"]), 1e-7)


@pytest.mark.filterwarnings("ignore:the kernel is mostly noise")
@pytest.mark.parametrize("name", ["tanh_mlp", "layer_norm", pytest.param("convnet", marks=pytest.mark.statistical)])
def test_noise_gives_each_group_its_part(name):
    """The whole by exact sums; each part by the local kernel, which it is at γ = 1e-3 to far less than its error."""
    model, x, groups = problem(name)
    options: dict[str, Any] = {"gamma": 1e-3, "estimator": "activation", "draws": 128, "statistic": "both"}
    options["variance_reduction"] = "none"  # parts of a kernel are computed without
    whole = nonlocal_kernel(model, x, contraction="means", **options)
    by_contraction = {
        contraction: nonlocal_kernel(model, x, parameters=groups | {"all": ["*"]}, contraction=contraction, **options)
        for contraction in ("layered", "means")
    }
    found = by_contraction["means"]
    assert_equal(found["all"].unbiased, whole.unbiased)
    for statistic in ("plugin", "unbiased"):
        assert_equal(sum(getattr(found[group], statistic) for group in groups), getattr(whole, statistic))
    for group, patterns in groups.items():
        assert_equal(by_contraction["layered"][group].stderr, found[group].stderr)
        exact = local_kernel(model, x, parameters=patterns).numpy()
        assert found[group].stderr is not None
        assert_agrees(found[group].unbiased, exact, found[group].stderr, 8)


def test_sketches_of_groups_have_their_own_numbers_and_errors():
    model, x, groups = problem("relu_mlp")
    for options in ({"kind": "local", "sketch": 64}, {"gamma": GAMMA, "contraction": "sketch", "sketch": 64}):
        kernel = prepare_kernel(model, x, parameters=groups, **options)
        assert repr(kernel).startswith("PreparedGroups(even, odd: PreparedKernel(")
        for each in kernel(x).values():
            assert each.stderr is not None
            assert (each.stderr > 0).all()
            assert 0.05 < each.relative_error < 1


def test_groups_take_the_passes_of_one_kernel(monkeypatch):
    """Also in tiles: without memory for the features, each group makes its own passes, and the numbers are the same."""
    model, x, groups = problem("relu_mlp")
    options: dict[str, Any] = {"gamma": GAMMA, "draws": 8, "blocks": 4, "contraction": "layered"}
    kernel, one = prepare_kernel(model, x, parameters=groups, **options), prepare_kernel(model, x, **options)
    calls: list[int] = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(1))
    try:
        one(x)
        single = len(calls)
        held = kernel(x)
        assert len(calls) == 2 * single
        monkeypatch.setattr("nntk_dist.kernels.groups.feature_limit", lambda device: 0)
        for name, each in kernel(x).items():
            assert_equal(each.kernel, held[name].kernel)
        assert len(calls) == 4 * single
    finally:
        hook.remove()


def test_frozen_parameters_follow_the_rules_of_a_list():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(3, 4)
    model[0].weight.requires_grad_(False)
    found = local_kernel(model, x, parameters={"first": "0.*", "named": ["0.weight"], "last": ["2.*"]})
    for group, patterns in {"first": ["0.bias"], "named": ["0.weight"], "last": ["2.*"]}.items():
        assert_equal(found[group], local_kernel(model, x, parameters=patterns), 1e-6)
    with pytest.raises(ArgumentError, match=r"parameters\.first: all 1 parameters that match are frozen.* in parame"):
        local_kernel(model, x, parameters={"first": ["0.w*"], "last": ["2.*"]})
    with pytest.raises(ArgumentError, match=r"parameters\.last: the pattern '3\.\*' matches none of the model's 4"):
        local_kernel(model, x, parameters={"first": ["0.*"], "last": ["3.*"]})


class Plain:
    """A user's estimator that knows nothing of groups."""

    uses_gradients = moves_parameters = forms_gradients = False


PLAIN = Plain()


@pytest.mark.parametrize("groups", [{}, {"a/b": ["*"]}, {"": ["*"]}, {"a": []}, {"a": [1]}, {1: ["*"]}])
def test_groups_need_names_and_patterns(groups):
    model, x, _ = problem("relu_mlp")
    with pytest.raises(ArgumentError, match=r"parameters is .*; allowed: a list .*, or a mapping of group names"):
        local_kernel(model, x, parameters=groups)


def test_what_has_no_groups():
    model, x, groups = problem("relu_mlp")
    with pytest.raises(
        ArgumentError, match=r"parameters is a mapping .* allowed for kind covariance, .*: a list of na"
    ):
        covariance_kernel(model, x, gamma=GAMMA, parameters=groups)
    with pytest.raises(ArgumentError, match=r"rtol is 0\.1; allowed for parameters in groups, .*: none \(set draws\)"):
        nonlocal_kernel(model, x, gamma=GAMMA, rtol=0.1, parameters=groups)
    own = f"python:{__name__}:PLAIN"
    with pytest.raises(
        Unavailable, match=r"PLAIN has no kernels of groups of parameters; use estimator: weight or aut"
    ):
        nonlocal_kernel(model, x, gamma=GAMMA, estimator=own, parameters=groups)
    with pytest.raises(NNTKError, match=r"parameters is a mapping .*; allowed for NNTKClassifier: a list of name patt"):
        NNTKClassifier(model, gamma=GAMMA, parameters=groups).fit(x.numpy(), np.array([0, 1, 2, 0]))
