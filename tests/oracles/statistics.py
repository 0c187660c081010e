"""Assertions about random numbers, each with its error rate fixed beforehand.

It chooses no tolerances: every compared value comes with its standard error and its number of blocks. A test that fixes
its seeds either always passes or always fails; the rates say how likely a correct program is to fail when the test is
written.

Axes: T trials (seeds), entries of any shape.
"""

import numpy as np
from jaxtyping import Float
from scipy import stats

Array = np.ndarray
FAMILY_LEVEL = 1e-3


def critical_value(num_entries: int, degrees_of_freedom: float, family_level: float = FAMILY_LEVEL) -> float:
    """The two-sided Student quantile that any of `num_entries` tests exceeds with probability ≤ `family_level`."""
    return float(stats.t.isf(family_level / (2 * num_entries), degrees_of_freedom))


def assert_agrees(
    estimate: Float[Array, "..."],
    expected: Float[Array, "..."],
    stderr: Float[Array, "..."],
    blocks: int,
    *,
    family_level: float = FAMILY_LEVEL,
    rounding: float = 0.0,
) -> None:
    """|estimate − expected| ≤ t · stderr + rounding in every entry, t with `blocks` − 1 degrees of freedom, Bonferroni.

    `rounding` is an absolute allowance for arithmetic, for estimators that are exact and have a standard error near 0.
    A symmetric kernel may be passed whole: counting its entries twice makes the test only slightly less strict.
    """
    estimate, expected, stderr = np.asarray(estimate), np.asarray(expected), np.asarray(stderr)
    shapes = (estimate.shape, expected.shape, stderr.shape)
    assert len(set(shapes)) == 1, f"shapes of estimate, expected and standard error differ: {shapes}"
    assert np.isfinite(estimate).all(), f"{np.sum(~np.isfinite(estimate))} of {estimate.size} estimates are not finite"
    assert np.isfinite(expected).all(), f"{np.sum(~np.isfinite(expected))} expected values are not finite"
    assert np.isfinite(stderr).all(), f"{np.sum(~np.isfinite(stderr))} of {stderr.size} standard errors are not finite"
    limit = critical_value(estimate.size, blocks - 1, family_level)
    error = np.abs(estimate - expected)
    excess = error - (limit * stderr + rounding)
    if (excess > 0).any():
        worst = np.unravel_index(int(np.argmax(excess)), estimate.shape)
        place = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{np.sum(excess > 0)} of {estimate.size} entries lie more than {limit:.2f} standard errors "
            f"(plus {rounding:g}) away; entry {place}: estimate {estimate[worst]:.8g}, expected {expected[worst]:.8g}, "
            f"standard error {stderr[worst]:.3g}, t = {error[worst] / stderr[worst] if stderr[worst] else np.inf:.2f}"
        )


def assert_mean_agrees(samples: Float[Array, "S ..."], expected: Float[Array, "..."], *, rounding: float = 0.0) -> None:
    """The mean of S independent samples agrees with its expectation, by `assert_agrees` on their own scatter."""
    stderr = np.std(samples, axis=0, ddof=1) / np.sqrt(len(samples))
    assert_agrees(np.mean(samples, axis=0), expected, stderr, len(samples), rounding=rounding)


def covered(
    estimate: Float[Array, "T ..."],
    expected: Float[Array, "..."],
    stderr: Float[Array, "T ..."],
    blocks: int,
    nominal: float = 0.95,
) -> Float[Array, "T ..."]:
    """Which Student intervals (`blocks` − 1 degrees of freedom) contain the expected value; none of NaN width do."""
    limit = stats.t.ppf((1.0 + nominal) / 2.0, blocks - 1)
    return np.abs(estimate - expected) <= limit * stderr  # False if stderr is NaN


def coverage_bounds(
    trials: int, nominal: float = 0.95, num_entries: int = 1, family_level: float = FAMILY_LEVEL
) -> tuple[float, float]:
    """Exact binomial bounds: the coverage of any of `num_entries` is outside with probability ≤ `family_level`."""
    tail = family_level / (2 * num_entries)
    low, high = stats.binom.ppf(tail, trials, nominal), stats.binom.isf(tail, trials, nominal)
    return float(low) / trials, float(high) / trials


def assert_coverage(hits: Array, bounds: tuple[float, float] | None = None, nominal: float = 0.95) -> None:
    """The share of hits over the trials lies within `bounds` in every entry: `coverage_bounds` unless given.

    Trials must be independent (different seeds); entries need not be.
    """
    hits = np.asarray(hits)
    share = hits.mean(0)
    low, high = bounds or coverage_bounds(len(hits), nominal, share.size)
    outside = (share < low) | (share > high)
    assert not outside.any(), (
        f"coverage of nominal {nominal:.0%} intervals over {len(hits)} trials is outside [{low:.4f}, {high:.4f}] in "
        f"{outside.sum()} of {share.size} entries: from {share.min():.4f} to {share.max():.4f}"
    )


def assert_power(
    stderr: Float[Array, "N N"],
    nonlocal_kernel: Float[Array, "N N"],
    local_kernel: Float[Array, "N N"] | None = None,
    *,
    largest_error: float = 0.02,
    least_separation: float = 10.0,
) -> None:
    """Check that the comparison had power. Both kernels are exact, of one set of examples with itself.

    Every standard error is at most `largest_error` of the mean diagonal; local and nonlocal kernel are at least
    `least_separation` standard errors apart, in root mean squares over the entries. Omit `local_kernel` if theory says
    that the two are equal (linear and quadratic units).
    """
    stderr, exact = np.asarray(stderr), np.asarray(nonlocal_kernel)
    scale = float(np.mean(np.diag(exact)))
    largest = float(np.max(stderr))  # NaN stays NaN and fails
    assert largest <= largest_error * scale, (
        f"weak test: largest standard error {largest:.3g} is {largest / scale:.2%} of the mean diagonal {scale:.3g}, "
        f"allowed {largest_error:.2%}: use more draws"
    )
    if local_kernel is None:
        return
    separation = float(np.sqrt(np.mean((exact - np.asarray(local_kernel)) ** 2) / np.mean(stderr**2)))
    assert separation >= least_separation, (
        f"weak test: local and nonlocal kernels are {separation:.1f} standard errors apart, {least_separation:g} are "
        "needed: use a larger range or more draws"
    )
