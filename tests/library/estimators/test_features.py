"""Features and their sums: two ways of computing the same quantity agree, with each other and with the definitions.

Layered against dense contractions, stacked against sequential evaluation, sums against products.

Axes: S draws, R blocks, n (n1, n2) examples, C outputs, P parameters.
"""

from dataclasses import replace

import pytest
import torch

from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.estimators.mean_differences import DifferenceMeans
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.models.evaluation import Evaluator, moved_in_place, outputs, prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.decision import plan_for
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.block_sums import Meeting
from nntk_dist.products.features import block_range, concatenate_rows, feature_bytes, slice_rows
from nntk_dist.products.wanted import Wanted
from nntk_dist.runtime.batches import in_batches
from nntk_dist.spec import KernelSpec
from tests.harness.grids import pairwise
from tests.harness.tools import (
    KINDS,
    all_rows,
    assert_equal,
    by_definition,
    estimates_of,
    prepared_features,
    small,
    two_row_sets,
)
from tests.oracles.cases import case

# Layered and dense ----------------------------------------------------------------------------------------------------


def contractions(name: str, spec: KernelSpec) -> dict[str, GradientFeatures]:
    """The same gradients as factors, formed layer by layer, as a mixture, and by differentiating the whole model."""
    model, x = prepare_model(case(name).build(), dtype=torch.float64, device="cpu"), case(name).inputs(3)
    space = select_parameters(model, spec.parameters)
    layered = plan_sites(model, space, x)
    assert len(layered.outer) >= 2
    first = frozenset({layered.outer[0].module})
    plans = {
        "layered": layered,
        "mixed": layered.densified(first),
        "dense": layered.densified(frozenset(site.module for site in layered.outer)),
        "whole": replace(layered, outer=(), dense=(), whole=space.names),
    }
    columns = (spec.outputs,) if isinstance(spec.outputs, int) else tuple(range(case(name).num_outputs))
    drawing = spec.drawing("autodiff", space, model)
    return {
        plan_name: GradientFeatures(Evaluator(model, space), plan, drawing, columns, spec.pair_blocks)
        for plan_name, plan in plans.items()
    }


@pytest.mark.parametrize(
    ("name", "outputs", "kind"),
    pairwise(["relu_mlp", "deep_relu_mlp", "raw_parameters"], ["trace", "full", 1], ["nonlocal", "averaged"]),
)
def test_layered_mixed_dense_and_whole_contractions_are_the_definition(name, kind, outputs):
    spec = KernelSpec(kind=kind, outputs=outputs, gamma=0.6, design="antithetic", draws=16, blocks=4)
    x1, x2 = case(name).inputs(3), case(name).inputs(2, seed=7)
    expected = by_definition(case(name).build(), x1, x2, spec, "autodiff")
    for features in contractions(name, spec).values():
        ours = estimates_of(features, all_rows(features, x1), all_rows(features, x2), spec)
        assert_equal(ours["plugin"], expected.plugin)
        assert_equal(ours["stderr"], expected.stderr, scale=abs(expected.plugin).max())
        if kind == "nonlocal":
            assert_equal(ours["unbiased"], expected.unbiased)


def test_factors_are_smaller_than_what_they_stand_for():
    formed = contractions("deep_relu_mlp", KernelSpec(draws=8))
    layered, dense = (all_rows(formed[name], case("deep_relu_mlp").inputs(3)) for name in ("layered", "dense"))
    assert set(layered) == {f"{part}_{layer}" for part in ("input", "gradient") for layer in range(3)}
    assert set(dense) == {"dense"}
    assert feature_bytes(layered) == sum(array.nbytes for array in layered.values()) < feature_bytes(dense)


# Features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["relu_mlp", "tied_weights", "raw_parameters", "attention", "embedding", "flat_output"]
)
def test_stacked_evaluation_equals_sequential(name):
    model, x = case(name).build(), case(name).inputs(4)
    space = select_parameters(model)
    z = KernelSpec(gamma=0.6, draws=8).drawing("weight", space, model).perturbations(range(8), dtype=torch.float64)
    stacked, sequential = (Evaluator(model, space, stacked=stack).perturbed(x, z) for stack in (True, False))
    assert stacked.shape == (8, 4, case(name).num_outputs)
    torch.testing.assert_close(stacked, sequential, rtol=1e-12, atol=1e-12)
    expected = [outputs(model, x, space.moved(space.values(model), one)) for one in z]  # by functional calls
    torch.testing.assert_close(sequential, torch.stack(expected), rtol=1e-12, atol=1e-12)
    for stack in (True, False):
        in_batches_of_three = Evaluator(model, space, stacked=stack).perturbed(x, z, 3)
        torch.testing.assert_close(in_batches_of_three, sequential, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["relu_mlp", "tied_weights", "raw_parameters"])
def test_parameters_come_back_bit_for_bit_also_from_an_error(name):
    model, x = case(name).build(), case(name).inputs(4)
    space = select_parameters(model)
    before = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    Evaluator(model, space).perturbed(x, torch.ones(2, space.num_parameters, dtype=torch.float64))

    def fail_away_from_theta() -> None:
        with moved_in_place(model, space) as move:
            move(torch.ones(space.num_parameters, dtype=torch.float64))
            assert not any(torch.equal(value, before[key][1]) for key, value in model.state_dict().items())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_away_from_theta()
    for key, value in model.state_dict().items():
        assert value.data_ptr() == before[key][0]
        assert torch.equal(value, before[key][1])


@pytest.mark.parametrize(("kind", "estimator"), KINDS)
def test_arrays_are_as_announced(kind, estimator):
    for name in ("tanh_mlp", "attention"):
        _, features = small(kind, estimator, name=name)
        rows = all_rows(features, case(name).inputs(5))
        assert {spec.name: spec.shape for spec in features.arrays} == {n: tuple(a.shape[1:]) for n, a in rows.items()}
        assert all(len(spec.axes) == len(spec.shape) and spec.axes[0] in ("draw", "block") for spec in features.arrays)


@pytest.mark.parametrize(("kind", "estimator"), KINDS)
def test_chunks_of_draws_and_of_outputs_are_parts_of_the_whole(kind, estimator):
    _, features = small(kind, estimator)
    x = case("tanh_mlp").inputs(5)
    whole = all_rows(features, x)
    chunks = [
        features.compute(x, torch.arange(len(x)), draws, features.columns)
        for draws in (range(4), range(4, 12), range(12, 16))
    ]
    for name, array in whole.items():
        assert torch.equal(torch.cat([chunk[name] for chunk in chunks], dim=1), array)
    some = features.compute(x, torch.arange(len(x)), range(16), (2, 0))
    for spec in features.arrays:
        if "output" in spec.axes:
            axis = 1 + spec.axes.index("output")
            torch.testing.assert_close(some[spec.name], whole[spec.name].index_select(axis, torch.tensor([2, 0])))


@pytest.mark.parametrize("outputs", ["trace", "full", 1])
@pytest.mark.parametrize("design", ["iid", "antithetic"])
def test_formed_means_are_differences_and_their_metric(design, outputs):
    spec = KernelSpec(estimator="weight", outputs=outputs, gamma=0.6, design=design, draws=64, blocks=4)
    _, features = small("nonlocal", "weight")
    x1, x2 = case("tanh_mlp").inputs(5), case("tanh_mlp").inputs(4, seed=7)
    drawing = spec.drawing("weight", features.evaluator.space, features.evaluator.model)
    columns = (1,) if outputs == 1 else (0, 1, 2)
    results = []
    for kind in (DifferenceFeatures, DifferenceMeans):
        one = kind(features.evaluator, drawing, columns)
        results.append(estimates_of(one, all_rows(one, x1), all_rows(one, x2), spec))
    assert set(results[0]) == set(results[1]) == {"plugin", "unbiased", "stderr"}
    for name, values in results[0].items():
        assert_equal(results[1][name], values)


def test_means_are_formed_where_draws_are_many_and_parameters_few():
    def kind(draws: int, name: str) -> type:
        spec = KernelSpec(estimator="weight", gamma=1.0, draws=draws, blocks=8)
        return type(prepared_features(case(name).build(), case(name).inputs(3), spec)[0])

    assert kind(8192, "sign_unit") is DifferenceMeans
    assert kind(256, "sign_unit") is DifferenceFeatures
    assert kind(8192, "deep_sign_mlp") is DifferenceMeans
    assert kind(4096, "deep_sign_mlp") is DifferenceFeatures


def test_draws_that_are_not_whole_blocks_are_refused():
    _, features = small("nonlocal", "autodiff")
    with pytest.raises(ValueError, match=r"draws 2:8 are not whole blocks of 4"):
        features.compute(case("tanh_mlp").inputs(2), torch.arange(2), range(2, 8), (0,))
    assert block_range(range(4, 12), 4) == range(1, 3)


def test_batches_are_padded_and_outputs_are_those_of_the_model():
    x = torch.arange(16.0).reshape(8, 2)
    batches = list(in_batches(x, 3))
    assert [(len(rows), own) for rows, own in batches] == [(3, slice(0, 3)), (3, slice(3, 6)), (3, slice(6, 8))]
    assert torch.equal(batches[2][0], x[[6, 7, 7]])
    _, features = small("nonlocal", "weight")
    x = case("tanh_mlp").inputs(7)
    torch.testing.assert_close(features.outputs(x, batch=3), case("tanh_mlp").build()(x))


def test_the_metric_may_be_given_instead_of_made():
    spec, features = small("nonlocal", "weight")
    assert isinstance(features, DifferenceFeatures)
    metric = features.make_metric()
    x = case("tanh_mlp").inputs(5)
    decision = plan_for("weight", features.evaluator.model, x, spec, stacked=True)
    given = make_feature_map(features.evaluator.model, x, spec, decision, metric=2.0 * metric)
    rows = all_rows(features, x)
    assert_equal(
        estimates_of(given, rows, rows, spec)["plugin"], 2 * estimates_of(features, rows, rows, spec)["plugin"]
    )
    delta = rows["differences"].transpose(1, 2)
    assert_equal(
        estimates_of(features, rows, rows, spec)["plugin"], torch.einsum("ncs,st,mct->nm", delta, metric, delta)
    )


# Sums -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("kind", "estimator"), KINDS)
def test_sums_are_sums_of_products(kind, estimator, full, paired):
    _, features = small(kind, estimator, "full" if full else "trace")
    rows, others = two_row_sets(features)
    meeting = Meeting(full=full, paired=paired)
    others = rows if paired else others
    products = features.block_products(rows, others, meeting)
    sums = features.block_sums(rows, others, meeting, Wanted(stderr=True))
    assert sums.num_blocks == 4
    if not features.pair_blocks:
        assert sums.between is None
        assert_equal(sums.within, products.sum(0))
        assert_equal(sums.by_block, products)
        return
    diagonal = torch.stack([products[r, r] for r in range(4)])
    halves = 0.5 * (products + products.transpose(0, 1))
    assert_equal(sums.within, diagonal.sum(0))
    assert_equal(sums.between, products.sum((0, 1)) - diagonal.sum(0))
    assert_equal(sums.by_block, halves.sum(1) - diagonal)
    without = features.block_sums(rows, others, meeting, Wanted(stderr=False))
    assert without.by_block is None
    assert_equal(without.between, sums.between)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", ["nonlocal", "covariance"])
def test_products_of_many_outputs_are_added_up_in_portions(kind, paired, monkeypatch):
    _, features = small(kind, "weight")
    rows, others = two_row_sets(features)
    others, meeting = rows if paired else others, Meeting(full=False, paired=paired)
    products = features.block_products(rows, others, meeting)
    portions, original = [], DifferenceFeatures._products

    def one(self, left, right, meeting):
        portions.append(left.shape[1])
        return original(self, left, right, meeting)

    monkeypatch.setattr(DifferenceFeatures, "_products", one)
    monkeypatch.setattr("nntk_dist.estimators.output_differences._PORTION_NUMBERS", 1)
    assert_equal(features.block_products(rows, others, meeting), products)
    assert portions == [1, 1, 1]


def test_row_sets_join_and_part():
    rows = {"a": torch.arange(6).reshape(3, 2), "b": torch.arange(3)}
    parts = [slice_rows(rows, slice(0, 1)), slice_rows(rows, torch.tensor([1, 2]))]
    joined = concatenate_rows(parts)
    assert all(torch.equal(joined[name], rows[name]) for name in rows)
