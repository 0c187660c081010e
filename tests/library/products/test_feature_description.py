"""How features describe themselves: every estimator's answers against its actual arrays and products.

Axes: n rows, S draws, R blocks, C outputs.
"""

import json
import math
from typing import Any

import pytest
import torch

from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.planning.plain import from_plain, to_plain
from nntk_dist.products.block_sums import Meeting
from nntk_dist.products.factor_form import METRIC_DRAWS
from nntk_dist.products.feature_description import ArraySpec, FeatureStorage
from nntk_dist.products.features import FeatureMap, feature_bytes
from nntk_dist.products.wanted import Side, Wanted
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, assert_equal
from tests.oracles.cases import case

KINDS = {
    "layered": {"estimator": "autodiff", "contraction": "layered"},
    "means": {"estimator": "autodiff", "contraction": "means"},
    "sketch": {"estimator": "autodiff", "contraction": "sketch", "sketch": 64},
    "local sketch": {"kind": "local", "sketch": 64},
    "averaged": {"kind": "averaged", "contraction": "means"},
    "weight": {"estimator": "weight"},
    "covariance": {"kind": "covariance"},
    "activation": {"estimator": "activation", "contraction": "layered", "variance_reduction": "none"},
    "activation means": {"estimator": "activation", "contraction": "means", "variance_reduction": "none"},
    "reduced": {"estimator": "activation", "contraction": "layered"},
    "reduced means": {"estimator": "activation", "contraction": "means"},
}
FACTORS = {
    "sketch": ("block", "column"),
    "local sketch": ("block", "column"),
    "weight": ("draw", "output"),
    "covariance": ("draw", "output"),
}


def features_of(kind: str, outputs: str = "trace", **options: Any) -> tuple[KernelSpec, FeatureMap]:
    """The spec and the features of a kernel of 16 draws in 4 blocks."""
    spec = KernelSpec(outputs=outputs, gamma=0.6, blocks=4, **{"draws": 16, **KINDS[kind], **options})
    model = prepare_model(case("tanh_mlp").build(), dtype=torch.float64, device="cpu")
    x = case("tanh_mlp").inputs(6)
    return spec, make_feature_map(model, x, spec, decide(model, x, spec, batch=len(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_estimator_is_a_feature_map_whose_storage_survives_json(kind):
    _, features = features_of(kind)
    assert isinstance(features, FeatureMap)
    storage = features.storage
    assert storage.arrays == features.arrays
    assert from_plain(FeatureStorage, json.loads(json.dumps(to_plain(storage)))) == storage
    paths = {storage.path("train", spec) for spec in storage.arrays}
    assert len(paths) == len(storage.arrays)
    assert (paths == {"train/features"}) == (kind in FACTORS)


@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_with_a_metric_are_a_factor_of_plugin(kind, outputs):
    spec, features = features_of(kind, outputs)
    storage, metric = features.storage, features.make_metric()
    form = storage.factor_form(full=spec.meeting.full)
    assert storage.is_factor == (form is not None) == (kind in FACTORS)
    if form is None or storage.metric is None or metric is None:
        return
    assert metric.shape == storage.metric.shape
    (rows,) = all_rows(features, case("tanh_mlp").inputs(6)).values()
    factor = torch.from_numpy(form.rows(rows.numpy(), form.root(metric.numpy())))
    products = features.block_products({storage.arrays[0].name: rows}, {storage.arrays[0].name: rows}, spec.meeting)
    plugin = products.mean((0, 1)) if features.pair_blocks else products.mean(0)
    assert_equal(factor @ factor.T, plugin, 1e-10)


def test_a_large_diagonal_metric_is_not_kept():
    for draws, kept in ((METRIC_DRAWS, True), (METRIC_DRAWS + 4, False)):
        storage = features_of("covariance", draws=draws)[1].storage
        assert (storage.metric is not None) == kept
        assert storage.is_single
        assert not storage.needs_metric


@pytest.mark.parametrize("kind", ["weight", "covariance", "sketch"])
def test_a_given_metric_gives_the_same_products(kind):
    spec, features = features_of(kind)
    metric = features.make_metric()
    assert metric is not None
    rows = all_rows(features, case("tanh_mlp").inputs(6))
    given = features.with_metric(metric)
    wanted = Wanted(stderr=True)
    for name, part in features.block_sums(rows, rows, spec.meeting, wanted).parts().items():
        assert torch.equal(part, given.block_sums(rows, rows, spec.meeting, wanted).parts()[name])


@pytest.mark.parametrize("stderr", [False, True])
@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("kind", ["means", "sketch", "local sketch", "averaged", "weight", "covariance"])
def test_operations_of_an_entry_are_the_lengths_of_its_products(kind, outputs, stderr):
    """For kernels of plain matrix products, not counting elementwise multiplications of the products."""
    spec, features = features_of(kind, outputs)
    wanted, rows = Wanted(stderr), all_rows(features, case("tanh_mlp").inputs(6))
    prepared = features.prepare(rows, wanted)
    products = features.weighted_products(prepared, prepared, wanted)
    assert products is not None
    length = sum(math.prod(each.left.shape[1:]) for each in products)
    copies = len(features.columns) if spec.meeting.full else 1
    assert features.costs(spec.meeting, wanted).entry_operations == 2.0 * length * copies


@pytest.mark.parametrize("stderr", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_prepared_features_take_what_they_say_or_less(kind, stderr):
    spec, features = features_of(kind)
    rows, wanted = all_rows(features, case("tanh_mlp").inputs(6)), Wanted(stderr)
    prepared = features.prepare(rows, wanted)
    assert feature_bytes(prepared) <= features.costs(spec.meeting, wanted).prepared_share * feature_bytes(rows)


def test_rows_of_tiles_need_less_than_columns():
    features = features_of("weight")[1]
    rows, wanted = all_rows(features, case("tanh_mlp").inputs(6)), Wanted(stderr=False)
    sides = [feature_bytes(features.prepare(rows, wanted.on(side))) for side in (Side.ROWS, Side.COLUMNS, Side.BOTH)]
    assert sides[0] == feature_bytes(rows)
    assert sides[1] == sides[2] == 3 * sides[0]


def test_passes_and_costs_that_depend_on_the_estimator():
    costs = {kind: features_of(kind)[1].costs(Meeting(), Wanted(stderr=True)) for kind in KINDS}
    outputs = 3
    assert costs["sketch"].passes_per_draw is None
    assert costs["layered"].passes_per_draw == costs["layered"].pass_copies == 1 + outputs
    assert costs["weight"].passes_per_draw == costs["activation"].passes_per_draw == 1
    assert [kind for kind, each in costs.items() if each.allows_sketch] == [
        "layered",
        "means",
        "reduced",
        "reduced means",
    ]
    assert [kind for kind, each in costs.items() if each.pair_numbers] == ["activation"]
    assert [kind for kind, each in costs.items() if each.metric_operations] == ["weight", "covariance"]
    assert {kind for kind, each in costs.items() if each.copies_sample} >= {"layered", "activation"}


def test_an_array_without_a_metric_has_no_factor():
    storage = FeatureStorage((ArraySpec("dense", ("block", "output"), (4, 3)),))
    assert storage.factor_form(full=False) is None
    assert storage.arrays[0].num_numbers == 12
