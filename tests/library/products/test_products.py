"""Fast block products against slow ones: float32 tiles in windows against every pair of blocks in float64.

Axes: n rows and columns, R blocks, k feature columns, q groups of sketch columns.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.layers.site_trial import layers_fed_with_input, plan_sites
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.decision import plan_for
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.block_sums import INNER_TERMS, BlockSums, Meeting, empty_sums
from nntk_dist.products.formed import (
    combined,
    formed_block_products,
    formed_weighted_products,
    prepared_sketch,
    sketched_weighted_products,
)
from nntk_dist.products.metric import PLAIN, by_blocks, metric_block_products, metric_weighted_products, mixed_by_metric
from nntk_dist.products.wanted import Side, Wanted
from nntk_dist.products.weighted_products import add_products_
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics import tile_estimates as tiles
from nntk_dist.statistics.standard_errors import Calibration, estimate, jackknife_variance
from nntk_dist.statistics.tile_estimates import tile_estimates
from tests.harness.tools import all_rows, assert_equal
from tests.oracles.cases import case

BLOCKS = 8
EPS = float(torch.finfo(torch.float32).eps)
CALIBRATION = Calibration(level=1.0, relative_error=0.1, num_entries=1)


def means(count: int, length: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Block means of two row sets in float32; half of the rows are in both, which makes `within` largest."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(count, 1, 1, length, generator=generator)
    first, second = (signal + noise * torch.randn(count, BLOCKS, 1, length, generator=generator) for _ in range(2))
    return first, torch.cat([first[: count // 2], second[count // 2 :]])


def by_pairs(products: Tensor) -> BlockSums:
    """The sums from all pairs of blocks."""
    halves = 0.5 * (products + products.transpose(0, 1))
    own = torch.stack([products[r, r] for r in range(len(products))])
    return BlockSums(len(products), own.sum(0), products.sum((0, 1)) - own.sum(0), halves.sum(1) - own)


def nothing(count: int, wanted: Wanted, groups: int = 0) -> BlockSums:
    device = torch.device("cpu")
    return empty_sums((count, count), BLOCKS, wanted, pair_blocks=True, device=device, num_groups=groups)


@pytest.mark.parametrize("wanted", [Wanted(stderr=False), Wanted(stderr=True)])
@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0, 10.0])
def test_rounding_of_formed_products_is_that_of_a_few_units(noise, wanted):
    """U is accurate to eight rounding units of a block's mean product with itself, whether signal or noise dominates.
    If noise is not small, that is far below its effect (`within` is 1, 2 and 101 times the size of `between` here).
    """
    rows, columns = means(48, INNER_TERMS, noise)
    exact = by_pairs(formed_block_products(rows, columns, Meeting()))
    sums = nothing(48, wanted)
    parts = [combined(part, wanted) for part in (rows, columns)]
    add_products_(sums, formed_weighted_products(*parts, BLOCKS, wanted), Meeting())
    largest = float(exact.within.abs().max()) / BLOCKS
    ours, expected = estimate(sums, None), estimate(exact, None)
    assert ours.unbiased is not None
    assert expected.unbiased is not None
    error = ours.unbiased - expected.unbiased
    assert float(error.abs().max()) < 8 * EPS * largest
    assert float((ours.plugin - expected.plugin).abs().max()) < 8 * EPS * largest
    stderr = jackknife_variance(exact.by_block).sqrt()
    if noise >= 1:
        assert float(error.norm() / stderr.norm()) < 3e-5
    if wanted.stderr:
        assert sums.by_block is not None
        assert float((jackknife_variance(sums.by_block).sqrt() - stderr).abs().max()) < 8 * EPS * largest


def test_long_inner_products_are_summed_in_float64():
    """Sums of one sign in 64 portions of the terms: the error does not grow with their number."""
    rows, columns = means(4, 64 * INNER_TERMS // BLOCKS, 0.0)
    exact = by_pairs(formed_block_products(rows, columns, Meeting()))
    for paired in (False, True):
        sums = nothing(4, Wanted(stderr=False))
        if paired:
            sums = BlockSums(BLOCKS, sums.within[0], torch.zeros(4, dtype=torch.float64), None)
        parts = [combined(part, Wanted(stderr=False)) for part in (rows, columns)]
        add_products_(sums, formed_weighted_products(*parts, BLOCKS, Wanted(stderr=False)), Meeting(paired=paired))
        expected = exact.between.diagonal() if paired else exact.between
        assert_equal(sums.between, expected, 2 * EPS)


def test_sums_by_group_are_those_of_the_groups_alone():
    rows, columns = (part.double() for part in means(6, 64, 0.5))
    sums = nothing(6, Wanted(stderr=True), groups=4)
    prepared = [prepared_sketch(part, 4, Wanted(stderr=True)) for part in (rows, columns)]
    add_products_(sums, sketched_weighted_products(*prepared, BLOCKS, Wanted(stderr=True)), Meeting())
    parts = zip(rows.chunk(4, 3), columns.chunk(4, 3), strict=True)
    groups = torch.stack([torch.as_tensor(by_pairs(formed_block_products(a, b, Meeting())).between) for a, b in parts])
    assert_equal(sums.by_group, groups)
    assert_equal(sums.between, groups.sum(0))


@pytest.mark.parametrize("wanted", [Wanted(stderr=False), Wanted(stderr=True)])
def test_float32_products_with_a_metric_are_those_of_all_pairs(wanted):
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.randn(20, 2, 64, generator=generator) for _ in range(2))
    directions = torch.randn(64, 50, generator=generator, dtype=torch.float64)
    metric = directions @ directions.T
    exact = by_pairs(metric_block_products(rows, columns, metric, BLOCKS, Meeting()))
    sums = nothing(20, wanted)
    left, right = (
        mixed_by_metric({PLAIN: by_blocks(part, BLOCKS)}, metric, wanted.on(side))
        for part, side in ((rows, Side.ROWS), (columns, Side.COLUMNS))
    )
    add_products_(sums, metric_weighted_products(left, right, wanted), Meeting())
    scale = float((exact.within + exact.between).abs().max())
    assert_equal(sums.within, exact.within, 8 * EPS, scale=scale)
    assert_equal(sums.between, exact.between, 8 * EPS, scale=scale)
    if wanted.stderr:
        assert_equal(sums.by_block, exact.by_block, 8 * EPS, scale=scale)


# Windows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("estimator", ["weight", "autodiff"])
def test_windows_change_nothing_but_rounding(estimator, outputs, monkeypatch):
    """Small windows that divide no size against one window; a row set with itself, and two equal row sets."""
    spec = KernelSpec(estimator=estimator, outputs=outputs, gamma=0.6, draws=16, blocks=4)
    model, x = case("tanh_mlp").build(), case("tanh_mlp").inputs(11)
    features = make_feature_map(model, x, spec, plan_for(estimator, model, x, spec, stacked=True))
    rows = all_rows(features, x)
    whole = tile_estimates(features, [(rows, dict(rows))], spec.meeting, CALIBRATION, spec.scale)
    monkeypatch.setattr(tiles, "WINDOW_ROWS", 6)
    monkeypatch.setattr(tiles, "WINDOW_COLUMNS", 9)
    for others in (rows, dict(rows)):
        ours = tile_estimates(features, [(rows, others)], spec.meeting, CALIBRATION, spec.scale)
        for name, values in ours.items():
            assert_equal(values, whole[name], 1e-12)
            assert others is not rows or torch.equal(values.nan_to_num(), values.T.nan_to_num())
    prepared = features.prepare(rows, Wanted(stderr=True))
    again = tile_estimates(features, [(prepared, prepared)], spec.meeting, CALIBRATION, spec.scale)
    assert all(
        torch.equal(again[name], tile_estimates(features, [(rows, rows)], spec.meeting, CALIBRATION, spec.scale)[name])
        for name in again
    )
    single = tile_estimates(features, [(rows, rows)], spec.meeting, CALIBRATION, spec.scale, dtype=torch.float32)
    assert all(torch.equal(single[name], again[name].float()) for name in again)


# Layers that see the same under every draw ----------------------------------------------------------------------------


class Scaled(nn.Module):
    """A layer after multiplication by a parameter that is 1: its input equals x but is another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.first, self.second = nn.Linear(2, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.scale * x)))


class InPlace(Scaled):
    """The same in place: the input has the memory of x but other values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.mul_(2.0))))


def test_layers_fed_with_the_input_itself_are_told_by_its_memory():
    def shared(model: nn.Module, x: Tensor, patterns: tuple[str, ...] = ("*",)) -> list[str]:
        plan = plan_sites(model, select_parameters(model, patterns), x)
        return sorted(plan.input_layers)

    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Scaled()
    assert shared(model, x) == []
    assert layers_fed_with_input(InPlace(), ["first"], x) == set()  # no model so far has such a layer in its plan
    assert shared(nn.Sequential(model.first, nn.Tanh(), model.second), x) == ["0"]
    assert shared(nn.Sequential(nn.Flatten(), model.first, nn.Tanh(), model.second), x[:, :, None]) == ["1"]
    assert shared(nn.Sequential(model.first, nn.Tanh(), model.second), x, ("2.bias",)) == ["2"]


@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("draws", [4, 16])
def test_shared_inputs_give_the_sums_of_all_pairs_of_draws(draws, outputs):
    spec = KernelSpec(estimator="autodiff", outputs=outputs, gamma=0.6, draws=draws, blocks=4, contraction="layered")
    x, others = case("tanh_mlp").inputs(5), case("tanh_mlp").inputs(4, seed=7)
    model = case("tanh_mlp").build()
    features = make_feature_map(model, x, spec, plan_for("autodiff", model, x, spec))
    assert isinstance(features, GradientFeatures)
    assert features.shared == {0}
    plain = replace(features, shared=frozenset())
    left, right = all_rows(features, x), all_rows(features, others)
    for wanted in (Wanted(stderr=False), Wanted(stderr=True)):
        ours, pairs = (f.block_sums(left, right, spec.meeting, wanted) for f in (features, plain))
        for name in ("within", "between", "by_block") if wanted.stderr else ("within", "between"):
            assert_equal(getattr(ours, name), getattr(pairs, name), 1e-12)


# Unresolved entries of means ------------------------------------------------------------------------------------------


def test_means_that_changed_in_one_block_alone_are_unresolved_whatever_rounding_says():
    """All block products are 0 up to rounding, as sums that cancel; such entries must be reported as unknown."""
    generator = torch.Generator().manual_seed(5)
    dense = torch.zeros(4, BLOCKS, 1, 700)
    dense[0] = torch.randn(BLOCKS, 1, 700, generator=generator)
    dense[1, 2], dense[2, 5] = torch.randn(2, 1, 700, generator=generator)
    spec = SimpleNamespace(num_draws=64, num_blocks=BLOCKS, num_parameters=700)
    features = DifferenceMeans(None, spec, (0,))
    rows = {"dense": dense}
    result = tile_estimates(features, [(rows, rows)], Meeting(), CALIBRATION, "localized")
    unknown = [[False, False, False, True], [False, True, False, True], [False, False, True, True], [True] * 4]
    assert result["stderr"].isnan().tolist() == unknown
