"""Tests of the brute-force oracles, the table of cases and the assertions, on which other tests rely.

Gradients against finite differences; block statistics against the design's formulas, enumeration and simulation; the
assertions against data that must pass and data that must fail. The closed forms have their own file.

Axes: S draws, R blocks, T independent repetitions, n examples, C outputs, P parameters.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special

from tests.oracles import brute_force, closed_forms, statistics
from tests.oracles.cases import CASES, Case, case, unit_module, unit_problem

Array = np.ndarray


def test_oracles_import_nothing_of_what_they_check():
    sources = {path.name: path.read_text() for path in (Path(__file__).parents[1] / "oracles").glob("*.py")}
    assert "closed_forms.py" in sources
    assert not [name for name, text in sources.items() if "nntk_dist" in text or "pipeline" in text]


# Brute-force gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", CASES, ids=lambda entry: entry.name)
def test_cases_and_their_gradients(entry: Case):
    model, x = entry.build(), entry.inputs(3)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert 0 < size <= 200
    untouched = x.clone()
    function, theta = brute_force.function_of_parameters(model, x)
    gradients = brute_force.per_example_gradients(model, x)
    assert torch.equal(x, untouched)
    assert theta.shape == (size,)
    assert gradients.shape == (3, entry.num_outputs, size)
    with torch.no_grad():
        together = model(x.clone()).reshape(3, -1).numpy()
    np.testing.assert_allclose(function(theta), together, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), entry.build().parameters(), strict=True))
    if not entry.lipschitz:
        return
    direction = np.random.default_rng(2).normal(size=size)
    step = 1e-5
    difference = (function(theta + step * direction) - function(theta - step * direction)) / (2.0 * step)
    np.testing.assert_allclose(gradients @ direction, difference, atol=2e-7 * max(1.0, np.abs(difference).max()))


@pytest.mark.parametrize("entry", [entry for entry in CASES if not entry.lipschitz], ids=lambda entry: entry.name)
def test_cases_that_jump_do_jump(entry: Case):
    model, x = entry.build(), entry.inputs(6)
    function, theta = brute_force.function_of_parameters(model, x)
    direction = np.random.default_rng(5).normal(size=len(theta))
    values = np.stack([function(theta + t * direction) for t in np.linspace(0.0, 1.0, 401)])
    assert np.abs(np.diff(values, axis=0)).max() > 0.5  # a continuous case of this size moves by a tenth of that


@pytest.mark.parametrize("unit", closed_forms.UNITS)
def test_unit_modules_are_the_closed_forms_units(unit: str):
    parameters, inputs = unit_problem(5)
    model, theta, x = unit_module(unit, parameters), parameters.numpy(), inputs.numpy()
    np.testing.assert_allclose(model(inputs)[:, 0].detach().numpy(), closed_forms.unit_value(unit, theta, x))
    expected = closed_forms.local_kernel(unit, theta, x, x)
    np.testing.assert_allclose(brute_force.local_kernel(model, inputs, inputs), expected, rtol=1e-12, atol=1e-14)


def test_outputs_of_a_kernel():
    entry = case("tanh_mlp")
    model, x1, x2 = entry.build(), entry.inputs(2), entry.inputs(3, seed=7)
    trace, full = (brute_force.local_kernel(model, x1, x2, outputs) for outputs in ("trace", "full"))
    assert full.shape == (6, 9)
    blocks = full.reshape(2, 3, 3, 3)
    np.testing.assert_allclose(np.einsum("icjc->ij", blocks), trace, rtol=1e-12)
    np.testing.assert_allclose(brute_force.local_kernel(model, x1, x2, 1), blocks[:, 1, :, 1], rtol=1e-12)


def test_selection_counts_shared_tensors_once_under_any_name():
    model = case("tied_weights").build()
    everything = ["encoder.weight", "decoder.weight", "readout.weight", "readout.bias"]
    assert brute_force.selected_names(model) == everything
    assert brute_force.selected_names(model, ("readout_again.*", "enc*")) == [everything[0], *everything[2:]]
    x = case("tied_weights").inputs(2)
    whole = brute_force.per_example_gradients(model, x)
    part = brute_force.per_example_gradients(model, x, ("*readout*",))
    np.testing.assert_array_equal(part, whole[:, :, 40:])
    model.encoder.weight.requires_grad_(False)
    np.testing.assert_array_equal(brute_force.per_example_gradients(model, x), whole)


# Draws and blocks -----------------------------------------------------------------------------------------------------


def test_draws_of_a_linear_model_are_projections():
    entry = case("affine")
    model, x = entry.build(), entry.inputs(2)
    function, theta = brute_force.function_of_parameters(model, x)
    z = np.random.default_rng(0).normal(size=(4, len(theta)))
    draws = brute_force.weight_draws(function, theta, z)
    gradients = brute_force.per_example_gradients(model, x)
    for s in range(4):
        projection = np.outer(z[s], z[s]) / (z[s] @ z[s])
        np.testing.assert_allclose(draws[s], len(theta) * gradients @ projection, atol=1e-10)
    everywhere = np.broadcast_to(gradients, draws.shape)
    np.testing.assert_allclose(brute_force.gradient_draws(model, x, z), everywhere, atol=1e-12)


def test_orthogonal_draws_are_exact_for_linear_models():
    entry = case("affine")
    model, x = entry.build(), entry.inputs(3)
    function, theta = brute_force.function_of_parameters(model, x)
    orthogonal = np.linalg.qr(np.random.default_rng(1).normal(size=(len(theta), len(theta))))[0]
    means = brute_force.block_means(brute_force.weight_draws(function, theta, 0.3 * orthogonal), np.arange(15) % 5)
    np.testing.assert_allclose(brute_force.plugin(means, means), brute_force.local_kernel(model, x, x), rtol=1e-10)


@pytest.mark.parametrize("num_blocks", [4, 5, 6])
def test_block_statistics_against_the_formulas_of_the_design(num_blocks: int):
    rng = np.random.default_rng(num_blocks)
    means1, means2 = rng.normal(size=(num_blocks, 3, 2, 7)), rng.normal(size=(num_blocks, 2, 2, 7))
    for outputs in ("trace", "full", 1):
        h = brute_force.block_products(means1, means2, outputs)
        np.testing.assert_array_equal(h, h.swapaxes(0, 1))
        off = h * (1.0 - np.eye(num_blocks))[:, :, None, None]
        row_sums, total, squares = off.sum(1), off.sum((0, 1)), (off**2).sum((0, 1))
        r = num_blocks
        u = total / (r * (r - 1))
        np.testing.assert_allclose(brute_force.unbiased(h), u, rtol=1e-12)
        np.testing.assert_allclose(brute_force.plugin(means1, means2, outputs), h.mean((0, 1)), rtol=1e-10, atol=1e-12)
        left_out = (total - 2.0 * row_sums) / ((r - 1) * (r - 2))
        jackknife = (r - 1) / r * ((left_out - u) ** 2).sum(0)
        np.testing.assert_allclose(brute_force.jackknife_variance(h), jackknife, rtol=1e-10)
        disjoint = (total**2 - 4.0 * (row_sums**2).sum(0) + 2.0 * squares) / (r * (r - 1) * (r - 2) * (r - 3))
        np.testing.assert_allclose(brute_force.unbiased_variance(h), u**2 - disjoint, rtol=1e-9, atol=1e-9)


def simulated_products(num_blocks: int, trials: int, mean_length: float) -> tuple[Array, float]:
    """h_rr' (R, R, T) of blocks g_r ~ N(μ, I_3) for two examples, and the true Θ."""
    rng = np.random.default_rng(11)
    mu1, mu2 = mean_length * np.array([[1.0, 0.5, 0.0], [0.8, 0.0, 0.6]])
    noise = rng.normal(size=(2, num_blocks, trials, 3)) @ np.array([[1.0, 0.2, 0.0], [0.0, 0.7, 0.1], [0.0, 0.0, 1.3]])
    g1, g2 = mu1 + noise[0], mu2 + 0.5 * noise[0] + 0.5 * noise[1]
    products = np.einsum("rtp,stp->rst", g1, g2)
    return (products + products.swapaxes(0, 1)) / 2.0, float(mu1 @ mu2)


@pytest.mark.parametrize("mean_length", [0.0, 0.3, 2.0])
def test_unbiased_and_its_variances_over_repetitions(mean_length: float):
    num_blocks, trials = 5, 40_000
    h, expected = simulated_products(num_blocks, trials, mean_length)
    u, v, j = brute_force.unbiased(h), brute_force.unbiased_variance(h), brute_force.jackknife_variance(h)
    statistics.assert_mean_agrees(u[:, None], np.array([expected]))
    statistics.assert_mean_agrees((v - (u - expected) ** 2)[:, None], np.zeros(1))  # V is unbiased for Var U
    ratio, widest = j.mean() / ((u - expected) ** 2).mean(), 2.0 * (num_blocks - 1) / (num_blocks - 2)
    assert 1.0 < ratio < 1.05 * widest
    if mean_length == 0.0:
        assert ratio == pytest.approx(widest, rel=0.05)  # the jackknife is worst at Θ = 0
    assert (v < 0).any()


def test_calibrated_standard_errors_stay_between_their_bounds():
    for mean_length in (0.0, 2.0):
        h, _ = simulated_products(5, 2_000, mean_length)
        ratio = brute_force.calibrated_stderr(h) ** 2 / brute_force.jackknife_variance(h)
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-10)
        assert 3 / 8 - 1e-12 <= ratio[0] <= 1.0
    unresolved = np.zeros((4, 4, 2))
    unresolved[..., 1] = np.random.default_rng(0).normal(size=(4, 4))
    unresolved[..., 1] += unresolved[..., 1].T.copy()
    assert np.isnan(brute_force.calibrated_stderr(unresolved)).tolist() == [True, False]


@pytest.mark.statistical
@pytest.mark.parametrize("unit", closed_forms.UNITS)
def test_expected_plugin_is_inflated_by_the_covariance_kernel(unit: str):
    # E[plugin] = (1 − 1/S) Θ + (P/S) C for independent draws, and the mean over pairs of different draws is Θ.
    num_parameters, num_draws, trials, gamma = 4, 5, 60_000, 1.1
    theta, x = (tensor.numpy() for tensor in unit_problem(num_parameters))
    z = np.random.default_rng(8).normal(size=(num_draws, trials, num_parameters)) * gamma / np.sqrt(2.0)
    change = closed_forms.unit_value(unit, theta + z, x) - closed_forms.unit_value(unit, theta, x)
    draws = num_parameters * change[..., None] * (z / (z**2).sum(-1, keepdims=True))[:, :, None, :]
    means = draws.mean(0)
    plugin = np.einsum("tip,tjp->tij", means, means)
    nonlocal_ = closed_forms.nonlocal_kernel(unit, theta, x, x, gamma)
    covariance = closed_forms.covariance_kernel(unit, theta, x, x, gamma)
    statistics.assert_mean_agrees(plugin, (1.0 - 1.0 / num_draws) * nonlocal_ + num_parameters / num_draws * covariance)
    pairs = [np.einsum("tip,tjp->tij", draws[a], draws[b]) for a, b in itertools.permutations(range(num_draws), 2)]
    statistics.assert_mean_agrees(np.mean(pairs, axis=0), nonlocal_)


def test_brute_force_pipeline_end_to_end_on_a_sign_unit():
    num_parameters, num_blocks, gamma = 3, 6, 1.5
    parameters, inputs = unit_problem(num_parameters, n=2, seed=4)
    theta, x = parameters.numpy(), inputs.numpy()
    rng = np.random.default_rng(9)
    function, start = brute_force.function_of_parameters(unit_module("sign", parameters), inputs)
    np.testing.assert_array_equal(start, theta)
    z = gamma / np.sqrt(2.0) * rng.normal(size=(num_blocks * 150, num_parameters))
    means = brute_force.block_means(brute_force.weight_draws(function, theta, z), np.arange(len(z)) % num_blocks)
    h = brute_force.block_products(means, means)
    expected = closed_forms.nonlocal_kernel("sign", theta, x, x, gamma)
    stderr = np.sqrt(brute_force.jackknife_variance(h))
    statistics.assert_agrees(brute_force.unbiased(h), expected, stderr, num_blocks)
    with pytest.raises(AssertionError, match="standard errors"):
        statistics.assert_agrees(brute_force.unbiased(h) + 60.0 * stderr, expected, stderr, num_blocks)


def test_blocks_of_unequal_size_are_refused():
    with pytest.raises(AssertionError, match="blocks of unequal size"):
        brute_force.block_means(np.zeros((5, 1, 1, 1)), np.array([0, 0, 0, 1, 1]))


# Statistics -----------------------------------------------------------------------------------------------------------


def test_agreement_rejects_rarely_when_right_and_surely_when_wrong():
    rng = np.random.default_rng(0)
    blocks, rejected = 8, 0
    for _ in range(2_000):
        sample = rng.normal(size=(blocks, 10))
        mean, stderr = sample.mean(0), sample.std(0, ddof=1) / np.sqrt(blocks)
        try:
            statistics.assert_agrees(mean, np.zeros(10), stderr, blocks, family_level=0.05)
        except AssertionError:
            rejected += 1
    low, high = statistics.coverage_bounds(2_000, 0.95)
    assert 1.0 - high <= rejected / 2_000 <= 1.0 - low
    with pytest.raises(AssertionError, match=r"1 of 4 entries lie more than .*entry \(1, 0\): estimate 3"):
        statistics.assert_agrees(np.array([[0.0, 0.0], [3.0, 0.0]]), np.zeros((2, 2)), np.full((2, 2), 0.1), 30)


def test_agreement_refuses_what_it_cannot_judge():
    one = np.ones(2)
    with pytest.raises(AssertionError, match="shapes of estimate, expected and standard error differ"):
        statistics.assert_agrees(one, np.ones(3), one, 8)
    with pytest.raises(AssertionError, match="1 of 2 estimates are not finite"):
        statistics.assert_agrees(np.array([1.0, np.nan]), one, one, 8)
    with pytest.raises(AssertionError, match="1 expected values are not finite"):
        statistics.assert_agrees(one, np.array([1.0, np.nan]), one, 8)
    with pytest.raises(AssertionError, match="1 of 2 standard errors are not finite"):
        statistics.assert_agrees(one, one, np.array([1.0, np.nan]), 8)
    with pytest.raises(AssertionError, match="t = inf"):
        statistics.assert_agrees(one + 1e-9, one, np.zeros(2), 8)
    statistics.assert_agrees(one + 1e-9, one, np.zeros(2), 8, rounding=1e-8)


def test_coverage_of_exact_too_narrow_and_too_wide_intervals():
    rng = np.random.default_rng(3)
    blocks, trials = 8, 1_000
    sample = rng.normal(size=(trials, blocks, 6))
    mean, stderr = sample.mean(1), sample.std(1, ddof=1) / np.sqrt(blocks)
    statistics.assert_coverage(statistics.covered(mean, np.zeros(6), stderr, blocks))
    statistics.assert_coverage(statistics.covered(mean, np.zeros(6), stderr, blocks), bounds=(0.92, 0.98))
    for factor in (0.8, 1.4):
        with pytest.raises(AssertionError, match="coverage of nominal 95% intervals over 1000 trials is outside"):
            statistics.assert_coverage(statistics.covered(mean, np.zeros(6), factor * stderr, blocks))
    assert not statistics.covered(mean, np.zeros(6), np.full_like(stderr, np.nan), blocks).any()


def test_coverage_bounds_are_exact():
    low, high = statistics.coverage_bounds(1_000, 0.95, num_entries=1, family_level=0.01)
    assert special.bdtr(1000 * low - 1, 1000, 0.95) <= 0.005 < special.bdtr(1000 * low, 1000, 0.95)
    assert special.bdtrc(1000 * high, 1000, 0.95) <= 0.005 < special.bdtrc(1000 * high - 1, 1000, 0.95)


def test_power_refuses_weak_comparisons():
    exact, local = np.eye(3) + 1.0, np.zeros((3, 3))
    statistics.assert_power(np.full((3, 3), 0.03), exact, local)
    with pytest.raises(AssertionError, match=r"weak test: largest standard error 0.05 is 2.50% of the mean diagonal 2"):
        statistics.assert_power(np.full((3, 3), 0.05), exact, local)
    with pytest.raises(AssertionError, match="weak test: largest standard error nan"):
        statistics.assert_power(np.array([[0.01, np.nan], [0.01, 0.01]]), exact[:2, :2])
    with pytest.raises(AssertionError, match=r"weak test: local and nonlocal kernels are 5.0 standard errors apart"):
        statistics.assert_power(np.full((3, 3), 0.02), exact, exact + 0.1)
