"""Draws: designs, blocks, the law of a perturbation, slices, inner products, and refusals.

Axes: s draws, P parameters.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from nntk_dist.errors import NNTKError
from nntk_dist.sampling.designs import automatic_draws
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.laws import Gaussian, make_law
from nntk_dist.sampling.streams import Stream


def drawing(design: str = "iid", *, draws: int = 16, blocks: int = 4, parameters: int = 7, **options) -> Drawing:
    return Drawing(Gaussian(0.8), draws, blocks, parameters, design, **options)


def everything(some: Drawing) -> torch.Tensor:
    return some.perturbations(range(some.num_draws), dtype=torch.float64)


@pytest.mark.parametrize("design", ["iid", "antithetic"])
def test_mean_square_is_half_of_gamma_squared_per_parameter(design):
    many = drawing(design, draws=40_000, parameters=3)
    z = everything(many)[:: many.group_size]  # one member of each group: all are independent
    squares = z.square().sum(1).numpy()
    expected = 3 * 0.8**2 / 2
    assert abs(squares.mean() - expected) < 3.9 * squares.std() / np.sqrt(len(squares))
    assert stats.kstest(squares / (0.8**2 / 2), stats.chi2(3).cdf).pvalue > 1e-3


def test_antithetic_pairs_are_exact_negatives_and_nothing_else_is():
    z = everything(drawing("antithetic", draws=32))
    assert torch.equal(z[0::2], -z[1::2])
    assert len(torch.unique(z.abs())) == z[0::2].numel()


@pytest.mark.parametrize("design", ["iid", "antithetic"])
def test_blocks_never_share_a_group(design):
    some = drawing(design, draws=24, blocks=6)
    magnitudes = everything(some).abs().unflatten(0, (6, some.draws_per_block)).flatten(1)
    seen = [set(block.tolist()) for block in magnitudes]
    assert some.draws_per_block == 4
    for r, first in enumerate(seen):
        for second in seen[:r]:
            assert not first & second


@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("draws", [range(1), range(5), range(3, 4), range(3, 9), range(4, 16), range(15, 16)])
def test_any_draws_and_coordinates_are_part_of_the_whole(design, draws):
    some = drawing(design)
    whole = everything(some)
    chosen = slice(draws.start, draws.stop)
    assert torch.equal(some.perturbations(draws, dtype=torch.float64), whole[chosen])
    assert torch.equal(some.perturbations(draws, 2, 6, dtype=torch.float64), whole[chosen, 2:6])
    assert torch.equal(some.shrinkage(draws), some.shrinkage(range(16))[chosen])


def test_designs_share_nothing_but_the_first_members():
    """The first member of each antithetic pair is the iid draw with the same group number."""
    assert torch.equal(everything(drawing("antithetic"))[::2], everything(drawing("iid"))[:8])


def test_shrinkage_is_shared_in_a_group_and_has_the_law_of_a_power_of_a_uniform():
    pairs = drawing("antithetic").shrinkage(range(16))
    assert torch.equal(pairs[0::2], pairs[1::2])
    assert len(torch.unique(pairs)) == 8
    many = drawing(draws=4000, parameters=7).shrinkage(range(4000)).numpy()
    assert stats.kstest(many**7, "uniform").pvalue > 1e-3


def test_shrinkage_is_independent_of_the_perturbation():
    many = drawing(draws=4000, parameters=2)
    correlation = np.corrcoef(everything(many).norm(dim=1).numpy(), many.shrinkage(range(4000)).numpy())[0, 1]
    assert abs(correlation) < 3.9 / np.sqrt(4000)


@pytest.mark.parametrize("design", ["iid", "antithetic"])
def test_direction_products_are_those_of_the_directions(design):
    some = drawing(design, draws=64, parameters=70_000)  # more than one slice of coordinates
    z = everything(some)
    v = 70_000 * z / z.square().sum(1, keepdim=True)
    torch.testing.assert_close(some.directions(z), v, rtol=1e-13, atol=0)
    expected = v @ v.T
    torch.testing.assert_close(some.direction_products(), expected, rtol=0, atol=1e-12 * float(expected.max()))
    torch.testing.assert_close(some.squared_norms(), z.square().sum(1), rtol=1e-13, atol=0)


def test_seeds_and_streams_have_draws_of_their_own():
    some = drawing()
    for other in (replace(some, seed=1), replace(some, stream=Stream.PROBE)):
        assert not torch.isin(everything(other), everything(some)).any()
    assert torch.equal(everything(replace(some, seed=0)), everything(some))
    assert not torch.isin(replace(some, seed=1).shrinkage(range(16)), some.shrinkage(range(16))).any()


def test_gamma_is_a_scale_and_nothing_else():
    double = replace(drawing(), distribution=Gaussian(1.6))
    torch.testing.assert_close(everything(double), 2 * everything(drawing()), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("estimator", "blocks", "design", "expected"),
    [
        ("autodiff", 8, "iid", 8),
        ("autodiff", 8, "antithetic", 16),
        ("weight", 8, "iid", 256),
        ("weight", 8, "antithetic", 256),
        ("weight", 6, "iid", 258),
        ("weight", 6, "antithetic", 264),
    ],
)
def test_automatic_draws_are_whole_groups_in_every_block(estimator, blocks, design, expected):
    assert automatic_draws(blocks, design, 7, of_gradients=estimator == "autodiff") == expected
    assert drawing(design, draws=expected, blocks=blocks).num_draws == expected


def test_unknown_designs_are_refused():
    with pytest.raises(
        NNTKError, match=r"design is 'antitetic'; allowed: iid, antithetic, orthogonal; did you mean 'antithetic'\?"
    ):
        drawing("antitetic")


def test_too_few_blocks_are_refused():
    with pytest.raises(NNTKError, match=r"blocks is 3; allowed: 4 or more, which the error bars need"):
        drawing(blocks=3)


@pytest.mark.parametrize(
    ("design", "draws", "message"),
    [
        ("iid", 0, r"draws is 0; allowed: multiples of 4 \(4 blocks of iid groups of 1\); the nearest is 4"),
        ("iid", 11, r"draws is 11; allowed: multiples of 4 .* the nearest is 12"),
        (
            "antithetic",
            12,
            r"draws is 12; allowed: multiples of 8 \(4 blocks of antithetic groups of 2\); the nearest is",
        ),
    ],
)
def test_draws_that_do_not_fill_blocks_are_refused(design, draws, message):
    with pytest.raises(NNTKError, match=message):
        drawing(design, draws=draws)


def test_unknown_distributions_are_refused():
    with pytest.raises(NNTKError, match=r"distribution is 'gausian'; allowed: gaussian.*; did you mean 'gaussian'\?"):
        make_law("gausian", 1.0)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_ranges_that_are_not_positive_are_refused(gamma):
    with pytest.raises(NNTKError, match=r"gamma is (0\.0|-1\.0|nan|inf); allowed: a number above 0"):
        make_law("gaussian", gamma)
