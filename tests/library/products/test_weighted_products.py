"""Sums of plain products: windows, stripes and passes of any size, and products that are added in place.

The reference is the sum by definition, over products of all pairs of blocks in float64.

Axes: n rows, r blocks, c outputs, k columns.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import plan_for
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products import weighted_products as products_module
from nntk_dist.products.block_sums import BETWEEN, WITHIN, Meeting, block, empty_sums
from nntk_dist.products.wanted import Wanted
from nntk_dist.products.weighted_products import (
    Inputs,
    ProductSums,
    WeightedProduct,
    add_products_,
    can_multiply_into,
    multiply_into_,
    num_at_once,
    product_window_edges,
)
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics import tile_estimates as tiles
from nntk_dist.statistics.standard_errors import Calibration, Estimates, estimate, shares_of_sums
from nntk_dist.statistics.tile_estimates import tile_estimates
from tests.harness.grids import pairwise
from tests.harness.tools import all_rows, assert_equal
from tests.oracles.cases import case

CALIBRATION = Calibration(level=0.8, relative_error=0.1, num_entries=1)
EPS = float(torch.finfo(torch.float32).eps)
KINDS = {
    "means": {"estimator": "autodiff", "contraction": "means"},
    "sketch": {"estimator": "autodiff", "contraction": "sketch", "sketch": 64},
    "differences": {"estimator": "weight"},
    "covariance": {"estimator": "weight", "kind": "covariance"},
    "averaged": {"estimator": "autodiff", "kind": "averaged", "contraction": "means"},
}
# Products of layers, which are multiplied with each other.
LAYERED = {
    "layered": {"estimator": "autodiff", "contraction": "layered"},
    "mixed": {"estimator": "autodiff", "contraction": "auto"},
    "averaged, layered": {"estimator": "autodiff", "kind": "averaged", "contraction": "layered"},
}
ALL_KINDS = KINDS | LAYERED


def small(kind: str, *, outputs: str = "trace", dtype: torch.dtype = torch.float64):
    """A kernel's spec, its features, and two row sets."""
    spec = KernelSpec(outputs=outputs, gamma=0.6, draws=16, blocks=4, **ALL_KINDS[kind])
    model = prepare_model(case("tanh_mlp").build(), dtype=dtype, device="cpu")
    x = case("tanh_mlp").inputs(13).to(dtype)
    decision = plan_for(ALL_KINDS[kind]["estimator"], model, x, spec, stacked=True)
    features = make_feature_map(model, x, spec, decision)
    return spec, features, all_rows(features, x[:7]), all_rows(features, x[7:])


def by_sums(features, rows, others, meeting: Meeting, calibration) -> Estimates:
    """The statistics of a tile from products of all pairs of blocks."""
    products = features.block_products(rows, others, meeting)
    blocks = features.num_blocks
    shape = products.shape[2:] if features.pair_blocks else products.shape[1:]
    sums = empty_sums(shape, blocks, Wanted(stderr=True), pair_blocks=features.pair_blocks, device=products.device)
    if features.pair_blocks:
        own = products.diagonal(dim1=0, dim2=1).movedim(-1, 0)
        sums.within, sums.between = own.sum(0), products.sum((0, 1)) - own.sum(0)
        sums.by_block = 0.5 * (products.sum(1) + products.sum(0)) - own
    else:
        sums.within, sums.by_block = products.sum(0), products
    return estimate(sums, calibration)


PIECES = ["whole", "in pieces", "in passes"]


@pytest.fixture(params=PIECES)
def pieces(request, monkeypatch):
    """Windows, stripes and passes of the default sizes, or of the smallest ones."""
    if request.param != "whole":
        limits = {"_EDGE": 5, "_WINDOW_NUMBERS": 64, "_FEWEST_ROWS": 3, "_STRIPE_NUMBERS": 200}
        for name, value in limits.items():
            monkeypatch.setattr(products_module, name, value)
        monkeypatch.setattr(tiles, "_FEW_ROWS", 4)
    if request.param == "in passes":
        for name, value in {"_MOST_AT_ONCE": 1, "_MANY_AT_ONCE": 2, "INNER_TERMS": 7}.items():
            monkeypatch.setattr(products_module, name, value)
    return request.param


@pytest.mark.parametrize(
    ("kind", "pieces", "outputs"),
    pairwise([kind for kind in ALL_KINDS if kind != "sketch"], PIECES, ["trace", "full"]),
    indirect=["pieces"],
)
def test_tiles_are_those_of_all_pairs_of_blocks(kind, outputs, pieces):
    spec, features, rows, others = small(kind, outputs=outputs)
    wanted = Wanted(stderr=True)
    assert features.weighted_products(*(features.prepare(part, wanted) for part in (rows, others)), wanted)
    for calibration in (None, CALIBRATION):
        ours = tile_estimates(features, [(rows, others)], spec.meeting, calibration, "localized")
        truth = by_sums(features, rows, others, spec.meeting, calibration)
        for name, values in ours.items():
            assert_equal(values, getattr(truth, name), 1e-12)
        assert ("stderr" in ours) == (calibration is not None)
        assert ("unbiased" in ours) == features.pair_blocks


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", ["layered", "averaged, layered", "means", "differences"])
def test_some_outputs_of_the_columns_calibrate_the_same_entries(kind, paired, monkeypatch):
    """A sample of few entries takes some outputs of the columns, with all outputs of the rows."""
    spec, features, rows, others = small(kind, outputs="full")
    rows, others = ({name: array[:5] for name, array in part.items()} for part in (rows, others))
    meeting, width = replace(spec.meeting, paired=paired), len(features.columns)
    whole = features.block_products(rows, others, meeting)
    taken = []
    monkeypatch.setattr(tiles, "calibrate", lambda products, **_: taken.append(products))
    monkeypatch.setattr(tiles, "SAMPLE_ENTRIES", 1)
    monkeypatch.setattr(tiles, "_FEWEST_OUTPUTS", width - 1)
    tiles.calibrate_sample(features, [(rows, others)], meeting)
    chosen = torch.tensor([index * width // (width - 1) for index in range(width - 1)])
    by_output = whole if paired else whole.unflatten(-1, (5, width))
    expected = by_output[..., chosen] if paired else by_output[..., chosen].flatten(-2)
    assert_equal(taken[0], expected, 1e-12)


def test_sketched_tiles_know_their_groups(pieces):
    spec, features, rows, others = small("sketch")
    ours = tile_estimates(features, [(rows, others)], spec.meeting, CALIBRATION, "localized")
    sums = features.block_sums(rows, others, spec.meeting, Wanted(stderr=True))
    assert sums.by_group is not None
    assert len(sums.by_group) == features.num_sketch_groups > 1
    assert_equal(sums.by_group.sum(0), sums.between, 1e-12)
    truth = by_sums(features, rows, others, spec.meeting, CALIBRATION)
    sketch = sums.by_group.var(0) * len(sums.by_group) / 12**2  # R(R − 1) = 12
    assert truth.stderr is not None
    assert_equal(ours["stderr"], (truth.stderr**2 + sketch).sqrt(), 1e-12)


@pytest.mark.parametrize(
    ("kind", "pieces", "calibration"), pairwise(ALL_KINDS, PIECES, [None, CALIBRATION]), indirect=["pieces"]
)
def test_a_tile_of_one_row_set_is_bitwise_symmetric(kind, calibration, pieces):
    spec, features, rows, _ = small(kind, dtype=torch.float32)
    options = {"dtype": torch.float32}
    ours = tile_estimates(features, [(rows, rows)], spec.meeting, calibration, "raw", **options)
    other = tile_estimates(features, [(rows, dict(rows))], spec.meeting, calibration, "raw", **options)
    for name, values in ours.items():
        assert torch.equal(values.nan_to_num(), values.T.nan_to_num())
        assert_equal(values, other[name], 1e-4 if name == "stderr" else 16 * EPS)


@pytest.mark.parametrize("scale", ["localized", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_added_in_place_are_the_sums(kind, scale):
    """Float32 results of float32 features, without standard errors, against sums in float64."""
    spec, features, rows, others = small(kind, dtype=torch.float32)
    prepared = [features.prepare(part, Wanted(stderr=False)) for part in (rows, others)]
    assert can_multiply_into(features.weighted_products(*prepared, Wanted(stderr=False)), spec.meeting, torch.float32)
    ours = tile_estimates(features, [(rows, others)], spec.meeting, None, scale, dtype=torch.float32)
    truth = tile_estimates(features, [(rows, others)], spec.meeting, None, scale)
    assert truth["plugin"].dtype == torch.float64
    largest = float(truth["plugin"].abs().max())
    for name, values in truth.items():
        assert ours[name].dtype == torch.float32
        assert_equal(ours[name], values, 8 * EPS, scale=largest)


def test_products_are_added_to_what_is_there():
    """Both layers contribute to both results; the second layer's products cannot be copied from one to the other."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(6, 2, 1, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    both = [WeightedProduct(a, b, {WITHIN: 1.0, BETWEEN: 2.0}), WeightedProduct(c, d, {WITHIN: 1.0, BETWEEN: -1.0})]
    shares = {"first": {WITHIN: 0.5, BETWEEN: 0.5}, "second": {BETWEEN: 3.0}}
    results = {name: torch.full((6, 6), torch.nan, dtype=torch.float64) for name in shares}
    ab, cd = a.flatten(1) @ b.flatten(1).T, c.flatten(1) @ d.flatten(1).T
    for rows in (slice(0, 2), slice(2, 6)):
        parts = {name: values[rows] for name, values in results.items()}
        multiply_into_(parts, both, Meeting(), shares, rows, slice(None))
    assert_equal(results["first"], 1.5 * ab, 1e-12)  # the shares of cd cancel
    assert_equal(results["second"], 6.0 * ab - 3.0 * cd, 1e-12)
    again = [*both, WeightedProduct(c, d, {WITHIN: 1.0, BETWEEN: 1.0})]
    results = {name: torch.full((6, 6), torch.nan, dtype=torch.float64) for name in shares}
    multiply_into_(results, again, Meeting(), shares, slice(None), slice(None))
    assert_equal(results["first"], 1.5 * ab + cd, 1e-12)
    assert_equal(results["second"], 6.0 * ab, 1e-12)


def test_shares_of_sums_are_those_of_the_statistics():
    generator = torch.Generator().manual_seed(1)
    for pair_blocks in (True, False):
        sums = empty_sums((3, 4), 5, Wanted(stderr=False), pair_blocks=pair_blocks, device=torch.device("cpu"))
        for part in sums.parts().values():
            part.copy_(torch.randn(3, 4, generator=generator))
        expected = estimate(sums, None)
        for name, of in shares_of_sums(5, pair_blocks=pair_blocks).items():
            mine = sum(share * sums.parts()[each] for each, share in of.items())
            assert_equal(mine, getattr(expected, name), 1e-14)


def test_weights_of_slots_and_pairs_of_rows():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(6, 3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)[:, None, None]
    term = WeightedProduct(a, b, {WITHIN: 1.0, block(1): -2.0}, weights)
    for paired, full in ((False, False), (True, False), (False, True), (True, True)):
        meeting = Meeting(paired=paired, full=full)
        sums = empty_sums(meeting.shape(6, 6, 2), 4, Wanted(stderr=True), pair_blocks=True, device=a.device)
        add_products_(sums, [term], meeting)
        rows, columns = (a * weights).transpose(1, 2).flatten(2), b.transpose(1, 2).flatten(2)
        expected = meeting.outputs(rows, columns)
        assert_equal(sums.within, expected, 1e-12)
        assert_equal(sums.by_block[1], -2.0 * expected, 1e-12)
        assert not sums.between.any()


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_products_of_inputs_multiply_those_of_their_terms(full, paired, pieces):
    """Terms that share their inputs, terms that do not, and one without inputs."""
    generator = torch.Generator().manual_seed(4)

    def features(*shape: int) -> torch.Tensor:
        return torch.randn(6, *shape, generator=generator, dtype=torch.float64)

    shared, own = (Inputs(features(4), features(4)) for _ in range(2))
    weights = torch.tensor([[[1.0, -2.0, 0.5]]], dtype=torch.float64)
    terms = [
        WeightedProduct(features(1, 2, 3), features(1, 2, 3), {WITHIN: 1.0}, inputs=shared),
        WeightedProduct(features(2, 2, 5), features(2, 2, 5), {WITHIN: 0.5, BETWEEN: 2.0}, inputs=shared),
        WeightedProduct(features(1, 2, 3), features(1, 2, 3), {BETWEEN: 1.0}, weights, own),
        WeightedProduct(features(1, 2, 3), features(1, 2, 3), {BETWEEN: 1.0}),
    ]
    meeting = Meeting(full=full, paired=paired)
    sums = empty_sums(meeting.shape(6, 6, 2), 4, Wanted(stderr=False), pair_blocks=True, device=torch.device("cpu"))
    add_products_(sums, terms, meeting)
    expected: dict[Any, Any] = {WITHIN: 0.0, BETWEEN: 0.0}
    for term in terms:
        product = meeting.outputs(*(part.transpose(1, 2).flatten(2) for part in (term.rows(), term.right)))
        if term.inputs is not None:
            product = meeting.multiply_shared_(product, term.inputs.left, term.inputs.right)
        for name, factor in term.factors.items():
            expected[name] = expected[name] + factor * product
    assert_equal(sums.within, expected[WITHIN], 1e-12)
    assert_equal(sums.between, expected[BETWEEN], 1e-12)


def test_blocks_that_agree_have_no_error_at_all():
    """Also if their products are not 0: differences of equal numbers are 0 for any common summand."""
    same = torch.randn(9, 1, 1, 7, generator=torch.Generator().manual_seed(3)).expand(9, 4, 1, 7)
    products = [
        WeightedProduct(same[:, r : r + 1], same[:, r : r + 1], {WITHIN: 1.0, block(r): -1.0}) for r in range(4)
    ]
    whole = WeightedProduct(
        same.sum(1, keepdim=True), same.sum(1, keepdim=True), {BETWEEN: 1.0} | {block(r): 0.25 for r in range(4)}
    )
    form = empty_sums((0, 0), 4, Wanted(stderr=True), pair_blocks=True, device=same.device)
    for _, sums in ProductSums([whole, *products], Meeting(), form).stripes():
        stderr = estimate(sums, CALIBRATION).stderr
        assert stderr is not None
        assert not stderr.any()


def test_windows_hold_what_they_may():
    assert product_window_edges(2, 2, "cpu") == (1024, 1024)
    for num_products, num_sums in ((2, 2), (9, 10), (17, 18), (40, 2), (1000, 10), (1000, 18)):
        rows, columns = product_window_edges(num_products, num_sums, "cpu")
        several = num_at_once(num_products, num_sums) < num_products
        numbers = rows * columns * (num_at_once(num_products, num_sums) + 2 * num_sums * several)
        assert rows == products_module._FEWEST_ROWS or numbers <= products_module._WINDOW_NUMBERS
