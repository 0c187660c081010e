"""Bounds of the whole error: degrees of freedom of known covariances, and how often the actual error is below.

Axes: T repetitions, n samples, e entries.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from nntk_dist.statistics.error_bounds import NoiseSource, bound_factor, noise_source
from nntk_dist.statistics.standard_errors import calibrate

SPECTRA = {
    "all entries err together": [1.0] + 39 * [0.0],
    "two causes": [1.0, 1.0] + 38 * [0.0],
    "falling": [1.0 / (i + 1) for i in range(40)],
    "every entry on its own": 40 * [1.0],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_degrees_of_freedom_of_many_samples_are_those_of_the_covariance(name):
    scales = np.array(SPECTRA[name])
    samples = np.random.default_rng(0).normal(size=(4000, 40)) * scales
    expected = (scales**2).sum() ** 2 / (scales**4).sum()
    assert noise_source(1.0, torch.from_numpy(samples)).degrees == pytest.approx(expected, rel=0.05)


@pytest.mark.statistical
@pytest.mark.parametrize("samples", [4, 8, 32])
@pytest.mark.parametrize("name", SPECTRA)
def test_errors_stay_below_the_bound_as_often_as_they_should(name, samples):
    """Nominal 95 % over 1,000 repetitions; four uneven samples are known to fall short (0.90)."""
    rng, scales, repetitions = np.random.default_rng(1), np.array(SPECTRA[name]), 1000
    below = 0
    for _ in range(repetitions):
        noise = torch.from_numpy(rng.normal(size=(samples, 40)) * scales)
        total = float(noise.var(0).sum()) / samples
        below += float(noise.mean(0).square().sum()) <= total * bound_factor([noise_source(total, noise)]) ** 2
    low = 0.88 if samples == 4 else 0.92
    assert low < below / repetitions < 0.98


def test_one_degree_of_freedom_is_student_s_t():
    assert bound_factor([NoiseSource(2.0, 1.0, 8)]) == pytest.approx(stats.t.ppf(0.975, 7))


def test_causes_are_joined_by_their_shares():
    sure, shaky = NoiseSource(1.0, 50.0, 8), NoiseSource(1.0, 1.0, 8)
    joined = bound_factor([sure, shaky])
    assert bound_factor([sure]) < joined < bound_factor([shaky])
    assert bound_factor([sure, NoiseSource(0.0, 1.0, 8)]) == pytest.approx(bound_factor([sure]))
    assert bound_factor([NoiseSource(0.0, 1.0, 8)]) == 1.0  # no error at all


def test_no_noise_is_no_cause_of_error():
    assert noise_source(0.0, torch.ones(8, 3, dtype=torch.float64)) == NoiseSource(0.0, 1.0, 8)


@pytest.mark.statistical
@pytest.mark.parametrize("noise", [0.05, 0.4, 3.0])
def test_the_calibration_s_bound_holds_and_tells_pairs_from_single_draws(noise):
    """U of block means with known Θ: below the bound in 95 % of 1,000 repetitions, for every source of noise."""
    rng, blocks, below, shares = np.random.default_rng(2), 8, 0, []
    truth = np.eye(3)[:, [0, 0, 1, 2]]  # three parameters, four examples
    for _ in range(1000):
        means = truth + noise * rng.normal(size=(blocks, 3, 4))
        products = torch.from_numpy(np.einsum("rpn,qpm->rqnm", means, means))
        calibration = calibrate(products, pair_blocks=True)
        unbiased = (products.sum((0, 1)) - sum(products[r, r] for r in range(blocks))).numpy() / (blocks * (blocks - 1))
        exact = truth.T @ truth
        below += np.linalg.norm(unbiased - exact) <= calibration.bound * np.linalg.norm(exact)
        shares.append(calibration.pair_share)
    assert 0.92 < below / 1000 <= 1.0
    single, pairs = 2 * noise**2 / blocks, 3 * noise**4 / (blocks * (blocks - 1))  # parts of an entry's variance
    assert np.median(shares) == pytest.approx(pairs / (single + pairs), rel=0.2, abs=0.01)
