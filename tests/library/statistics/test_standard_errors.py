"""Statistics of block products against loops over left-out blocks and 4-tuples of blocks, and the calibration sample.

Axes: R blocks, leading; the rest is a tile.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from nntk_dist.products.block_sums import BlockSums
from nntk_dist.statistics.standard_errors import (
    Calibration,
    calibrate,
    estimate,
    jackknife_variance,
    relative_distance,
    sample_entries,
    t_quantile,
    unbiased_variance,
)
from tests.harness.tools import assert_equal
from tests.oracles import brute_force

TILE = (3, 2)


def block_products(blocks: int, *, noise: float, seed: int = 0) -> torch.Tensor:
    """H_rr' = ⟨g_r(x), g_r'(x')⟩ of random means, (R, R, *TILE): not symmetric in the blocks."""
    rng = np.random.default_rng(seed)
    first, second = (rng.normal(size=(1, n, 5)) + noise * rng.normal(size=(blocks, n, 5)) for n in TILE)
    return torch.from_numpy(np.einsum("rap,qbp->rqab", first, second))


def symmetric(products: torch.Tensor) -> np.ndarray:
    """Symmetrise to h_rr', the form that the oracle takes."""
    return 0.5 * (products + products.transpose(0, 1)).numpy()


def sums_of(products: torch.Tensor) -> BlockSums:
    """The sums of a tile from all its products, by loops."""
    blocks = len(products)
    halves = torch.from_numpy(symmetric(products))
    by_block = torch.stack([halves[r, [q for q in range(blocks) if q != r]].sum(0) for r in range(blocks)])
    within = sum(products[r, r] for r in range(blocks))
    return BlockSums(blocks, within, products.sum((0, 1)) - within, by_block)


@pytest.mark.parametrize("blocks", [4, 5, 6])
def test_unbiased_jackknife_and_unbiased_variance_are_their_definitions(blocks):
    products = block_products(blocks, noise=0.7)
    unbiased, variance, by_block = unbiased_variance(products)
    halves = symmetric(products)
    assert_equal(unbiased, brute_force.unbiased(halves))
    assert_equal(variance, brute_force.unbiased_variance(halves))
    assert_equal(jackknife_variance(by_block), brute_force.jackknife_variance(halves))


@pytest.mark.parametrize("noise", [0.02, 0.5, 5.0])
@pytest.mark.parametrize("blocks", [4, 6])
def test_estimates_are_their_definitions_at_every_level_of_noise(blocks, noise):
    products = block_products(blocks, noise=noise)
    calibration = calibrate(products, pair_blocks=True)
    result = estimate(sums_of(products), calibration)
    halves = symmetric(products)
    assert_equal(result.plugin, halves.mean((0, 1)))
    assert_equal(result.unbiased, brute_force.unbiased(halves))
    assert_equal(result.stderr, brute_force.calibrated_stderr(halves))
    variance, jackknife = brute_force.unbiased_variance(halves), brute_force.jackknife_variance(halves)
    lowest = (blocks - 2) / (2 * (blocks - 1))
    assert calibration.level == pytest.approx(np.clip(variance.mean() / jackknife.mean(), lowest, 1.0), rel=1e-9)
    assert calibration.num_entries == 6
    signal = (brute_force.unbiased(halves) ** 2).sum() - calibration.level * jackknife.sum()
    expected = np.sqrt(calibration.level * jackknife.sum() / signal) if signal > 0 else np.inf
    assert calibration.relative_error == pytest.approx(expected, rel=1e-9)


def test_levels_run_from_the_clip_where_noise_rules_to_one_where_signal_does():
    def levels(noise: float) -> list[float]:
        return [calibrate(block_products(4, noise=noise, seed=seed), pair_blocks=True).level for seed in range(20)]

    assert min(levels(0.02)) > 0.999
    assert any(0.5 < level < 0.95 for level in levels(0.5))
    assert min(levels(5.0)) == 1 / 3


def test_means_of_independent_blocks():
    products = torch.from_numpy(np.random.default_rng(0).normal(1.0, 0.3, size=(5, *TILE)))
    calibration = calibrate(products, pair_blocks=False)
    result = estimate(BlockSums(5, products.sum(0), None, products), calibration)
    assert result.unbiased is None
    assert_equal(result.plugin, products.numpy().mean(0))
    assert_equal(result.stderr, stats.sem(products.numpy(), axis=0))
    variance = (stats.sem(products.numpy(), axis=0) ** 2).sum()
    expected = np.sqrt(variance / ((products.numpy().mean(0) ** 2).sum() - variance))
    assert calibration.level == 1.0
    assert calibration.relative_error == pytest.approx(expected)


def test_no_standard_error_without_calibration_or_without_sums_by_block():
    sums = sums_of(block_products(4, noise=0.5))
    assert estimate(sums, None).stderr is None
    assert estimate(BlockSums(4, sums.within, sums.between, None), Calibration(1.0, 0.1, 6)).stderr is None


def test_without_noise_there_is_no_error_and_without_signal_no_end_to_it():
    constant = torch.ones(4, 4, *TILE, dtype=torch.float64)
    assert calibrate(constant, pair_blocks=True).relative_error == 0.0
    assert calibrate(0 * constant, pair_blocks=True).relative_error == 0.0
    assert calibrate(block_products(4, noise=1e6, seed=0), pair_blocks=True).relative_error == np.inf


def test_unbiased_variance_is_unbiased_and_the_jackknife_is_not():
    """Over repetitions, the mean of V is the variance of U, and the mean of J lies above it."""
    rng = np.random.default_rng(0)
    repetitions, blocks = 20_000, 6
    means = 0.3 + rng.normal(size=(blocks, repetitions, 4))
    products = torch.from_numpy(np.einsum("rtp,qtp->rqt", means, means))
    unbiased, variance, by_block = unbiased_variance(products)
    deviation = (unbiased - 4 * 0.3**2).square() - variance
    assert abs(float(deviation.mean())) < 3.9 * float(deviation.std()) / np.sqrt(repetitions)
    assert 1.2 < float(jackknife_variance(by_block).mean() / variance.mean()) < 2 * (blocks - 1) / (blocks - 2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 7), (5, 7)), ((64, 64), (64, 64)), ((1000, 1000), (64, 64)), ((10, 5000), (10, 409)), ((5000, 10), (409, 10)),
     ((1, 9000), (1, 4096)), ((9000, 1), (4096, 1))],
)  # fmt: skip
def test_calibration_samples_hold_as_much_as_is_allowed(shape, expected):
    rows, columns = sample_entries(0, *shape)
    assert (len(rows), len(columns)) == expected
    for chosen, size in ((rows, shape[0]), (columns, shape[1])):
        assert torch.equal(chosen, chosen.unique())
        assert int(chosen[0]) >= 0
        assert int(chosen[-1]) < size


def test_calibration_samples_are_a_function_of_the_seed():
    first, again, other = (sample_entries(seed, 500, 500) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_calibration_samples_favour_no_row():
    counts = torch.zeros(200)
    for seed in range(500):
        counts[sample_entries(seed, 200, 200)[0]] += 1
    # Hypergeometric counts with mean 160: chi-square, corrected for drawing without replacement.
    statistic = float(((counts - 160) ** 2 / (160 * (1 - 64 / 200))).sum()) * 199 / 200
    assert 1e-3 < stats.chi2(199).cdf(statistic) < 1 - 1e-3


def test_student_s_quantiles():
    assert t_quantile(0.95, 8) == pytest.approx(2.364624251592785)  # 7 degrees of freedom, from a table
    assert t_quantile(0.5, 4) == pytest.approx(0.764892328404345)


def test_relative_distance():
    assert relative_distance(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
