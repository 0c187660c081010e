"""The estimator `activation` with integrated noise and control variates: its definition, its mean, its limits.

The oracle of the definition recomputes every draw by loops in NumPy from the same normals; that of the mean is the
plain estimator.

Axes: S draws, R blocks, n examples, C outputs, P parameters.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf
from scipy.stats import t as student
from torch import Tensor, nn

from nntk_dist.estimators.layer_noise.activation_features import ActivationFeatures
from nntk_dist.estimators.layer_noise.activation_gradients import ActivationGradients
from nntk_dist.layers.sketches.sketch import Sketch
from nntk_dist.models.builders import build_model
from nntk_dist.models.builders.activations import Sign, make_activation
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import Decision
from nntk_dist.planning.plain import to_plain
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, assert_equal, calibration_of, estimates_of, prepared_features
from tests.library.noisy_models import Jitter
from tests.oracles import brute_force
from tests.oracles.statistics import assert_coverage, covered

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(120)
OPTIONS: dict[str, Any] = {"gamma": 0.4, "estimator": "activation", "variance_reduction": "auto", "draws": 16}


def inputs(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def built(builder: str, args: dict[str, Any], shape: tuple[int, ...], outputs: int = 3) -> nn.Module:
    model = build_model(builder, args, input_shape=shape, num_outputs=outputs, seed=0)
    return prepare_model(model, dtype=torch.float64, device="cpu")


def perceptron(activation: str | dict[str, Any] = "sign", widths: tuple[int, ...] = (7, 6)) -> tuple[nn.Module, Tensor]:
    return built("mlp", {"widths": widths, "activation": activation}, (4,)), inputs(5, 4)


def features_of(model: nn.Module, x: Tensor, **options: Any) -> tuple[ActivationGradients, KernelSpec, Decision]:
    spec = KernelSpec(**OPTIONS | options)
    features, decision = prepared_features(model, x, spec)
    assert isinstance(features, ActivationGradients)
    return features, spec, decision


class Round(nn.Module):
    """Stairs without end."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x)


class ThirdGelu(nn.Module):
    """A curve with a jump."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x) + torch.sign(x - 0.3) / 3.0


def with_activations(make: type[nn.Module], widths: tuple[int, ...] = (7, 6)) -> tuple[nn.Module, Tensor]:
    model, x = perceptron(widths=widths)
    for place in range(len(widths)):
        setattr(model, f"activation{place}", make())
    return model, x


def normal_mean(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """E f(ξ), the last axis that of ξ, of a smooth function."""
    return function(NODES) @ WEIGHTS / WEIGHTS.sum()


def smoothed_sign(a: np.ndarray, s: float | np.ndarray, place: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    t = (a - place) / s
    return erf(t / math.sqrt(2)), 2 * np.exp(-t * t / 2) / math.sqrt(2 * math.pi) / s


def smoothed_tanh(a: np.ndarray, s: float) -> tuple[np.ndarray, np.ndarray]:
    value = normal_mean(lambda xi: np.tanh(a[:, None] + s * xi))
    return value, normal_mean(lambda xi: np.cosh(a[:, None] + s * xi) ** -2.0)


def smoothed_round(a: np.ndarray, s: float) -> tuple[np.ndarray, np.ndarray]:
    parts = [smoothed_sign(a, s, place) for place in np.arange(-60, 60) + 0.5]
    return sum(part[0] for part in parts) / 2, sum(part[1] for part in parts) / 2


# φ, and φ̃ with its derivative
DEFINED: dict[str, Any] = {
    "sign": (np.sign, smoothed_sign),
    "tanh": (np.tanh, smoothed_tanh),
    "round": (np.round, smoothed_round),
}


def normalised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network with batch normalisation before its activations, of which some turn the sign."""
    generator = torch.Generator().manual_seed(seed)
    parts = dict(model.requires_grad_(True).named_children())
    for place in range(sum(name.startswith("hidden") for name in parts)):
        norm = nn.BatchNorm1d(parts[f"hidden{place}"].out_features).double().eval().requires_grad_(False)
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.copy_(0.5 * torch.randn(len(values), generator=generator, dtype=torch.float64) + 0.3)
        norm.running_var.copy_(torch.rand(len(norm.bias), generator=generator, dtype=torch.float64) + 0.5)
        parts[f"activation{place}"] = nn.Sequential(nn.Dropout(0.3), norm, parts[f"activation{place}"]).eval()
    return nn.Sequential(OrderedDict(parts))


def scale_and_shift(model: nn.Module, place: int) -> tuple[np.ndarray, np.ndarray]:
    activation = model.get_submodule(f"activation{place}")
    if not isinstance(activation, nn.Sequential):
        width = len(model.get_parameter(f"hidden{place}.bias"))
        return np.ones(width), np.zeros(width)
    norm = activation[1]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale.detach().numpy(), (norm.bias - scale * norm.running_mean).detach().numpy()


def draws_by_loops(features: ActivationGradients, model: nn.Module, x: Tensor, activation: str = "sign") -> np.ndarray:
    """The gradient of every draw, (S, n, C, P), of a network with two hidden layers.

    Scales and shifts between them and their activations do not move.
    """
    phi, smooth = DEFINED[activation]
    names = [f"{layer}.{kind}" for layer in ("hidden0", "hidden1", "output") for kind in ("weight", "bias")]
    w1, b1, w2, b2, v, c = (model.get_parameter(name).detach().numpy() for name in names)
    (alpha1, beta1), (alpha2, beta2) = (scale_and_shift(model, place) for place in range(2))
    ids, source = torch.arange(len(x)), features.smoothed.draws
    sigma, noise = (part for part in source.noise_of(ids, range(features.num_draws)))
    pilot_sigma, pilot_noise = source.pilot(ids, features.num_pilots)

    def one(h: np.ndarray, normals: np.ndarray, sigma: float) -> dict[str, Any]:
        """One pass: the second layer's noise is integrated."""
        extended = np.append(h, 1.0)
        s1 = sigma * np.linalg.norm(extended)
        a1 = w1 @ h + b1
        h1 = phi(alpha1 * (a1 + s1 * normals) + beta1)
        a2, s2 = w2 @ h1 + b2, sigma * np.linalg.norm(np.append(h1, 1.0))
        smooth1, slope1 = smooth(alpha1 * a1 + beta1, np.abs(alpha1) * s1)
        smooth2, slope2 = smooth(alpha2 * a2 + beta2, np.abs(alpha2) * s2)
        slope1, slope2 = alpha1 * slope1, alpha2 * slope2
        jacobian = (v * slope2) @ w2
        return {"h0": extended, "s1": s1, "h1": h1, "m1": smooth1, "d1": slope1, "m2": smooth2, "d2": slope2,
                "f": v @ smooth2 + c, "J": jacobian}  # fmt: skip

    result = []
    for draw in range(features.num_draws):
        rows = []
        for i, example in enumerate(x.numpy()):
            pilots = [
                one(example, pilot_noise["hidden0"][i, k, 0].numpy(), float(pilot_sigma[k]))
                for k in range(features.num_pilots)
            ]
            mean, jacobian = (np.mean([pilot[key] for pilot in pilots], axis=0) for key in ("f", "J"))
            normals = noise["hidden0"][i, draw, 0].numpy()
            p = one(example, normals, float(sigma[draw]))
            residual = p["f"] - mean - jacobian @ (p["h1"] - p["m1"])
            first = residual[:, None] * normals / p["s1"] + jacobian * p["d1"]
            second, extended = v * p["d2"], np.append(p["h1"], 1.0)
            gradients = []
            for k in range(len(v)):
                outer1, outer2 = np.outer(first[k], p["h0"]), np.outer(second[k], extended)
                readout = np.zeros_like(v), np.zeros_like(c)
                readout[0][k], readout[1][k] = p["m2"], 1.0
                gradients.append(
                    np.concatenate([outer1[:, :-1].ravel(), outer1[:, -1], outer2[:, :-1].ravel(), outer2[:, -1],
                                    readout[0].ravel(), readout[1]])
                )  # fmt: skip
            rows.append(np.stack(gradients))
        result.append(np.stack(rows))
    return np.stack(result)


@pytest.mark.parametrize("contraction", ["means", "layered", "auto"])
@pytest.mark.parametrize("outputs", ["trace", "full", 1])
@pytest.mark.parametrize("design", ["iid", "antithetic"])
def test_statistics_are_those_of_the_definition(contraction, outputs, design):
    model, x = perceptron()
    features, spec, _ = features_of(model, x, contraction=contraction, outputs=outputs, design=design)
    draws = draws_by_loops(features, model, x)
    draws = draws[:, :, [1]] if outputs == 1 else draws
    means = draws.reshape(features.num_blocks, -1, *draws.shape[1:]).mean(1)
    products = brute_force.block_products(means, means[:, :3], "full" if outputs == "full" else "trace")
    rows, others = all_rows(features, x), all_rows(features, x[:3])
    result = estimates_of(features, rows, others, spec)
    assert_equal(result["plugin"], products.mean((0, 1)))
    assert_equal(result["unbiased"], brute_force.unbiased(products))
    assert_equal(result["stderr"], brute_force.calibrated_stderr(products), relative=1e-9)


@pytest.mark.parametrize("name", ["sign", "round"])
def test_maps_of_single_units_may_be_in_between(name):
    model, x = with_activations({"sign": Sign, "round": Round}[name])
    model = prepare_model(normalised(model), dtype=torch.float64, device="cpu")
    features, spec, decision = features_of(model, x)
    assert "noise integrated: hidden1; control variates from 8 pilot draws: hidden0" in decision.contraction
    assert [each.affine for each in features.innovations] == [("activation0.1",), ("activation1.1",)]
    assert Decision.from_plain(to_plain(decision)) == decision
    draws = draws_by_loops(features, model, x, name)
    means = draws.reshape(features.num_blocks, -1, *draws.shape[1:]).mean(1)
    products = brute_force.block_products(means, means, "trace")
    result = estimates_of(features, all_rows(features, x), all_rows(features, x), spec)
    assert_equal(result["plugin"], products.mean((0, 1)))
    assert_equal(result["unbiased"], brute_force.unbiased(products))


class NormalisedConvnet(nn.Module):
    """A sign convnet whose batch normalisations move too, if they are selected."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second, self.head = nn.Conv2d(1, 3, 3, stride=3), nn.Conv2d(3, 4, 2), nn.Linear(4, 2)
        self.norm0, self.norm1, self.sign = nn.BatchNorm2d(3), nn.BatchNorm2d(4), Sign()
        for norm in (self.norm0, self.norm1):
            for values in (norm.bias.data, norm.running_mean):
                values.copy_(0.3 * torch.randn(len(values), generator=generator))
            norm.running_var.copy_(torch.rand(len(norm.bias), generator=generator) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.sign(self.norm0(self.first(x)))
        return self.head(self.sign(self.norm1(self.second(h))).mean((2, 3)))


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


@pytest.mark.parametrize(("name", "make"), [("tanh", nn.Tanh), ("round", Round)])
def test_statistics_of_other_activations_are_those_of_the_definition(name, make):
    """Quadrature is exact to 3e-8 of slopes; products are a thousand times larger than the smallest of them."""
    model, x = with_activations(make)
    features, spec, decision = features_of(model, x)
    assert "noise integrated: hidden1; control variates" in decision.contraction
    draws = draws_by_loops(features, model, x, name)
    means = draws.reshape(features.num_blocks, -1, *draws.shape[1:]).mean(1)
    products = brute_force.block_products(means, means, "trace")
    result = estimates_of(features, all_rows(features, x), all_rows(features, x), spec)
    relative = 1e-7 if name == "tanh" else 1e-10
    assert_equal(result["plugin"], products.mean((0, 1)), relative=relative)
    assert_equal(result["unbiased"], brute_force.unbiased(products), relative=relative)


def test_what_is_done_is_said_and_kept():
    model, x = perceptron(widths=(7, 6, 5))
    _, spec, decision = features_of(model, x)
    assert "noise integrated: hidden2; control variates from 8 pilot draws: hidden0, hidden1" in decision.contraction
    assert Decision.from_plain(to_plain(decision)) == decision
    plain, _ = prepared_features(model, x, replace(spec, variance_reduction="none"))
    assert isinstance(plain, ActivationFeatures)


def test_draws_in_portions_have_the_same_bits():
    model, x = perceptron()
    features, _, _ = features_of(model, x)
    whole, ids = all_rows(features, x), torch.arange(len(x))
    parts = [features.compute(x, ids, draws, features.columns) for draws in (range(8), range(8, 16))]
    for name, array in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), array), name
    some = features.compute(x[:2], ids[:2], range(16), features.columns, batch=5)
    again = features.compute(x, ids, range(16), features.columns, batch=5)
    for name, array in some.items():
        assert torch.equal(array[0], again[name][0]), name


def test_a_sketch_is_that_of_the_formed_gradients():
    model, x = perceptron()
    formed, _, decision = features_of(model, x, contraction="means")
    features, _, _ = features_of(model, x, contraction="sketch", sketch=64)
    assert features.storage.is_factor
    assert isinstance(features.sketch, Sketch)
    dense, total = all_rows(formed, x)["dense"], torch.zeros(())
    shapes = dict(zip(decision.space.names, decision.space.shapes, strict=True))
    parts = dense.split([math.prod(shapes[name]) for name in formed.plan.dense_names()], dim=3)
    for name, part in zip(formed.plan.dense_names(), parts, strict=True):
        gradient = part.flatten(0, 1).unflatten(2, shapes[name])
        total = total + features.sketch.of_gradient(name, gradient)
    assert_equal(all_rows(features, x)["sketch"].flatten(0, 1), total)


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


@pytest.mark.statistical
@pytest.mark.parametrize("name", MODELS)
def test_it_agrees_with_the_plain_estimator(name):
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
def test_intervals_cover(draws, blocks):
    model, x = perceptron("sign", (16, 12, 8))
    features, spec, _ = features_of(model, x, draws=draws, blocks=blocks)
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
