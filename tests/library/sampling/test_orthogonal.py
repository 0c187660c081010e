"""Orthogonal groups: orthonormal directions, lengths as in independent draws, any slice; exact for linear models.

Unbiasedness and coverage are checked in `tests/library/statistics`.

Axes: s draws, g groups, k draws of a group, P parameters.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from nntk_dist import averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel
from nntk_dist.errors import NNTKError
from nntk_dist.sampling.designs import automatic_draws, group_size
from nntk_dist.sampling.draws import Drawing, draw_chunks
from nntk_dist.sampling.laws import make_law, radial_names
from tests.oracles.cases import case

# (P, draws, group size): complete groups, whole vectors factored, and Gram matrices over one slice and over several.
SHAPES = [(1, 8, 1), (6, 48, 6), (100, 400, 100), (500, 1024, 256), (700, 800, 200), (40_000, 64, 16)]


def drawing(parameters: int, draws: int, name: str = "gaussian", design: str = "orthogonal", **options) -> Drawing:
    return Drawing(make_law(name, 0.8), draws, 4, parameters, design, **options)


def everything(some: Drawing) -> torch.Tensor:
    return some.perturbations(range(some.num_draws), dtype=torch.float64)


@pytest.mark.parametrize(("parameters", "draws", "size"), SHAPES)
@pytest.mark.parametrize("name", ["gaussian", "student"])
def test_directions_are_orthonormal_and_lengths_those_of_independent_draws(name, parameters, draws, size):
    some = drawing(parameters, draws, name)
    z, independent = everything(some), replace(some, design="iid")
    assert some.group_size == size
    lengths = z.norm(dim=1)
    q = (z / lengths[:, None]).unflatten(0, (-1, size))
    assert float((q @ q.mT - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-10
    n = everything(independent)
    torch.testing.assert_close(lengths, n.norm(dim=1), rtol=1e-12, atol=0)
    # Gram–Schmidt: each direction has a positive product with its own normal vector and none with earlier ones.
    own = (q * n.unflatten(0, (-1, size))).sum(2)
    later = torch.triu(n.unflatten(0, (-1, size)) @ q.mT, diagonal=1)
    assert bool((own > 0).all())
    assert float(later.abs().max()) < 1e-10 * float(lengths.max())


@pytest.mark.parametrize("name", ["sphere", "ball", "fractional"])
def test_lengths_of_laws_that_are_normalised(name):
    for parameters, draws in ((6, 48), (700, 800)):
        some = drawing(parameters, draws, name)
        independent = replace(some, design="iid")
        torch.testing.assert_close(
            everything(some).norm(dim=1), everything(independent).norm(dim=1), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(some.squared_norms(), independent.squared_norms(), rtol=1e-12, atol=0)


def test_every_member_is_uniformly_distributed():
    """By Archimedes a coordinate of a uniform direction in three dimensions is uniform."""
    z = everything(drawing(3, 12_000)).unflatten(0, (-1, 3))
    heights = (z / z.norm(dim=2, keepdim=True)).numpy()
    for member in range(3):
        for axis in range(3):
            assert stats.kstest(heights[:, member, axis], stats.uniform(-1, 2).cdf).pvalue > 1e-3 / 9
    assert stats.binomtest(int((np.linalg.det(heights) > 0).sum()), len(heights)).pvalue > 1e-3


@pytest.mark.parametrize(("parameters", "draws", "size"), SHAPES)
def test_slices_and_parts_are_those_of_the_whole(parameters, draws, size):
    some = drawing(parameters, draws, "ball")
    whole = everything(some)
    scale = float(whole.abs().max())
    low, high = parameters // 3, max(1, parameters - 1)
    for part in (range(1, 7), range(draws - 1, draws)):
        values = some.perturbations(part, low, high, dtype=torch.float64)
        expected = whole[part.start : part.stop, low:high]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-12 * scale)
        assert torch.equal(values, some.perturbations(part, low, high, dtype=torch.float64))
    single = some.perturbations(range(draws), dtype=torch.float32)
    torch.testing.assert_close(single.double(), whole, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("parameters", "draws", "size"), SHAPES[1:])
def test_direction_products_are_those_of_the_directions(parameters, draws, size, relative):
    options = {"shapes": ((parameters - 2,), (2,)), "scales": (2.0, 0.5)} if relative else {}
    some = drawing(parameters, draws, "fractional", **options)
    z = everything(some)
    d = torch.ones(parameters, dtype=torch.float64)
    if relative:
        d[:-2], d[-2:] = 2.0, 0.5
    u = z / d
    v = parameters * u / u.square().sum(1, keepdim=True) / d
    torch.testing.assert_close(some.directions(z), v, rtol=1e-12, atol=0)
    products = v @ v.T
    lengths = v.norm(dim=1)
    difference = (some.direction_products() - products) / (lengths[:, None] * lengths[None, :])
    assert float(difference.abs().max()) < 1e-11
    q = (u / u.norm(dim=1, keepdim=True)).unflatten(0, (-1, size))  # orthogonal in u, not in z
    assert float((q @ q.mT - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-10


def test_shrinkage_belongs_to_each_draw_and_chunks_to_whole_groups():
    some = drawing(6, 48)
    assert len(torch.unique(some.shrinkage(range(48)))) == 48
    one_by_one = torch.stack(list(some.shrunken(range(12, 36))))
    expected = everything(some) * some.shrinkage(range(48))[:, None]
    torch.testing.assert_close(one_by_one, expected[12:36], rtol=1e-14, atol=0)
    parts = list(draw_chunks(range(512, 1024), 1 << 16, 48))  # 64 draws would fill a chunk
    assert [len(part) for part in parts] == [48] * 10 + [32]
    assert list(draw_chunks(range(512), 1 << 20, 256)) == [range(256), range(256, 512)]  # a group is never divided


@pytest.mark.parametrize(
    ("draws_per_block", "parameters", "expected"),
    [(32, 5, 5), (5, 5, 5), (4, 5, 4), (32, 1377, 32), (300, 1377, 150), (512, 5000, 256), (5000, 5000, 250),
     (7, 4097, 7), (257, 1000, 1), (4096, 4096, 4096)],
)  # fmt: skip
def test_group_sizes(draws_per_block, parameters, expected):
    assert group_size("orthogonal", draws_per_block, parameters) == expected


@pytest.mark.parametrize(
    ("estimator", "blocks", "parameters", "expected"),
    [
        ("weight", 8, 5, 8 * 35),
        ("weight", 8, 1377, 256),
        ("weight", 6, 1377, 6 * 43),
        ("weight", 1, 51, 306),
        ("weight", 2, 1377, 2 * 1377),
        ("autodiff", 8, 5, 16),
        ("autodiff", 8, 1, 8),
        ("autodiff", 2, 51, 102),
    ],
)
def test_automatic_draws(estimator, blocks, parameters, expected):
    assert automatic_draws(blocks, "orthogonal", parameters, of_gradients=estimator == "autodiff") == expected
    some = Drawing(make_law("gaussian", 1.0), expected, blocks, parameters, "orthogonal")
    assert some.draws_per_block % some.group_size == 0


@pytest.mark.parametrize(
    ("draws", "blocks", "parameters", "message"),
    [
        (128, 4, 7, r"draws is 128; allowed: multiples of 28 \(4 blocks of orthogonal groups of 7\); .* is 140"),
        (102, 4, 700, r"draws is 102; allowed: multiples of 4 .* is 10[04]"),
        (20, 2, 20, r"blocks is 2; allowed: 4 or more, .* \(1 or more without error bars, if design orthogonal"),
        (10_000, 1, 5000, r"blocks is 1; allowed: 4 or more, .* at most 4096"),
        (0, 0, 3, r"blocks is 0; allowed: 4 or more"),
    ],
)
def test_draws_and_blocks_that_are_refused(draws, blocks, parameters, message):
    with pytest.raises(NNTKError, match=message):
        Drawing(make_law("gaussian", 1.0), draws, blocks, parameters, "orthogonal")


def test_one_block_has_no_pairs():
    with pytest.raises(NNTKError, match=r"statistic is 'unbiased'; allowed for blocks 1: plugin"):
        nonlocal_kernel(case("affine").build(), case("affine").inputs(3), gamma=1.0, design="orthogonal", blocks=1)


AFFINE_PARAMETERS = 15


@pytest.mark.parametrize("gamma_scale", ["absolute", "relative"])
@pytest.mark.parametrize("name", radial_names())
@pytest.mark.parametrize("groups", [1, 400])  # differences with their metric, and block means
def test_linear_models_are_exact(name, gamma_scale, groups):
    model, x = case("affine").build(), case("affine").inputs(4)
    exact = local_kernel(model, x, outputs="full")
    options = {
        "gamma": 0.7,
        # At order 0.5 the shortest of 12,000 draws is 1e-8 of the longest, and rounding is |f|/|z| times as large.
        "distribution": {"name": name, "alpha": 0.0} if name == "fractional" else name,
        "gamma_scale": gamma_scale,
        "estimator": "weight",
        "design": "orthogonal",
        "outputs": "full",
    }
    plugin = nonlocal_kernel(model, x, blocks=1, statistic="plugin", draws=groups * AFFINE_PARAMETERS, **options)
    unbiased = nonlocal_kernel(model, x, blocks=2, draws=2 * groups * AFFINE_PARAMETERS, **options)
    for one in (plugin, unbiased):
        assert one.stderr is None
        assert math.isnan(one.relative_error)
        with pytest.raises(NNTKError, match=r"no standard error: it is exact .* or has fewer than 4 blocks"):
            one.interval()
        torch.testing.assert_close(one.kernel, exact, rtol=0, atol=1e-12 * float(exact.max()))
    assert plugin.unbiased is None
    assert plugin.relative_bias is None


def test_other_kernels_of_linear_models_are_exact():
    model, x = case("affine").build(), case("affine").inputs(4)
    exact = local_kernel(model, x)
    for function, options in ((covariance_kernel, {"distribution": "sphere"}), (averaged_kernel, {"draws": 15})):
        one = function(model, x, gamma=0.7, design="orthogonal", blocks=1, **options)
        torch.testing.assert_close(one.kernel, exact, rtol=0, atol=1e-12 * float(exact.max()))


def test_four_blocks_have_error_bars_that_say_exact():
    model, x = case("affine").build(), case("affine").inputs(4)
    one = nonlocal_kernel(model, x, gamma=0.7, design="orthogonal", estimator="weight", blocks=4, draws=60)
    assert float(one.stderr.nan_to_num(0.0).max()) < 1e-12 * float(one.kernel.max())
    assert one.relative_error < 1e-12
