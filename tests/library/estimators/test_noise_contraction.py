"""How products of `activation` are contracted: the choice by cost, and sketches against explicit gradients.

Axes: R blocks, n examples, C outputs, k columns of a sketch.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import local_kernel
from nntk_dist.estimators.contraction import noise_contraction
from nntk_dist.layers.noise import NoiseSite
from nntk_dist.layers.noise_plan import NoisePlan, plan_noise
from nntk_dist.layers.sites import Site
from nntk_dist.models.parameters import ParameterSpace, select_parameters
from nntk_dist.products.wanted import Wanted
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.standard_errors import sketch_variance
from tests.harness.many_seeds import check
from tests.harness.projecting import sketch_of_formed
from tests.harness.tools import all_rows, assert_equal, estimates_of
from tests.library.estimators.layer_noise.test_activation_features import contracted, features_of
from tests.library.estimators.layer_noise.test_activation_features_unbiased import two_layer_kernel
from tests.oracles.cases import Activate, case
from tests.oracles.statistics import assert_coverage, assert_mean_agrees, assert_power, covered


def test_gradients_are_formed_where_that_is_cheaper_and_fits():
    layers = [nn.Linear(4, 6), Activate(torch.sign), nn.Linear(6, 900), Activate(torch.sign), nn.Linear(900, 3)]
    model = nn.Sequential(*layers)
    space = select_parameters(model)
    plan = plan_noise(model, space, torch.randn(3, 4))

    def chosen(draws: int):
        return noise_contraction(plan, space, KernelSpec(draws=draws), num_draws=draws, num_outputs=3)

    assert chosen(8).formed == frozenset()
    assert chosen(256).formed == {"0", "2"}
    assert chosen(32).formed == {"0"}
    assert chosen(32).text(plan) == "contraction: layered: 2; means: 0"


def test_sketches_are_taken_unasked_only_where_exactness_cannot_be_afforded():
    def layer(path: str, width: int, units: int) -> NoiseSite:
        return NoiseSite(Site(path, (("weight", f"{path}.weight"),)), 1, width, units)

    def chosen(*layers: NoiseSite, **options):
        sizes = tuple((each.num_parameters,) for each in layers)
        space = ParameterSpace(tuple(f"{each.module}.weight" for each in layers), sizes)
        plan = NoisePlan(tuple(layers), None, ())
        chosen = noise_contraction(plan, space, KernelSpec(draws=256, **options), num_draws=256, num_outputs=2)
        return chosen.sketched, chosen.text(plan)

    narrow, first, second = layer("0", 785, 128), layer("0", 65, 8192), layer("2", 8193, 4096)
    assert chosen(narrow)[0] == frozenset()
    assert chosen(first, second) == ({"0", "2"}, "contraction: sketch (k = 1024): 0, 2")
    assert chosen(layer("0", 5, 8), second) == ({"2"}, "contraction: means: 0; sketch (k = 1024): 2")
    for contraction in ("layered", "means"):
        assert chosen(first, second, contraction=contraction) == (frozenset(), f"contraction: {contraction}: 0, 2")


def sketched(name: str, sketch: int = 64, **options) -> tuple[Any, KernelSpec]:
    spec = KernelSpec(
        gamma=0.9,
        estimator="activation",
        variance_reduction="none",
        draws=8,
        blocks=4,
        contraction="sketch",
        sketch=sketch,
        **options,
    )
    return features_of(name, spec), spec


@pytest.mark.parametrize("name", ["deep_sign_mlp", "sign_mlp_no_bias", "attention", "convnet"])
def test_the_sketch_is_the_projection_of_the_layers_gradients(name: str):
    (features, _), (exact, _), x = sketched(name), contracted(name, formed=True), case(name).inputs(3)
    assert features.sketch is not None
    expected = sketch_of_formed(exact, all_rows(exact, x), features.sketch)
    for array, values in all_rows(features, x).items():
        assert_equal(values, expected[array])


@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("name", ["deep_sign_mlp", "attention"])
def test_calibration_sees_the_products_that_a_tile_is_made_of(name: str, outputs: str):
    """With fewer blocks than the sketch has groups, and with a readout and a layer of weights beside the sketch."""
    features, spec = sketched(name, outputs=outputs)
    assert features.num_sketch_groups != features.num_blocks
    rows = all_rows(features, case(name).inputs(3))
    products = features.block_products(rows, rows, spec.meeting)
    sums = features.block_sums(rows, rows, spec.meeting, Wanted(stderr=True))
    same = torch.einsum("rr...->...", products)
    torch.testing.assert_close(same, sums.within, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(products.sum((0, 1)) - same, sums.between, rtol=1e-10, atol=1e-10)


@pytest.mark.statistical
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_sketches_are_right_on_average_and_tell_their_own_error(outputs: str):
    """Over 400 sketches of the same draws: the variance between groups equals the variance over sketches."""
    features, spec = sketched("deep_sign_mlp", outputs=outputs)
    exact, exact_spec = contracted("deep_sign_mlp", formed=True, outputs=outputs)
    formed = all_rows(exact, case("deep_sign_mlp").inputs(3))
    target = estimates_of(exact, formed, formed, exact_spec)["unbiased"].numpy()
    values, variances = [], []
    for seed in range(400):
        rows = sketch_of_formed(exact, formed, replace(features.sketch, seed=seed))
        sums = features.block_sums(rows, rows, spec.meeting, Wanted(stderr=True))
        values.append((sums.between / 12).numpy())
        variances.append(sketch_variance(sums.by_group, 4).numpy())
    assert_mean_agrees(np.stack(values), target)
    ratio = np.mean(variances, axis=0).sum() / np.var(values, axis=0, ddof=1).sum()
    assert 0.8 < ratio < 1.25


@pytest.mark.statistical
def test_intervals_of_a_sign_network_cover_the_quadrature_exact_and_sketched():
    """Over 1,000 seeds of draws and sketch; the sketch is so short that it causes most of the variance."""
    name, x = "sign_mlp", case("sign_mlp").inputs(3)
    options = {
        "gamma": 1.0,
        "estimator": "activation",
        "variance_reduction": "none",
        "draws": 256,
        "design": "antithetic",
    }
    specs = [KernelSpec(contraction="means", **options), KernelSpec(contraction="sketch", sketch=64, **options)]
    formed: Any
    sketching: Any
    formed, sketching = (features_of(name, spec) for spec in specs)
    results: dict[str, list[Tensor]] = {"exact": [], "exact_stderr": [], "sketched": [], "sketched_stderr": []}
    for seed in range(1000):
        drawn = replace(formed, drawing=replace(formed.drawing, seed=seed))
        exact = all_rows(drawn, x)
        rows = {"exact": (drawn, exact), "sketched": (sketching, sketch_of_formed(
            drawn, exact, replace(sketching.sketch, seed=seed)))}  # fmt: skip
        for (kind, (features, own)), spec in zip(rows.items(), specs, strict=True):
            estimate = estimates_of(features, own, own, replace(spec, seed=seed))
            results[kind].append(estimate["unbiased"])
            results[f"{kind}_stderr"].append(estimate["stderr"])
    values = {key: torch.stack(parts).numpy() for key, parts in results.items()}
    expected = two_layer_kernel(name, x, 1.0, "trace")
    for kind in ("exact", "sketched"):
        assert_coverage(covered(values[kind], expected, values[f"{kind}_stderr"], 8), (0.92, 0.98))
        check(values[kind], expected)
    assert_power(values["exact"].std(0) / np.sqrt(1000), expected, local_kernel(case(name).build(), x).numpy())
    assert values["sketched"].var(0).sum() > 2 * values["exact"].var(0).sum()
