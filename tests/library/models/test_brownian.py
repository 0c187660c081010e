"""Brownian paths: their law at fixed points and over scales; each path is one function for all batches and calls.

Axes: j units, each with its own path; k points.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from nntk_dist import BrownianActivation, NNTKError, fixed_noise, nonlocal_kernel
from nntk_dist.models.brownian import brownian_paths
from nntk_dist.models.builders import build_model
from nntk_dist.models.noise import Noise
from tests.oracles.statistics import assert_mean_agrees

FINEST = 2.0**-20


def paths(points: list[float] | np.ndarray, num_units: int, noise: Noise | None = None) -> np.ndarray:
    """W at these points, for every unit, (k, j)."""
    place = torch.tensor(points, dtype=torch.float64)[:, None].expand(-1, num_units)
    return brownian_paths(noise or Noise(3, 1, 2), place).numpy()


def test_covariance_is_the_shorter_distance_from_zero_on_the_same_side():
    """Equivalent to independent increments on disjoint intervals and independent sides of zero. Points are multiples of
    the resolution; neighbours share cells of every size.
    """
    steps = [
        -(1 << 20),
        -(1 << 19) - 12_345,
        -87_654,
        -5,
        3,
        4,
        1 << 10,
        (1 << 12) - 1,
        (1 << 12) + 1,
        1 << 18,
        1 << 20,
    ]
    points = np.array(steps) * FINEST
    expected = np.minimum(np.abs(points)[:, None], np.abs(points)) * (np.sign(points)[:, None] == np.sign(points))
    scale = np.sqrt(np.abs(points))
    values = paths(points, 4000) / scale[:, None]
    assert_mean_agrees(np.einsum("kj,lj->jkl", values, values), expected / scale / scale[:, None])
    assert_mean_agrees(values.T, np.zeros(len(points)))
    for row in values:
        assert stats.kstest(row, "norm").pvalue > 1e-3 / len(points)


def test_squared_increments_are_their_lengths_at_every_scale():
    begin = np.round(np.linspace(-0.9, 0.8, 9) / FINEST) * FINEST
    lengths = 2.0 ** -np.arange(4, 21)
    ends = (begin[:, None] + lengths).ravel()
    values = paths(np.concatenate([begin, ends]), 500)
    increments = (values[len(begin) :].reshape(len(begin), len(lengths), -1) - values[: len(begin), None]) ** 2
    squares = np.moveaxis(increments, 2, 0) / lengths
    assert_mean_agrees(squares, np.ones(squares.shape[1:]))


@pytest.mark.parametrize("level", [6, 9, 12])
def test_quadratic_variation(level):
    """Σ (increments)² over 2^level cells has mean 1 and variance 2/2^level: a normal used twice would add to it."""
    values = paths(np.linspace(-1.0, 0.0, (1 << level) + 1), 40)
    variation = (np.diff(values, axis=0) ** 2).sum(0)
    assert_mean_agrees(variation, np.array(1.0))
    assert_mean_agrees((variation - 1.0) ** 2 * 2**level, np.array(2.0))


@pytest.mark.parametrize("centre", [0.0, 1 / 256, -3 / 256, 0.5, 0.5 + 1 / 512, -1.0 / 3, 5 / 65536])
def test_continuity(centre):
    """Steps of 1/4 of the finest cell, across cells of every size, change W by at most 7/4 deviations of that cell."""
    grid = centre + np.arange(-256, 257) * FINEST / 4
    assert np.abs(np.diff(paths(grid, 20), axis=0)).max() <= 7 * math.sqrt(FINEST) / 4


def test_paths_of_units_modules_groups_and_seeds_are_their_own():
    values = [paths([0.3], 1000, noise)[0] for noise in (Noise(), Noise(1), Noise(0, 1), Noise(0, 0, 1))]
    limit = 4.0 / math.sqrt(1000)  # two-sided normal quantile at 0.006 %, for the six pairs and six neighbours below
    for i, first in enumerate(values):
        assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < limit
        for other in values[:i]:
            assert abs(np.corrcoef(first, other)[0, 1]) < limit


def test_a_path_is_one_function_for_all_batches_and_calls():
    activation = BrownianActivation(sigma=0.7).eval()
    u = 5 * torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with fixed_noise(activation, seed=4, group=9):
        together = activation(u)
        assert torch.equal(activation(u[17:18]), together[17:18])
        assert torch.equal(activation(u.flip(0)).flip(0), together)
        torch.testing.assert_close(activation(u.float()).double(), together, rtol=0, atol=5e-3)
    with fixed_noise(activation, seed=4, group=10):
        assert not torch.isclose(activation(u), together).any()
    assert not torch.equal(activation(u), together)


def test_values_at_zero_and_beyond_the_reach():
    activation = BrownianActivation(sigma=0.5, reach=2.0).eval()
    u = torch.tensor([[0.0] * 4, [2.0] * 4, [2.5] * 4, [-2.0] * 4, [-1e9] * 4], dtype=torch.float64)
    values = activation(u) - torch.relu(u)
    assert not values[0].any()
    assert torch.equal(activation.path(u)[1], activation.path(u)[2])
    assert torch.equal(values[3], values[4])
    assert values[1].abs().min() > 0


def test_what_is_not_finite_stays_visible():
    activation = BrownianActivation().eval()
    values = activation(torch.tensor([[math.nan, math.inf, -math.inf]]))
    assert values[0, 0].isnan()
    assert values[0, 1] == math.inf
    assert values[0, 2] == activation(torch.full((1, 3), -32.0))[0, 2]


def test_the_scale_of_the_reach_is_brownian():
    """E B(u)² = |u| for every reach; another reach is the same path at another scale."""
    u = torch.full((1, 4000), 1.5, dtype=torch.float64)
    for reach in (2.0, 30.0):
        assert_mean_agrees(BrownianActivation(reach=reach).eval().path(u)[0].numpy() ** 2, np.array(1.5))
    short, long = (BrownianActivation(reach=reach).eval().path(u * reach / 4) for reach in (4.0, 16.0))
    torch.testing.assert_close(long, 2 * short, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stacked_networks_are_networks_in_turn(dtype):
    """Within ten roundings of a pre-activation below 4, with slopes of up to seven deviations of the finest cell."""
    args = {"widths": [6], "activation": {"name": "brownian", "sigma": 0.2}, "bias": False}
    models = [build_model("mlp", args, input_shape=(5,), num_outputs=3, seed=seed).to(dtype) for seed in range(3)]
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    parameters, _ = torch.func.stack_module_state(models)
    stacked = torch.func.vmap(lambda p: torch.func.functional_call(models[0], p, (x,)))(parameters)
    steepness = 0.2 * 7 / math.sqrt(32 * FINEST)
    tolerance = 10 * 4 * torch.finfo(dtype).eps * (1 + steepness)
    torch.testing.assert_close(stacked, torch.stack([model(x) for model in models]), rtol=0, atol=tolerance)


def test_deep_networks_are_not_refused_for_the_rounding_that_they_magnify():
    """In float64, and with `activation`, whose plan compares outputs that agree up to rounding."""
    args = {"widths": [16] * 4, "activation": {"name": "brownian", "sigma": 0.3}}
    model = build_model("mlp", args, input_shape=(8,), num_outputs=3, seed=0).double()
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimate = nonlocal_kernel(model, x, gamma=0.1, estimator="activation", draws=8)
    assert "in the pre-activations of 4 layers" in estimate.reason
    assert "51 lie in the readout" in estimate.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_func_takes_it(dtype):
    activation, u = BrownianActivation().eval(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    each = torch.func.vmap(lambda row: activation(row[None])[0])(u)
    assert torch.equal(each, activation(u))
    slopes = torch.func.vmap(torch.func.jacrev(lambda row: activation(row[None])[0]))(u)
    assert torch.equal(slopes, torch.diag_embed((u > 0).to(dtype)))


def test_training_draws_new_paths():
    activation = BrownianActivation().train()
    u = torch.ones(1, 4)
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(activation(u), activation(u))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0}, r"activation brownian: sigma is 0; give a positive number"),
        ({"sigma": "much"}, r"activation brownian: sigma is 'much'; give a positive number"),
        ({"reach": -1.0}, r"activation brownian: reach is -1.0; give a positive number"),
        ({"reach": math.inf}, r"activation brownian: reach is inf; give a positive number"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(NNTKError, match=message):
        BrownianActivation(**options)


def test_too_many_units():
    with pytest.raises(NNTKError, match=r"a Brownian activation has 4194305 units; allowed: 4194304"):
        BrownianActivation()(torch.zeros(1, (1 << 22) + 1))
