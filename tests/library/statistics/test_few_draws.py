"""Intervals of entries from few draws a block: the coverage that the documentation states, and the warning beside it.

Axes: T trials, R blocks, m draws a block, n examples, P parameters.
"""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from nntk_dist import NNTKWarning, nonlocal_kernel
from nntk_dist.statistics.few_draws import interval_caution
from nntk_dist.statistics.standard_errors import calibrate, jackknife_variance, t_quantile
from tests.oracles import closed_forms

GAMMA, THETA = 1.5, np.array([1.0, 0.0, 0.0, 0.0])
MARGINS = np.array([0.9, -0.6, 0.3])
X = np.stack([MARGINS, *np.eye(3) * np.sqrt(1 - MARGINS**2)], axis=1)
UNITS = {"relu": lambda u: np.maximum(u, 0.0), "sign": np.sign}


def trials(unit, blocks, draws_per_block, count, seed=0):
    """Estimates, standard errors and bounds of the error, from `weight` draws in NumPy, (T, n, n) and (T,)."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((count, blocks, draws_per_block, 4)) * GAMMA / np.sqrt(2)
    differences = UNITS[unit]((THETA + z) @ X.T) - UNITS[unit](X @ THETA)
    weights = 4 * z / np.square(z).sum(-1, keepdims=True)
    gradients = np.einsum("trmn,trmp->trnp", differences, weights) / draws_per_block
    products = torch.from_numpy(np.einsum("trnp,tskp->trsnk", gradients, gradients))
    off_diagonal = ~torch.eye(blocks, dtype=torch.bool)[None, :, :, None, None]
    by_block = (0.5 * (products + products.transpose(1, 2)) * off_diagonal).sum(2)
    found = [calibrate(own, pair_blocks=True) for own in products]
    levels = torch.tensor([each.level for each in found])
    variance = jackknife_variance(by_block.transpose(0, 1)) * levels[:, None, None]
    centre = by_block.sum(1) / (blocks * (blocks - 1))
    return centre.numpy(), variance.sqrt().numpy(), np.array([each.bound for each in found])


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("blocks", "draws_per_block", "lowest", "mean"),
    [
        (4, 2, (0.65, 0.88), (0.82, 0.93)),
        (8, 2, (0.65, 0.82), (0.82, 0.89)),
        (8, 8, (0.83, 0.9), (0.89, 0.935)),
        (8, 16, (0.89, 0.95), (0.92, 0.96)),
        (8, 32, (0.91, 0.96), (0.93, 0.965)),
    ],
)
@pytest.mark.parametrize("unit", UNITS)
def test_the_stated_coverage_is_the_actual_one(unit, blocks, draws_per_block, lowest, mean):
    """1,000 trials: a share of 93 % scatters by 0.8 %. Whole errors stay below their bound at any number of draws."""
    exact = closed_forms.nonlocal_kernel(unit, THETA, X, X, GAMMA)
    centre, stderr, bound = trials(unit, blocks, draws_per_block, 1000)
    with np.errstate(invalid="ignore"):
        inside = np.abs(centre - exact) <= t_quantile(0.95, blocks) * stderr
    shares = np.array([inside[:, i, j][stderr[:, i, j] > 0].mean() for i, j in zip(*np.triu_indices(3), strict=True)])
    assert lowest[0] <= shares.min() <= lowest[1]
    assert mean[0] <= shares.mean() <= mean[1]
    error = np.linalg.norm(centre - exact, axis=(1, 2)) / np.linalg.norm(exact)
    assert (error <= bound).mean() >= 0.93


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


@pytest.mark.filterwarnings("ignore:the kernel is mostly noise")
def test_few_draws_are_warned_of_beside_intervals():
    x = torch.from_numpy(X)
    few = nonlocal_kernel(network(), x, gamma=0.1, estimator="weight", draws=16)
    with pytest.warns(NNTKWarning, match=re.escape("may be too short with 2 draws a block")) as caught:
        few.interval()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nonlocal_kernel(network(), x, gamma=0.1).interval()  # autodiff, one draw a block


@pytest.mark.parametrize(
    ("estimator", "draws", "blocks", "warned"),
    [
        ("weight", 127, 8, True),
        ("weight", 128, 8, False),
        ("activation", 8, 4, True),
        ("autodiff", 8, 8, False),
        ("weight", 2, 2, False),
    ],
)
def test_when_intervals_are_warned_of(estimator, draws, blocks, warned):
    assert (interval_caution(estimator, draws, blocks) is not None) == warned
