"""Decisions for models with noise, what is stored of them, and refusals.

Axes: n examples.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nntk_dist import (
    BlackBox,
    BrownianActivation,
    Dropout,
    NNTKError,
    averaged_kernel,
    covariance_kernel,
    fixed_noise,
    local_kernel,
    nonlocal_kernel,
)
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.noise import MEAN_FUNCTIONS
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.decision import decide
from nntk_dist.planning.jumps import probe_jumps
from nntk_dist.spec import KernelSpec
from tests.harness.tools import prepared_features
from tests.library.noisy_models import NOISE, P_DROP, ByExample, Jitter, Unseeded, X, network, seeded


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_outputs_are_means_over_fixed_functions_that_no_draw_has(noise):
    noisy = network(copy.deepcopy(noise))
    spec = KernelSpec(gamma=0.5, estimator="weight", draws=8, blocks=4, seed=6)
    features, _ = prepared_features(noisy, X, spec)
    values = []
    for group in MEAN_FUNCTIONS:
        with fixed_noise(noisy, 6, group):
            values.append(noisy(X).detach())
    expected = torch.stack(values).mean(0)
    torch.testing.assert_close(features.outputs(X, batch=4), expected, rtol=1e-12, atol=1e-12)
    assert len(MEAN_FUNCTIONS) == 64
    assert MEAN_FUNCTIONS.start > 65536


def test_choices_and_reasons():
    text = "the noise of 1 module is part of the expectation"
    dropout = nonlocal_kernel(network(Dropout(P_DROP)), X, gamma=0.5)
    assert dropout.estimator == "autodiff"
    assert text in dropout.reason
    assert "the noise of 2 modules is" in nonlocal_kernel(network(Dropout(0.1), Jitter()), X, gamma=0.5).reason
    assert "noise" not in nonlocal_kernel(network(), X, gamma=0.5).reason
    rough = nonlocal_kernel(network(activation=BrownianActivation(0.01)), X, gamma=0.5, draws=16)
    assert rough.estimator == "activation"
    reason = "autodiff is unavailable: the noise of module '1' makes the model nowhere differentiable; of 32 parameters"
    assert rough.reason.startswith(reason)
    layer = nn.Sequential(nn.Conv1d(1, 2, 2), BrownianActivation(0.01), nn.Flatten(), nn.Linear(4, 1, bias=False))
    assert nonlocal_kernel(seeded(layer), X[:, None], gamma=0.5, draws=16).estimator == "weight"


def test_the_jump_probe_passes_dropout_at_its_fixed_function():
    """The tests of the other activations check that the probe detects Brownian paths."""
    model = prepare_model(network(Dropout(P_DROP)), dtype=torch.float64, device="cpu")
    space = select_parameters(model)
    for gamma in (1e-3, 1.0):
        drawing = KernelSpec(gamma=gamma, draws=8).drawing("autodiff", space, model)
        assert probe_jumps(model, space, drawing, X).differentiable


def test_a_readout_that_noise_touches_is_none():
    """With noise behind the last layer, that layer's gradient is not its input."""
    noisy_end = seeded(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), Jitter()))
    estimate = nonlocal_kernel(noisy_end, X, gamma=0.5, estimator="activation", draws=16)
    assert "0 lie in the readout" in estimate.reason


def test_noise_with_a_black_box():
    box = BlackBox(lambda params, x: x @ params.reshape(3, 2), np.linspace(-1, 1, 6))
    estimate = nonlocal_kernel(nn.Sequential(box, Jitter()), X, gamma=0.5, draws=16)
    assert estimate.estimator == "weight"
    assert estimate.kernel.isfinite().all()


def test_local_kernels_are_refused():
    with pytest.raises(
        NNTKError, match=r"kind is 'local', but the model draws noise \(module '2'\), .*; use kind: averaged, which is"
    ):
        local_kernel(network(Dropout(0.1)), X)


def test_gradients_of_rough_noise_are_refused():
    model = network(activation=BrownianActivation())
    with pytest.raises(
        NNTKError,
        match=r"kind is 'averaged', .*but the noise of module '1' makes the model nowhere.*use kind: nonlocal",
    ):
        averaged_kernel(model, X, gamma=0.5)
    with pytest.raises(
        NNTKError, match=r"estimator is 'autodiff', but the noise of module '1' .*; use estimator: weight, activation"
    ):
        nonlocal_kernel(model, X, gamma=0.5, estimator="autodiff")
    assert covariance_kernel(model, X, gamma=0.5, draws=16).estimator == "weight"


def test_noise_of_an_example_s_own_is_refused():
    with pytest.raises(NNTKError, match=r"output for one example depends on the other examples of its batch"):
        nonlocal_kernel(network(ByExample()), X, gamma=0.5)


def test_unseeded_noise_is_refused_with_the_way_out():
    with pytest.raises(
        NNTKError,
        match=r"draws random numbers even in eval mode, which are not seeded; take them from an "
        r"nntk_dist.StochasticModule, or replace nn.Dropout by nntk_dist.replace_dropout",
    ):
        nonlocal_kernel(network(Unseeded()), X, gamma=0.5)


def test_groups_requests_and_modules_out_of_range(monkeypatch):
    for group in (-1, 1 << 32):
        with (
            pytest.raises(NNTKError, match=rf"group is {group}; allowed: 0 to 4294967295"),
            fixed_noise(Jitter(), 0, group),
        ):
            pass
    monkeypatch.setattr("nntk_dist.models.noise._MOST_MODULES", 1)
    with (
        pytest.raises(NNTKError, match="the model has 2 modules with noise; allowed: 1"),
        fixed_noise(nn.Sequential(Jitter(), Jitter())),
    ):
        pass
    monkeypatch.setattr("nntk_dist.models.noise._MOST_REQUESTS", 1)
    with pytest.raises(NNTKError, match=r"a Jitter asks for noise the 2th time in one pass, for 3 numbers; allowed: 1"):
        prepare_model(Jitter(), dtype=torch.float64, device="cpu")(X)


def test_a_decision_is_a_function_of_the_model_alone():
    """Decisions are made at one fixed random function, so that earlier passes do not matter."""
    model = prepare_model(network(Dropout(P_DROP), Jitter()), dtype=torch.float64, device="cpu")
    spec = KernelSpec(gamma=0.5)
    first = decide(model, X, spec, batch=4)
    with fixed_noise(model, 1, 1):
        model(X)
    assert decide(model, X, spec, batch=4) == first
