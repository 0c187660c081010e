"""The definition of the estimator `activation` with control variates: every draw again, by loops in NumPy.

Means of activations under noise are closed forms, or quadrature of another kind.

Axes: S draws, R blocks, n examples, C outputs, P parameters.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import Tensor, nn

from nntk_dist.estimators.layer_noise.activation_gradients import ActivationGradients
from nntk_dist.models.builders.activations import Sign
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import Decision
from nntk_dist.planning.plain import to_plain
from tests.harness.tools import all_rows, assert_equal, estimates_of
from tests.library.estimators.layer_noise.smoothed_models import Round, features_of, perceptron, with_activations
from tests.oracles import brute_force

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(120)


def normal_mean(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """E f(ξ), the last axis that of ξ, of a smooth function."""
    return function(NODES) @ WEIGHTS / WEIGHTS.sum()


def smoothed_sign(a: np.ndarray, s: np.ndarray, place: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    t = (a - place) / s
    return erf(t / math.sqrt(2)), 2 * np.exp(-t * t / 2) / math.sqrt(2 * math.pi) / s


def smoothed_tanh(a: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    value = normal_mean(lambda xi: np.tanh(a[:, None] + s[:, None] * xi))
    return value, normal_mean(lambda xi: np.cosh(a[:, None] + s[:, None] * xi) ** -2.0)


def smoothed_round(a: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [smoothed_sign(a, s, place) for place in np.arange(-60, 60) + 0.5]
    return np.sum([part[0] for part in parts], axis=0) / 2, np.sum([part[1] for part in parts], axis=0) / 2


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
    ids, source = torch.arange(len(x)), features.reduced.draws
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
        differences = []
        for unit in range(len(h1)):  # at either side of a sign's jump
            sides = [np.where(np.arange(len(h1)) == unit, side, h1) for side in (1.0, -1.0)]
            above, below = (v @ smooth(alpha2 * (w2 @ side + b2) + beta2, np.abs(alpha2) * s2)[0] for side in sides)
            differences.append((above - below) * slope1[unit] / 2)
        flips = np.stack(differences, axis=1)
        return {"flips": flips,
                "h0": extended, "s1": s1, "h1": h1, "m1": smooth1, "d1": slope1, "m2": smooth2, "d2": slope2,
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
            first = p["flips"] if features.flips else first
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
@pytest.mark.parametrize("flips", [True, False])
def test_statistics_are_those_of_the_definition(contraction, outputs, design, flips):
    model, x = perceptron()
    features, spec, _ = features_of(model, x, flips=flips, contraction=contraction, outputs=outputs, design=design)
    assert bool(features.flips) == flips
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
