"""Which parameters are found behind elementwise functions, and how: in all the ways that people quantise weights."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from nntk_dist.estimators.weight_noise.noisy_weights import NoisyWeights, Pieces, find_noisy_weights
from nntk_dist.models.evaluation import Evaluator, prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.smoothing import PiecewiseLinear
from nntk_dist.spec import KernelSpec
from tests.library.estimators.weight_noise.quantised_models import STEP, quantised

SEQUENTIAL = ("own forward", "signs", "straight through", "function of autograd", "transposed")
QUANTISED = dict.fromkeys(SEQUENTIAL, ("0.weight", "2.weight")) | {
    "parametrisation": ("0.parametrizations.weight.original", "2.parametrizations.weight.original"),
    "convolution": ("0.weight", "3.weight"),
    "tokens": ("first.weight", "second.weight"),
    "leaking": ("layer.weight",),
}


def found_in(name: str, dtype: torch.dtype = torch.float64) -> NoisyWeights | None:
    model, x = quantised(name)
    model = prepare_model(model, dtype=dtype, device="cpu")
    space, spec = select_parameters(model), KernelSpec(gamma=0.3, estimator="weight")
    return find_noisy_weights(Evaluator(model, space), spec.drawing("weight", space, model), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_found(name, dtype):
    found = found_in(name, dtype)
    assert found is not None
    own = {each.name: each for each in found.weights if each.is_quantised}
    assert tuple(own) == QUANTISED[name]
    for each in own.values():
        places = [0.0] if name == "signs" else [-STEP, 0.0, STEP]
        np.testing.assert_allclose(each.function.breaks, places, atol=1e-9)
        np.testing.assert_allclose(each.function.jumps, STEP * (2.0 if name == "signs" else 1.0), rtol=1e-7)
        assert each.transposed == (name == "transposed")
        assert each.conditioned == (name != "leaking")
    others = [each for each in found.weights if not each.is_quantised]
    assert all(each.argument == "bias" for each in others)
    assert len({(each.call, each.argument) for each in found.weights}) == len(found.weights)


def test_pieces_that_are_not_flat_keep_their_normals():
    found = found_in("ramp")
    assert found is not None
    own = [each for each in found.weights if each.is_quantised]
    assert [len(each.function.breaks) for each in own] == [3, 3]
    assert Pieces.of(own[0].function).flat == (True, False, False, True)


def test_a_function_may_use_the_shape():
    found = found_in("shape")
    assert found is not None
    own = {each.name: each.function for each in found.weights if each.is_quantised}
    assert tuple(own) == ("0.weight",)
    np.testing.assert_allclose(own["0.weight"].jumps, 2.0 * STEP, rtol=1e-7)


@pytest.mark.parametrize("name", ["twice", "scaled", "not elementwise"])
def test_other_weights_are_not(name):
    assert found_in(name) is None


def test_the_mean_of_normals_on_a_flat_piece():
    """Against quadrature of the normal density over each piece."""
    function = PiecewiseLinear((-0.4, 0.1, 0.9), (1.0, 1.0, 0.0), (0.0, 0.0, 1.0), 0.0, 0.5)
    pieces = Pieces.of(function)
    assert pieces.flat == (True, True, True, False)
    theta, spread = torch.tensor([0.05, -1.0, 2.5], dtype=torch.float64), 0.3
    normals = torch.linspace(-3.0, 3.0, 9, dtype=torch.float64)[:, None].expand(-1, 3)
    found = pieces.conditional_normals(theta, normals, spread)
    ends = (-math.inf, *pieces.breaks, math.inf)
    for s, row in enumerate(normals):
        for p, n in enumerate(row.tolist()):
            piece = int(np.searchsorted(pieces.breaks, float(theta[p]) + spread * n))
            low, high = ((end - float(theta[p])) / spread for end in ends[piece : piece + 2])
            expected = n
            if pieces.flat[piece]:
                inner, accuracy = np.clip([low, high], -12.0, 12.0), {"epsabs": 1e-15, "epsrel": 1e-12}
                mass = integrate.quad(stats.norm.pdf, *inner, **accuracy)[0]
                expected = integrate.quad(lambda t: t * stats.norm.pdf(t), *inner, **accuracy)[0] / mass
            np.testing.assert_allclose(float(found[s, p]), expected, rtol=1e-9, atol=1e-10)


def test_the_mean_of_normals_on_a_narrow_piece_lies_on_it():
    function = PiecewiseLinear((0.0, 1e-13), (1.0, 1.0), (0.0, 0.0), 0.0, 0.0)
    normals = torch.tensor([[5e-14 / 0.3]], dtype=torch.float64)
    found = Pieces.of(function).conditional_normals(torch.zeros(1, dtype=torch.float64), normals, 0.3)
    assert 0.0 <= float(found) <= 1e-13 / 0.3
