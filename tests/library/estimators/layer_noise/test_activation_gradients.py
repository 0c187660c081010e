"""The estimator `activation` with integrated noise and control variates: its mean, its errors, its limits.

The oracle of the mean is the plain estimator; the definition is in `test_activation_gradients_definition`.

Axes: S draws, R blocks, n examples, C outputs, P parameters.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from nntk_dist.estimators.activation import ActivationPlan
from nntk_dist.estimators.layer_noise.activation_features import ActivationFeatures
from nntk_dist.estimators.layer_noise.activation_gradients import ActivationGradients
from nntk_dist.layers.flips import Flip, find_flips
from nntk_dist.layers.sketches.sketch import IN, OUT, Sketch
from nntk_dist.models.builders.activations import Sign, make_activation
from nntk_dist.planning.decision import Decision
from nntk_dist.planning.plain import to_plain
from nntk_dist.products.block_sums import Meeting
from nntk_dist.products.wanted import Wanted
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, assert_equal, calibration_of, estimates_of, prepared_features
from tests.library.estimators.layer_noise.smoothed_models import (
    OPTIONS,
    NormalisedConvnet,
    Round,
    ThirdGelu,
    built,
    features_of,
    inputs,
    perceptron,
    with_activations,
)
from tests.library.noisy_models import Jitter
from tests.oracles.statistics import assert_coverage, covered


def test_batch_normalisation_costs_no_accuracy():
    """Between convolution and sign, its own parameters fixed: 64 draws are as good as without it."""
    torch.manual_seed(0)
    model, x = NormalisedConvnet().double().eval(), inputs(5, 1, 8, 8)
    errors = {}
    for reduction in ("auto", "none"):
        options = OPTIONS | {"variance_reduction": reduction, "draws": 64, "parameters": ("first.*", "second.*")}
        features, decision = prepared_features(model, x, KernelSpec(**options))
        if reduction == "auto":
            assert "noise integrated: second; control variates" in decision.contraction
            assert [each.affine for each in features.innovations] == [("norm0",), ("norm1",)]
        rows = all_rows(features, x)
        errors[reduction] = calibration_of(features, rows, rows, KernelSpec(**options)).relative_error
    assert errors["auto"] < 0.3 * errors["none"]


def test_what_is_done_is_said_and_kept():
    model, x = perceptron(widths=(7, 6, 5))
    _, spec, decision = features_of(model, x)
    assert "noise integrated: hidden2; control variates from 8 pilot draws: hidden0, hidden1" in decision.contraction
    assert Decision.from_plain(to_plain(decision)) == decision
    assert isinstance(decision.plan, ActivationPlan)
    assert decision.plan.reduced is not None
    flipped = replace(decision.plan.reduced, flips=(Flip("hidden1", "hidden2"),))
    assert flipped.text == (
        "noise integrated: hidden2; units set to either side of their jumps: hidden1; control variates from 8 pilot "
        "draws: hidden0"
    )
    own = replace(decision, plan=replace(decision.plan, reduced=flipped))
    assert Decision.from_plain(to_plain(own)) == own
    plain, _ = prepared_features(model, x, replace(spec, variance_reduction="none"))
    assert isinstance(plain, ActivationFeatures)


@pytest.mark.parametrize("make", [Sign, Round, nn.Tanh, ThirdGelu])
def test_draws_in_portions_have_the_same_bits(make):
    model, x = with_activations(make)
    features, _, _ = features_of(model, x)
    whole, ids = all_rows(features, x), torch.arange(len(x))
    parts = [features.compute(x, ids, draws, features.columns) for draws in (range(8), range(8, 16))]
    for name, array in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), array), name
    some = features.compute(x[:2], ids[:2], range(16), features.columns, batch=5)
    again = features.compute(x, ids, range(16), features.columns, batch=5)
    for name, array in some.items():
        assert torch.equal(array[0], again[name][0]), name


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_a_sketch_is_that_of_the_formed_gradients(outputs, flips):
    """Sums of u·G·v, complex, over the gradients; the bias of a hidden layer is one more input, with its own v."""
    model, x = perceptron()
    formed, _, decision = features_of(model, x, flips=flips, contraction="means", outputs=outputs)
    features, _, _ = features_of(model, x, flips=flips, contraction="sketch", sketch=64, outputs=outputs)
    assert bool(features.flips) == flips
    assert features.storage.is_factor
    sketch = features.sketch
    assert isinstance(sketch, Sketch)
    shapes = dict(zip(decision.space.names, decision.space.shapes, strict=True))
    names = formed.plan.dense_names()
    dense = all_rows(formed, x)
    parts = dict(zip(names, dense["dense"].split([math.prod(shapes[n]) for n in names], dim=3), strict=True))

    def probes(name: str, side: int, count: int) -> Tensor:
        pairs = sketch.probes(name, side, torch.arange(count), torch.float64)
        return torch.complex(pairs[:, ::2], pairs[:, 1::2])

    expected = torch.zeros((), dtype=torch.complex128)
    for layer, is_readout in (("hidden0", False), ("hidden1", False), ("output", True)):
        units, inputs = shapes[f"{layer}.weight"]
        gradient = parts[f"{layer}.weight"].unflatten(3, (units, inputs)).to(torch.complex128)
        bias = parts[f"{layer}.bias"].to(torch.complex128)
        count = 3 * units if sketch.joint else units
        out = probes(f"{layer}.weight", OUT, count).unflatten(0, (-1, units)).expand(3, -1, -1)
        out_of_bias = out * probes(f"{layer}.bias", IN, 1)
        if is_readout:
            out_of_bias = math.sqrt(2) * probes(f"{layer}.bias", OUT, count).unflatten(0, (-1, units)).expand(3, -1, -1)
        expected = expected + torch.einsum("nrcui,cuk,ik->nrck", gradient, out, probes(f"{layer}.weight", IN, inputs))
        expected = expected + torch.einsum("nrcu,cuk->nrck", bias, out_of_bias)
    expected = expected.sum(2) if sketch.joint else expected
    assert_equal(all_rows(features, x)["sketch"], torch.view_as_real(expected).flatten(-2) / math.sqrt(128))


class Gate(nn.Module):
    """Two branches that multiply each other: each is affine, and its derivative depends on the other's noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5)
        self.head, self.relu = nn.Linear(5, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        return self.head(self.relu(self.left(h)) * self.relu(self.right(h)))


class Skip(nn.Module):
    """The last hidden layer goes past its activation too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.head = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        return self.head(self.relu(a) + torch.tanh(a))


class Tokens(nn.Module):
    """Layers that get three vectors of an example, with correlated noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2)
        self.sign = make_activation("sign")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.sign(self.second(self.sign(self.first(x)))).mean(1))


class Doubled(nn.Module):
    """Not elementwise: the noise itself is the control variate."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * (1.0 + 0.1 * x.mean(-1, keepdim=True))


@pytest.mark.parametrize("make", [Gate, Skip])
def test_noise_that_is_not_behind_the_activation_alone_is_not_integrated(make):
    torch.manual_seed(0)
    _, _, decision = features_of(make().double(), inputs(5, 4))
    assert "control variates" in decision.contraction
    assert "integrated" not in decision.contraction


def test_models_that_it_is_not_for_are_computed_plainly():
    torch.manual_seed(0)
    noisy = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Jitter(), nn.Linear(6, 2)).double()
    for options in ({}, {"parameters": {"first": "0.*", "last": "3.*"}}):
        model = noisy if not options else nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.ReLU(), nn.Linear(6, 2)).double()
        spec = KernelSpec(**OPTIONS | options)
        _, decision = prepared_features(model, inputs(5, 4), replace(spec, group="first") if options else spec)
        assert "control variates" not in decision.contraction
        assert "integrated" not in decision.contraction


def test_entries_that_no_noise_changed_are_unresolved():
    """Far from its jumps no draw changes the first layer; the second is integrated."""
    model, x = perceptron()
    with torch.no_grad():
        model.get_parameter("hidden0.bias").fill_(50.0)
    features, spec, _ = features_of(model, x)
    rows = all_rows(features, x)
    assert bool(torch.isnan(estimates_of(features, rows, rows, spec)["stderr"]).all())
    alone, single = perceptron(widths=(6,))  # its only layer is integrated
    features, spec, _ = features_of(alone, single)
    rows = all_rows(features, single)
    assert bool(torch.isfinite(estimates_of(features, rows, rows, spec)["stderr"]).all())


MODELS: dict[str, Any] = {
    "sign, one layer": lambda: perceptron(widths=(8,)),
    "sign, three layers": lambda: perceptron(widths=(8, 7, 6)),
    "step with bias": lambda: perceptron("step"),
    "quantised": lambda: perceptron({"name": "quantize", "levels": 4}, (8, 7, 6)),
    "relu": lambda: perceptron("relu", (8, 7, 6)),
    "tanh": lambda: perceptron("tanh", (8, 7)),
    "gelu": lambda: perceptron("gelu", (8, 7, 6)),
    "round": lambda: with_activations(Round, (8, 7)),
    "elu": lambda: with_activations(nn.ELU, (8, 7)),
    "a curve with a jump": lambda: with_activations(ThirdGelu, (8, 7)),
    "no elementwise activation": lambda: with_activations(Doubled, (8, 7)),
    "sign convnet": lambda: (built("cnn", {"activation": "sign", "channels": [3, 4]}, (1, 8, 8)), inputs(5, 1, 8, 8)),
    "batch normalisation": lambda: (NormalisedConvnet().double().eval(), inputs(5, 1, 8, 8)),
    "tokens": lambda: (Tokens().double(), inputs(5, 3, 6)),
    "gate": lambda: (Gate().double(), inputs(5, 4)),
    "skip": lambda: (Skip().double(), inputs(5, 4)),
    "relative": lambda: perceptron("sign", (8, 7)),
}


FLIPPED = ("sign, three layers", "step with bias", "quantised", "relative")


@pytest.mark.statistical
@pytest.mark.parametrize(("name", "flips"), [*((name, False) for name in MODELS), *((name, True) for name in FLIPPED)])
def test_it_agrees_with_the_plain_estimator(name, flips):
    """Means over 48 seeds of either, compared entry by entry at a corrected level of 0.1 %."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    options = OPTIONS | ({"gamma_scale": "relative"} if name == "relative" else {})
    found: dict[str, list[np.ndarray]] = {"auto": [], "none": []}
    for reduction, draws in (("auto", 32), ("none", 512)):
        features, _ = prepared_features(
            model, x, KernelSpec(**options | {"variance_reduction": reduction, "draws": draws})
        )
        assert isinstance(features, ActivationGradients) == (reduction == "auto")
        if isinstance(features, ActivationGradients):
            possible = find_flips(model, features.noise, features.innovations, x, len(features.columns))
            features = replace(features, flips=possible if flips else (), num_pilots=8)
            assert bool(features.flips) == flips
        for seed in range(48):
            own = replace(features, drawing=replace(features.drawing, seed=seed))
            rows = all_rows(own, x)
            found[reduction].append(estimates_of(own, rows, rows, KernelSpec(**options))["unbiased"].numpy())
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    errors = {name: np.std(values, axis=0, ddof=1) / math.sqrt(48) for name, values in found.items()}
    z = (means["auto"] - means["none"]) / np.hypot(errors["auto"], errors["none"])
    count = len(x) * (len(x) + 1) // 2
    assert np.abs(z).max() < student.isf(0.0005 / count, 47)
    # errors of both together are small beside the kernel, so that a wrong term would show
    assert np.hypot(errors["auto"], errors["none"]).mean() < 0.02 * np.diag(means["none"]).mean()


@pytest.mark.statistical
@pytest.mark.parametrize(("draws", "blocks"), [(32, 4), (32, 8), (256, 8)])
@pytest.mark.parametrize("flips", [True, False])
def test_intervals_cover(draws, blocks, flips):
    model, x = perceptron("sign", (16, 12, 8))
    features, spec, _ = features_of(model, x, flips=flips, draws=draws, blocks=blocks)
    values, stderrs = [], []
    for seed in range(200 if draws < 100 else 60):
        assert features.drawing is not None
        own = replace(features, drawing=replace(features.drawing, seed=seed))
        rows = all_rows(own, x)
        found = estimates_of(own, rows, rows, spec)
        values.append(found["unbiased"].numpy())
        stderrs.append(found["stderr"].numpy())
    exact, _, _ = features_of(model, x, draws=8192, seed=12345)
    rows = all_rows(exact, x)
    truth = estimates_of(exact, rows, rows, spec)["unbiased"].numpy()
    assert_coverage(covered(np.stack(values), truth, np.stack(stderrs), blocks))


def test_the_error_is_a_tenth_of_the_plain_one():
    """A sign network of two hidden layers, 64 draws."""
    model, x = perceptron("sign", (32, 24))
    errors = {}
    for reduction in ("auto", "none"):
        features, _ = prepared_features(
            model, x, KernelSpec(**OPTIONS | {"variance_reduction": reduction, "draws": 64})
        )
        rows = all_rows(features, x)
        errors[reduction] = calibration_of(features, rows, rows, KernelSpec(**OPTIONS)).relative_error
    assert errors["auto"] < 0.2 * errors["none"]


def test_units_are_set_if_that_is_worth_its_price():
    """On wide inputs with few outputs, where plugin counts; without plugin, control variates alone are cheaper."""
    model = built("mlp", {"widths": (24, 24), "activation": "sign"}, (400,))
    x = inputs(6, 400)
    chosen = {
        statistic: prepared_features(model, x, KernelSpec(**OPTIONS | {"statistic": statistic, "gamma": 0.05}))[0]
        for statistic in ("both", "unbiased")
    }
    assert isinstance(chosen["both"], ActivationGradients)
    assert chosen["both"].flips == (Flip("hidden0", "hidden1"),)
    costs = [chosen[name].costs(Meeting(), Wanted(stderr=True)).passes_per_draw for name in ("both", "unbiased")]
    assert all(cost > 1.0 for cost in costs)
