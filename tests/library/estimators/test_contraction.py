"""Which contraction is chosen for which layer, how it is reported, and which combinations are refused.

Axes: S draws, R blocks.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from nntk_dist import nonlocal_kernel
from nntk_dist.errors import NNTKError
from nntk_dist.estimators.contraction import Contraction, Setting, choose_contraction
from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.layers.sites import SitePlan
from nntk_dist.layers.sketches.sketch import Sketch
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, assert_equal, estimates_of, prepared_features
from tests.oracles import brute_force
from tests.oracles.cases import case


def chosen(model: nn.Module, x: torch.Tensor, contraction: str, draws: int = 8, columns: int = 1024) -> Contraction:
    model = prepare_model(model, dtype=torch.float32, device="cpu")
    space = select_parameters(model)
    plan = plan_sites(model, space, x)
    return choose_contraction(plan, space, contraction, columns, Setting(draws, 8, 10))


def sequence(width: int) -> tuple[nn.Module, torch.Tensor]:
    """A Linear on 2 tokens, LayerNorm, a Linear on their concatenation."""
    model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Flatten(), nn.Linear(2 * width, 10))
    return model, torch.randn(2, 2, width)


def modules(plan: SitePlan | None) -> set[str]:
    return set() if plan is None else {site.module for site in (*plan.outer, *plan.dense)}


def test_contractions_that_are_asked_for():
    model, x = sequence(6)
    layered, means, sketch = (chosen(model, x, name) for name in ("layered", "means", "sketch"))
    assert modules(layered.exact) == {"0", "1", "3"}
    assert [site.module for site in layered.exact.outer] == ["3"]
    assert means.exact.outer == ()
    assert layered.sketched is means.sketched is None
    assert sketch.exact.names() == frozenset()
    assert modules(sketch.sketched) == {"0", "1", "3"}
    assert sketch.sketched.names() == set(select_parameters(model).names)


def test_auto_is_exact_where_that_can_be_afforded():
    model, x = sequence(16)
    model.extend([nn.Tanh(), nn.Linear(10, 10)])
    choice = chosen(model, x, "auto")
    assert (choice.sketched, choice.num_columns) == (None, 0)
    assert choice.text == "contraction: layered: 3; means: 5, 0.weight, 0.bias, 1.weight and 1 more"
    # 4,096 pairs of draws in layers cost more than 24 products of means
    assert chosen(model, x, "auto", draws=64).text.startswith("contraction: means: ")


def test_a_readout_needs_its_inputs_alone():
    """They replace pairs of draws, for any contraction of the other layers, also if outputs are kept apart."""
    network, x = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)),
        torch.randn(2, 4),
    )
    model = prepare_model(network, dtype=torch.float32, device="cpu")
    space = select_parameters(model)
    plan = plan_sites(model, space, x)
    texts = [
        choose_contraction(plan, space, "layered", 0, Setting(8, 4, 3, pair_blocks=pair, full=full)).text
        for pair, full in ((True, False), (True, True), (False, False))
    ]
    assert texts == ["contraction: layered: 0, 2; means: 4"] * 3


@pytest.mark.parametrize(("num_outputs", "repeated"), [(3, {"0"}), (100, set())])
def test_a_layer_between_input_and_readout_takes_the_cheaper_of_two_ways(num_outputs, repeated):
    """Mean δ of all outputs, since no draw changes its inputs; or φ'(a) of each draw, which all outputs share."""
    layers = [nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, num_outputs)]
    model = prepare_model(nn.Sequential(*layers), dtype=torch.float64, device="cpu")
    x = torch.randn(4, 30, dtype=torch.float64)
    spec = KernelSpec(gamma=0.1, draws=8)
    features, _ = prepared_features(model, x, spec)
    assert features.plan.input_layers == repeated
    assert (features.penultimate, features.readout) == (None if repeated else 0, 1)
    other = {"0"} - repeated
    plan = replace(features.plan, input_layers=frozenset(other))
    theirs = replace(features, plan=plan, shared=frozenset(map(int, other)), penultimate=0 if repeated else None)
    ours, expected = (estimates_of(each, all_rows(each, x), all_rows(each, x), spec) for each in (features, theirs))
    for name, values in expected.items():
        assert_equal(ours[name], values, 1e-9)


def test_a_layer_that_sees_the_same_under_every_draw_stays_in_layers_however_many_draws():
    """⟨h̃, h̃'⟩ once and R + 1 products of mean δ; an equally wide layer takes means if draws are many."""
    layers = [nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 10)]
    model, x = nn.Sequential(*layers), torch.randn(2, 30)
    assert chosen(model, x, "auto", draws=8).text == "contraction: layered: 0, 2; means: 4"
    assert chosen(model, x, "auto", draws=512).text == "contraction: layered: 0; means: 4, 2.weight, 2.bias"
    space = select_parameters(model)
    plan = plan_sites(model, space, x)
    alone = choose_contraction(plan, space, "auto", 0, Setting(512, 8, 10, pair_blocks=False))
    assert alone.text == "contraction: layered: 0, 2; means: 4"  # each draw with itself: mean δ does not suffice


def test_auto_sketches_what_neither_means_nor_layers_can_afford_and_says_so():
    """A Linear of 640,800 parameters on tokens: its means take 20 MB per row and output. Its bias stays exact."""
    model, x = nn.Sequential(nn.Linear(800, 801), nn.Tanh(), nn.Flatten(), nn.Linear(1602, 10)), torch.randn(2, 2, 800)
    choice = chosen(model, x, "auto")
    assert choice.text == "contraction: means: 3, 0.bias; sketch (k = 1024): 0.weight"
    assert choice.sketched.names() == {"0.weight"}
    assert chosen(model, x, "auto", columns=0).sketched is None
    # with 100 times the columns, exact products are no longer 32 times as costly
    assert chosen(model, x, "auto", columns=102_400).sketched is None


def test_exact_layers_stand_beside_sketched_ones():
    """Each group of columns, with the exact part added, estimates the whole; their scatter is the sketch's error."""
    spec = KernelSpec(estimator="autodiff", gamma=0.3, draws=8, blocks=4, contraction="means")
    model, x = case("attention").build(), case("attention").inputs(4)
    exact, _ = prepared_features(model, x, spec)
    assert isinstance(exact, GradientFeatures)
    plan, names = exact.plan, frozenset({"qkv.weight", "class_token"})
    sketch = Sketch(0, 64, 8, exact.evaluator.space.names)
    mixed = replace(exact, plan=plan.only(plan.names() - names), sketched=plan.only(names), sketch=sketch)
    rows = all_rows(mixed, x)
    assert set(rows) == {"dense", "sketch"}
    dense, columns = (rows[name].numpy().transpose(1, 0, 2, 3) for name in ("dense", "sketch"))
    products = brute_force.block_products(dense, dense) + brute_force.block_products(columns, columns)
    alone = brute_force.unbiased(brute_force.block_products(dense, dense))
    parts = np.split(columns, 8, axis=3)
    each = [alone + 8 * brute_force.unbiased(brute_force.block_products(part, part)) for part in parts]
    result = estimates_of(mixed, rows, rows, spec)
    assert_equal(result["unbiased"], np.mean(each, axis=0))
    scatter = np.var(each, axis=0, ddof=1) / 8
    assert_equal(result["stderr"], np.sqrt(brute_force.calibrated_stderr(products) ** 2 + scatter))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contraction": "layers"}, r"contraction is 'layers'; allowed: auto, layered, means, sketch; did you mean"),
        ({"contraction": "means", "estimator": "weight"}, r"is 'means'; allowed for estimator weight, .*: auto"),
        ({"contraction": "sketch", "kind": "covariance"}, r"is 'sketch'; allowed for kind covariance, .*: auto"),
        ({"contraction": "sketch", "kind": "averaged"}, r"allowed for kind averaged: auto, layered, means \(only the"),
        ({"contraction": "layered", "sketch": 64}, r"sketch is 64; allowed for contraction layered, .*: auto"),
        ({"kind": "averaged", "sketch": 64}, r"sketch is 64; allowed for kind averaged, .*: auto"),
        ({"kind": "local", "sketch": 72}, r"sketch is 72; allowed: auto, or a multiple of 16 .* the nearest is 64"),
        ({"kind": "local", "contraction": "means", "sketch": 64}, r"sketch is 64; allowed for contraction means"),
        ({"sketch": "automatic"}, r"sketch is 'automatic'; allowed: auto"),
        ({"sketch": 6.5}, r"sketch is 6\.5; allowed: auto, or a whole number"),
        ({"sketch": 72}, r"sketch is 72; allowed: auto, or a multiple of 16 .* the nearest is 64"),
    ],
)
def test_contractions_that_do_not_exist_or_do_not_go_together(arguments, message):
    with pytest.raises(NNTKError, match=message):
        KernelSpec(**arguments)


def test_a_contraction_of_gradients_that_auto_does_not_take():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Hardtanh(), nn.Flatten(), nn.Linear(9, 1)).double()
    signs = nn.Sequential(model, case("sign_mlp").build()[1])
    with pytest.raises(
        NNTKError, match=r"contraction is 'sketch', but the estimator is weight .*; use contraction: auto"
    ):
        nonlocal_kernel(signs, torch.randn(3, 2, 4, dtype=torch.float64), gamma=0.5, contraction="sketch")
