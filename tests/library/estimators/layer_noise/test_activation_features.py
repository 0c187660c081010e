"""The estimator `activation`, given its draws: features and kernels against models with replaced weights, example by
example, and what it refuses.

Noise in pre-activations acts as a random weight matrix for each example; the oracle puts that matrix into the model.

Axes: S draws, R blocks, n examples, C outputs, P parameters, k basis vectors, i inputs and u units of a layer.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist.estimators.layer_noise.activation_features import ActivationFeatures
from nntk_dist.estimators.layer_noise.noisy_passes import NoisyPass
from nntk_dist.layers.noise import span_basis
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.products.block_sums import Meeting
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.standard_errors import Calibration
from nntk_dist.statistics.tile_estimates import tile_estimates
from tests.harness.grids import pairwise
from tests.harness.tools import all_rows, assert_equal, estimates_of, prepared_features
from tests.oracles import brute_force
from tests.oracles.cases import CASES, case

Array = np.ndarray
# Units have raw parameters; the tied network uses a weight outside its layer.
ACCEPTED = [entry.name for entry in CASES if not entry.name.endswith("_unit") and entry.name != "tied_weights"]


def features_of(name: str, spec: KernelSpec, **changes) -> ActivationFeatures:
    features, decision = prepared_features(case(name).build(), case(name).inputs(3), spec)
    assert decision.estimator == "activation"
    assert isinstance(features, ActivationFeatures)
    return replace(features, **changes)


def contracted(name: str, *, formed: bool, **options) -> tuple[ActivationFeatures, KernelSpec]:
    """Features with all layers as factors, or all as explicit means."""
    contraction = "means" if formed else "layered"
    spec = KernelSpec(
        gamma=0.9,
        estimator="activation",
        variance_reduction="none",
        draws=8,
        blocks=4,
        contraction=contraction,
        **options,
    )
    features = features_of(name, spec)
    assert features.contraction.formed == {each.module for each in features.plan.noisy if formed}
    assert features.contraction.forms_weight_space == (formed and bool(features.plan.weight_space))
    return features, spec


# Definitions ----------------------------------------------------------------------------------------------------------


def direction(features: ActivationFeatures, passed: NoisyPass, example: int) -> dict[str, Tensor]:
    """The factor of one draw's Δ for one example, times σ: Σ_k η_k ⊗ q_k in a layer, n in weight space."""
    space = features.evaluator.space
    shapes = dict(zip(space.names, space.shapes, strict=True))
    parts = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for each in features.plan.noisy:
        noise, basis = passed.noise[each.module][example, 0], passed.directions[each.module][example, 0]
        matrix = noise.T @ basis
        offset = 0
        for _, name in each.site.parameters:
            width = parts[name][0].numel()
            parts[name] = matrix[:, offset : offset + width].reshape(shapes[name])
            offset += width
        assert offset == matrix.shape[1]
    offset = 0
    for name in features.plan.weight_space:
        size = parts[name].numel()
        assert passed.weights is not None
        parts[name] = passed.weights[0, offset : offset + size].reshape(shapes[name])
        offset += size
    return parts


def gradients_by_definition(features: ActivationFeatures, model: nn.Module, x: Tensor, ids: Tensor) -> Array:
    """Compute D z or h̃, (S, n, C, P), from one model with replaced weights for each draw and example."""
    names, readout = features.evaluator.space.names, features.plan.readout
    scales = features.drawing.scales or (1.0,) * len(names)
    scale = np.repeat(scales, features.evaluator.space.sizes)
    draws = []
    for draw in range(features.num_draws):
        passed = features.draws.evaluate(x, ids, range(draw, draw + 1))
        rows = []
        for i in range(len(x)):
            function, theta = brute_force.function_of_parameters(model, x[i : i + 1], names)
            v = direction(features, passed, i)
            flat = np.concatenate([v[name].numpy().ravel() for name in names])
            sigma = float(passed.sigma[0])
            moved = theta + sigma * scale**2 * flat
            change = (function(moved) - function(theta))[0] / sigma
            row = change[:, None] * flat
            if readout is not None:
                row += readout_gradient(features, model, x[i : i + 1], moved)
            rows.append(row)
        draws.append(np.stack(rows))
    return np.stack(draws)


def readout_gradient(features: ActivationFeatures, model: nn.Module, x: Tensor, theta: Array) -> Array:
    """(C, P): h̃ of the readout of the model with these parameters, in the rows of its weight and bias."""
    space, site = features.evaluator.space, features.plan.readout.site
    seen = []
    moved = prepare_model(model, dtype=torch.float64, device="cpu")
    parameters, offset = dict(moved.named_parameters()), 0
    for name, size in zip(space.names, space.sizes, strict=True):
        parameters[name].copy_(torch.from_numpy(theta[offset : offset + size]).reshape(parameters[name].shape))
        offset += size
    moved.get_submodule(site.module).register_forward_hook(lambda module, args, out: seen.append(args[0].clone()))
    with torch.no_grad():
        moved(x.double() if x.is_floating_point() else x)
    blocks = []
    for name, shape in zip(space.names, space.shapes, strict=True):
        block = torch.zeros(features.plan.readout.units, *shape, dtype=torch.float64)
        for c in range(len(block)):
            if name in [selected for _, selected in site.parameters]:
                block[c, c] = seen[0].ravel() if len(shape) == 2 else 1.0
        blocks.append(block.flatten(1))
    return torch.cat(blocks, dim=1).numpy()


def assert_is_definition(features: ActivationFeatures, model: nn.Module, x: Tensor, spec: KernelSpec) -> None:
    """Compare plugin, unbiased and standard errors with explicit loops over the draws."""
    draws = gradients_by_definition(features, model, x, torch.arange(len(x)))
    block = np.arange(len(draws)) * spec.blocks // len(draws)
    means = brute_force.block_means(draws, block)
    products = brute_force.block_products(means, means, spec.outputs)
    rows = all_rows(features, x)
    ours = estimates_of(features, rows, rows, spec)
    plugin = brute_force.plugin(means, means, spec.outputs)
    assert_equal(ours["plugin"], plugin)
    assert_equal(ours["unbiased"], brute_force.unbiased(products), scale=np.abs(plugin).max())
    assert_equal(features.block_products(rows, rows, spec.meeting).mean((0, 1)), plugin)
    known = ~torch.isnan(ours["stderr"]).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        stderr = np.nan_to_num(brute_force.calibrated_stderr(products))
    assert_equal(ours["stderr"][known], stderr[known], scale=np.abs(plugin).max())


@pytest.mark.parametrize(
    ("way", "outputs", "name"),
    pairwise(
        itertools.product([True, False], ["iid", "antithetic"]), ["trace", "full", 1], ["deep_sign_mlp", "attention"]
    ),
)
def test_kernels_are_their_definition(way: tuple[bool, str], outputs: str | int, name: str):
    formed, design = way
    features, spec = contracted(name, formed=formed, design=design, outputs=outputs, seed=3)
    assert_is_definition(features, case(name).build(), case(name).inputs(3), spec)


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_case_is_its_definition(name: str):
    outputs = "trace" if case(name).num_outputs == 1 else "full"
    spec = KernelSpec(
        gamma=1.2, estimator="activation", variance_reduction="none", draws=8, blocks=4, outputs=outputs, seed=1
    )
    assert_is_definition(features_of(name, spec), case(name).build(), case(name).inputs(2), spec)


@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("name", ["deep_sign_mlp", "attention", "convnet"])
def test_ranges_relative_to_every_tensor(name: str, formed: bool):
    features, spec = contracted(name, formed=formed, gamma_scale="relative", outputs="full")
    assert len(set(features.drawing.scales)) > 2
    assert_is_definition(features, case(name).build(), case(name).inputs(3), spec)


@pytest.mark.parametrize("patterns", [("*weight",), ("*bias",), ("0.*",), ("2.weight", "0.bias")])
def test_some_of_the_parameters(patterns: tuple[str, ...]):
    spec = KernelSpec(
        gamma=0.9, estimator="activation", variance_reduction="none", draws=8, blocks=4, parameters=patterns
    )
    assert_is_definition(features_of("sign_mlp", spec), case("sign_mlp").build(), case("sign_mlp").inputs(3), spec)


@pytest.mark.parametrize(("positions", "width"), [(1, 5), (3, 5), (5, 3)])
def test_the_basis_spans_what_a_layer_sees(positions: int, width: int):
    """Basis vectors are orthonormal or zero, also for repeated, zero and dependent inputs."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, positions, width, generator=generator, dtype=torch.float64)
    vectors[1] = 0.0
    vectors[2] = vectors[2, :1]
    vectors[3, -1] = 0.0
    basis, coordinates = span_basis(vectors)
    torch.testing.assert_close(coordinates @ basis, vectors)
    gram = basis @ basis.mT
    seen = gram.diagonal(dim1=1, dim2=2).round()
    torch.testing.assert_close(gram, torch.diag_embed(seen))
    assert seen.sum(1).tolist() == [min(positions, width), 0, 1, min(positions - 1, width) if positions > 1 else 0]


def test_noise_is_a_function_of_seed_draw_example_layer_and_unit():
    spec = KernelSpec(gamma=0.9, estimator="activation", variance_reduction="none", draws=8, blocks=4, seed=11)
    features, x = features_of("deep_relu_mlp", spec), case("deep_relu_mlp").inputs(3)
    ids = torch.tensor([5, 2**32 - 1, 7])
    passed = features.draws.evaluate(x, ids, range(4, 6))
    for position, draw in enumerate((4, 5)):
        expected = normal(11, Stream.EXAMPLE, ids, 0, 12, draw=draw)
        for each, part in zip(features.plan.noisy, expected.split([6, 6], dim=1), strict=True):
            assert torch.equal(passed.noise[each.module][:, position, 0], part)


def test_antithetic_draws_change_the_sign_of_all_noise_under_one_range():
    spec = KernelSpec(
        gamma=0.9, estimator="activation", variance_reduction="none", design="antithetic", draws=16, blocks=4
    )
    features, x = features_of("attention", spec), case("attention").inputs(3)
    first, second = (features.draws.evaluate(x, torch.arange(3), range(s, s + 1)) for s in (6, 7))
    assert torch.equal(first.sigma, second.sigma)
    assert torch.equal(first.weights, -second.weights)
    assert all(torch.equal(part, -second.noise[path]) for path, part in first.noise.items())


# Parts and the whole --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deep_sign_mlp", "attention"])
def test_examples_keep_their_noise_in_any_order_and_chunks_are_parts_of_the_whole(name: str):
    spec = KernelSpec(
        gamma=0.9, estimator="activation", variance_reduction="none", draws=16, blocks=4, contraction="layered"
    )
    features, x = features_of(name, spec), case(name).inputs(5)
    ids, order = torch.arange(5) + 20, torch.tensor([3, 0, 4, 1, 2])
    whole = features.compute(x, ids, range(16), features.columns)
    turned = features.compute(x[order], ids[order], range(16), features.columns)
    for spec_ in features.arrays:
        assert whole[spec_.name].shape[1:] == spec_.shape
        torch.testing.assert_close(turned[spec_.name], whole[spec_.name][order], rtol=1e-13, atol=1e-13)
        if spec_.name.startswith("noise"):
            assert torch.equal(turned[spec_.name], whole[spec_.name][order])
    chunks = [features.compute(x, ids, draws, features.columns) for draws in (range(4), range(4, 12), range(12, 16))]
    for array in whole:
        assert torch.equal(torch.cat([chunk[array] for chunk in chunks], dim=1), whole[array])
    some = features.compute(x, ids, range(16), (1,))
    torch.testing.assert_close(some["differences"][:, :, 0], whole["differences"][:, :, 1])


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_tiles_diagonals_and_parts_of_the_outputs_are_parts_of_the_whole(outputs: str, monkeypatch):
    """With chunks of pairs of draws of every size."""
    spec = KernelSpec(
        gamma=0.9,
        estimator="activation",
        variance_reduction="none",
        draws=16,
        blocks=4,
        outputs=outputs,
        contraction="layered",
    )
    features, x = features_of("attention", spec), case("attention").inputs(5)
    rows, others = all_rows(features, x), all_rows(features, case("attention").inputs(5, seed=4))
    calibration = Calibration(level=0.8, relative_error=0.1, num_entries=1)

    def tile(left, right, **options) -> dict[str, Tensor]:
        return tile_estimates(features, [(left, right)], Meeting(spec.meeting.full, **options), calibration, spec.scale)

    whole = tile(rows, others)
    products = features.block_products(rows, others, spec.meeting)
    for elements in (1, 5 * 5 * 16 * 4, 5 * 5 * 16 * 70, 5 * 5 * 16 * 150):
        monkeypatch.setattr("nntk_dist.products.noise_pairs.CHUNK_NUMBERS", elements)
        for name, values in tile(rows, others).items():
            assert_equal(values, whole[name], 1e-12)
        assert_equal(features.block_products(rows, others, spec.meeting), products, 1e-12)
        paired = tile(rows, others, paired=True)
        for name, values in paired.items():
            width = 2 if outputs == "full" else 1
            diagonal = torch.stack(
                [whole[name][i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(5)]
            )
            assert_equal(values, diagonal.reshape(values.shape), 1e-12)
    if outputs == "trace":
        halves = [features.compute(x, torch.arange(5), range(16), (c,)) for c in (0, 1)]
        parts = [(half, features.compute(x, torch.arange(5), range(16), (c,))) for c, half in enumerate(halves)]
        together = tile_estimates(features, parts, spec.meeting, calibration, spec.scale)
        for name, values in tile(rows, rows).items():
            assert_equal(together[name], values, 1e-12)
