"""The estimator `activation`, given its draws: features and kernels against models with replaced weights, example by
example, and what it refuses.

Noise in pre-activations is a random weight matrix of each example's own: the oracle puts that matrix into the model.

Axes: S draws, R blocks, n examples, C outputs, P parameters, k basis vectors, i inputs and u units of a layer.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nntk_dist import NNTKError, nonlocal_kernel
from nntk_dist.activation import ActivationFeatures, cheapest_forms
from nntk_dist.block_sums import Meeting
from nntk_dist.evaluation import prepare_model
from nntk_dist.feature_maps import make_feature_map
from nntk_dist.layer_noise import span_basis
from nntk_dist.noise_plan import NoisePlan, plan_noise
from nntk_dist.noisy_draws import NoisyPass
from nntk_dist.parameters import select_parameters
from nntk_dist.philox import Stream, normal
from nntk_dist.resolution import Resolution, resolve
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics import Calibration
from nntk_dist.tiles import tile_estimates
from tests.library.tools import all_rows, assert_equal, estimates_of, prepared_features
from tests.oracles import brute_force
from tests.oracles.cases import CASES, Activate, case, mlp

Array = np.ndarray
# Units hold raw parameters; the tied network uses a weight outside its layer.
ACCEPTED = [entry.name for entry in CASES if not entry.name.endswith("_unit") and entry.name != "tied_weights"]


def features_of(name: str, spec: KernelSpec, **changes) -> ActivationFeatures:
    features, resolution = prepared_features(case(name).build(), case(name).inputs(3), spec)
    assert resolution.estimator == "activation"
    assert isinstance(features, ActivationFeatures)
    return replace(features, **changes)


# Definitions ----------------------------------------------------------------------------------------------------------


def direction(features: ActivationFeatures, passed: NoisyPass, example: int) -> dict[str, Tensor]:
    """What one draw's Δ is multiplied by for one example, times σ: Σ_k η_k ⊗ q_k in a layer, n in weight space."""
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
    """D z or h̃, (S, n, C, P), from one model with replaced weights for each draw and example."""
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
    """Plugin, unbiased and standard errors of the draws by explicit loops."""
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


@pytest.mark.parametrize("outputs", ["trace", "full", 1])
@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("name", ["deep_sign_mlp", "attention"])
def test_kernels_are_their_definition(name: str, formed: bool, design: str, outputs: str | int):
    spec = KernelSpec(gamma=0.9, estimator="activation", draws=8, blocks=4, design=design, outputs=outputs, seed=3)
    features = features_of(name, spec)
    layers = frozenset(each.module for each in features.plan.noisy) if formed else frozenset()
    features = replace(features, formed=layers, forms_weight_space=formed and bool(features.plan.weight_space))
    assert_is_definition(features, case(name).build(), case(name).inputs(3), spec)


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_case_is_its_definition(name: str):
    outputs = "trace" if case(name).num_outputs == 1 else "full"
    spec = KernelSpec(gamma=1.2, estimator="activation", draws=8, blocks=4, outputs=outputs, seed=1)
    assert_is_definition(features_of(name, spec), case(name).build(), case(name).inputs(2), spec)


@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("name", ["deep_sign_mlp", "attention", "convnet"])
def test_ranges_relative_to_every_tensor(name: str, formed: bool):
    spec = KernelSpec(gamma=0.9, estimator="activation", draws=8, blocks=4, gamma_scale="relative", outputs="full")
    features = features_of(name, spec)
    layers = frozenset(each.module for each in features.plan.noisy) if formed else frozenset()
    features = replace(features, formed=layers, forms_weight_space=formed and bool(features.plan.weight_space))
    assert len(set(features.drawing.scales)) > 2
    assert_is_definition(features, case(name).build(), case(name).inputs(3), spec)


@pytest.mark.parametrize("patterns", [("*weight",), ("*bias",), ("0.*",), ("2.weight", "0.bias")])
def test_some_of_the_parameters(patterns: tuple[str, ...]):
    spec = KernelSpec(gamma=0.9, estimator="activation", draws=8, blocks=4, parameters=patterns)
    assert_is_definition(features_of("sign_mlp", spec), case("sign_mlp").build(), case("sign_mlp").inputs(3), spec)


@pytest.mark.parametrize(("positions", "width"), [(1, 5), (3, 5), (5, 3)])
def test_the_basis_spans_what_a_layer_sees(positions: int, width: int):
    """Orthonormal where something is seen along it; repeated, zero and dependent vectors are no trouble."""
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
    spec = KernelSpec(gamma=0.9, estimator="activation", draws=8, blocks=4, seed=11)
    features, x = features_of("deep_relu_mlp", spec), case("deep_relu_mlp").inputs(3)
    ids = torch.tensor([5, 2**32 - 1, 7])
    passed = features.draws.evaluate(x, ids, range(4, 6))
    for position, draw in enumerate((4, 5)):
        expected = normal(11, Stream.EXAMPLE, ids, 0, 12, draw=draw)
        for each, part in zip(features.plan.noisy, expected.split([6, 6], dim=1), strict=True):
            assert torch.equal(passed.noise[each.module][:, position, 0], part)


def test_antithetic_draws_change_the_sign_of_all_noise_under_one_range():
    spec = KernelSpec(gamma=0.9, estimator="activation", design="antithetic", draws=16, blocks=4)
    features, x = features_of("attention", spec), case("attention").inputs(3)
    first, second = (features.draws.evaluate(x, torch.arange(3), range(s, s + 1)) for s in (6, 7))
    assert torch.equal(first.sigma, second.sigma)
    assert torch.equal(first.weights, -second.weights)
    assert all(torch.equal(part, -second.noise[path]) for path, part in first.noise.items())


# Parts and the whole --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deep_sign_mlp", "attention"])
def test_examples_keep_their_noise_in_any_order_and_chunks_are_parts_of_the_whole(name: str):
    spec = KernelSpec(gamma=0.9, estimator="activation", draws=16, blocks=4)
    features, x = features_of(name, spec, formed=frozenset()), case(name).inputs(5)
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
    spec = KernelSpec(gamma=0.9, estimator="activation", draws=16, blocks=4, outputs=outputs)
    features, x = features_of("attention", spec, formed=frozenset()), case("attention").inputs(5)
    rows, others = all_rows(features, x), all_rows(features, case("attention").inputs(5, seed=4))
    calibration = Calibration(level=0.8, relative_error=0.1, num_entries=1)

    def tile(left, right, **options) -> dict[str, Tensor]:
        return tile_estimates(features, [(left, right)], Meeting(spec.meeting.full, **options), calibration, spec.scale)

    whole = tile(rows, others)
    products = features.block_products(rows, others, spec.meeting)
    for elements in (1, 5 * 5 * 16 * 4, 5 * 5 * 16 * 70, 5 * 5 * 16 * 150):
        monkeypatch.setattr("nntk_dist.pair_products.CHUNK_ELEMENTS", elements)
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


def test_gradients_are_formed_where_that_is_cheaper_and_fits():
    model = nn.Sequential(
        nn.Linear(4, 6), Activate(torch.sign), nn.Linear(6, 900), Activate(torch.sign), nn.Linear(900, 3)
    )
    plan = plan_noise(model, select_parameters(model), torch.randn(3, 4))
    options = {"num_blocks": 8, "num_outputs": 3, "full": False}
    assert cheapest_forms(plan, num_draws=8, **options) == frozenset()
    assert cheapest_forms(plan, num_draws=256, **options) == {"0", "2"}
    assert cheapest_forms(plan, num_draws=32, **options) == {"0"}


# What it refuses, and what it leaves open -----------------------------------------------------------------------------


class Hidden(nn.Module):
    """Uses the weight of a layer behind the layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sign(functional.linear(torch.sign(self.first(x)), self.first.weight)))


class Turned(nn.Module):
    """Tokens come first, examples second."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sign(self.mix(x.transpose(0, 1))).sum(0))


def kernel(model: nn.Module, x: Tensor, **options):
    return nonlocal_kernel(model, x, **{"gamma": 0.5, "estimator": "activation", "draws": 16, "blocks": 4, **options})


def test_a_weight_used_elsewhere_is_refused():
    with pytest.raises(NNTKError, match=r"does not follow the parameters of module 'first' as noise .*; use estimator"):
        kernel(Hidden(), torch.randn(4, 4))
    with pytest.raises(NNTKError, match=r"does not follow the parameters of module 'encoder'"):
        kernel(case("tied_weights").build(), case("tied_weights").inputs(4))


def test_a_hook_that_changes_an_output_is_refused():
    model = mlp(Activate(torch.sign)).double()
    model[0].register_forward_hook(lambda module, args, out: out.round())
    with pytest.raises(NNTKError, match=r"does not follow the parameters of module '0' as noise"):
        kernel(model, torch.randn(4, 4))


@pytest.mark.parametrize("name", ["sign_unit", "relu_unit"])
def test_models_without_such_a_layer_are_refused(name: str):
    with pytest.raises(
        NNTKError, match=r"none of the selected parameters \('theta' and so on\) lies in a Linear layer"
    ):
        kernel(case(name).build(), case(name).inputs(4))


def test_other_distributions_and_designs_are_refused():
    model, x = case("sign_mlp").build(), case("sign_mlp").inputs(4)
    for name in ("sphere", "lowrank"):
        with pytest.raises(
            NNTKError, match=rf"estimator is 'activation'.*; allowed for distribution {name}: auto, weigh"
        ):
            kernel(model, x, distribution=name)
    with pytest.raises(
        NNTKError, match=r"design is 'orthogonal'; allowed for estimator activation, .*: iid, antithetic"
    ):
        kernel(model, x, design="orthogonal")
    for options in ({"distribution": "ball"}, {"design": "orthogonal"}):
        assert kernel(model, x, estimator="auto", **options).estimator == "weight"


def test_too_many_draws_are_refused():
    with pytest.raises(NNTKError, match=r"draws is 65600; allowed for estimator activation: up to 65536 \(iid\)"):
        kernel(case("sign_mlp").build(), case("sign_mlp").inputs(4), draws=65600)
    resolve(
        case("sign_mlp").build(), case("sign_mlp").inputs(4),
        KernelSpec(estimator="activation", draws=131072, design="antithetic"), batch=4,
    )  # fmt: skip


class Varying(nn.Module):
    """Calls a layer twice for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.first(hidden)) if float(x.abs().max()) > 100 else hidden)


def test_a_layer_that_some_inputs_call_twice_is_refused():
    model = Varying().double()
    spec = KernelSpec(gamma=0.5, estimator="activation", draws=8, blocks=4)
    features, _ = prepared_features(model, torch.randn(4, 4, dtype=torch.float64), spec)
    with pytest.raises(NNTKError, match=r"module 'first' is called 2 times for some inputs and once for others"):
        all_rows(features, torch.full((4, 4), 200.0, dtype=torch.float64))


def plan_of(model: nn.Module, x: Tensor, patterns: tuple[str, ...] = ("*",)) -> NoisePlan:
    prepared = prepare_model(model, dtype=torch.float64, device="cpu")
    return plan_noise(prepared, select_parameters(prepared, patterns), x)


@pytest.mark.parametrize(
    ("name", "noisy", "readout", "weight_space"),
    [
        ("deep_sign_mlp", ["0", "2"], "4", []),
        ("flat_output", ["layers.0"], "layers.2", []),
        ("residual_in_place", ["enter", "inner"], "readout", []),
        ("layer_norm", ["0"], "3", ["1.weight", "1.bias"]),
        ("raw_parameters", ["hidden", "readout"], None, ["scale", "offset"]),
        ("repeated_layer", [], "readout", ["step.weight", "step.bias"]),
        ("attention", ["qkv", "mix"], "readout", ["class_token", "norm.weight", "norm.bias"]),
        ("embedding", [], "readout", ["tokens.weight", "positions.weight", "mix.weight", "mix.bias"]),
        ("convnet", ["0"], "5", ["2.weight"]),
        ("batch_norm", [], "5", ["0.weight", "0.bias", "1.weight", "1.bias"]),
    ],
)
def test_every_parameter_goes_one_way(name, noisy, readout, weight_space):
    plan = plan_of(case(name).build(), case(name).inputs(4))
    assert [each.module for each in plan.noisy] == noisy
    assert (plan.readout and plan.readout.module) == readout
    assert sorted(plan.weight_space) == sorted(weight_space)


def test_layers_whose_first_axis_is_not_the_examples_are_perturbed_in_weight_space():
    for examples in (3, 4):
        plan = plan_of(Turned(), torch.randn(examples, 3, 5))
        assert plan.weight_space == ("mix.weight", "mix.bias")


def test_an_output_layer_behind_a_nonlinearity_is_no_readout():
    plan = plan_of(nn.Sequential(mlp(nn.Tanh()), nn.LogSoftmax(1)), torch.randn(4, 4))
    assert plan.readout is None
    assert [each.module for each in plan.noisy] == ["0.0", "0.2"]


def test_zero_vectors_have_no_gradient():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), Activate(torch.sign), nn.Linear(6, 2)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    x[1] = 0.0
    result = kernel(model, x, parameters=["0.weight"])
    assert not result.plugin[1].any()
    assert torch.isnan(result.stderr[1]).all()
    assert torch.isfinite(result.stderr[0, [0, 2, 3]]).all()


def test_entries_of_examples_that_no_draw_changed_are_unresolved_though_the_readout_is_known():
    """At a tiny range a sign network's hidden units stay as they are; only the last example lies on a threshold."""
    model = mlp(Activate(torch.sign), bias=False).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    weight = model[0].weight.detach()
    x[3] -= weight[0] * (weight[0] @ x[3]) / (weight[0] @ weight[0])
    result = kernel(model, x, gamma=1e-6, draws=64)
    assert torch.isnan(result.stderr[:3]).all()
    assert torch.isnan(result.stderr[:, :3]).all()
    assert float(result.stderr[3, 3]) > 0
    hidden = torch.sign(x[:3] @ weight.T)
    assert_equal(result.kernel[:3, :3], 3 * hidden @ hidden.T, 1e-12)
    full = kernel(model, x, gamma=1e-6, draws=64, outputs="full")
    assert torch.isnan(full.stderr[:9]).all()
    assert not torch.isnan(full.stderr[9:, 9:]).any()


def test_a_kernel_of_the_readout_alone_is_exact():
    entry = case("relu_mlp")
    result = kernel(entry.build(), entry.inputs(4), parameters=["2.*"])
    hidden = torch.relu(entry.build()[0](entry.inputs(4)))
    assert_equal(result.unbiased, 3 * (hidden @ hidden.T + 1).detach(), 1e-12)
    assert float(result.stderr.max()) < 1e-12


# The choice among estimators ------------------------------------------------------------------------------------------


def choice(name: str, **options) -> Resolution:
    return resolve(case(name).build(), case(name).inputs(8), KernelSpec(gamma=0.5, **options), batch=8)


def test_auto_takes_noise_in_pre_activations_where_gradients_miss_jumps():
    chosen = choice("deep_sign_mlp")
    assert (chosen.estimator, chosen.num_draws, chosen.stacked) == ("activation", 256, False)
    assert chosen.reason.startswith("the model jumps in its parameters, where gradients miss the jumps: along random")
    assert chosen.reason.endswith(
        "of 86 parameters 72 are reached by noise in the pre-activations of 2 layers, 14 lie in the readout, whose "
        "gradient is exact, and 0 are perturbed themselves"
    )
    assert choice("relu_mlp").estimator == "autodiff"
    assert choice("sign_unit").estimator == "weight"
    assert choice("relu_mlp", estimator="activation").reason.startswith("asked for: of 51 parameters 30 are reached by")


def test_auto_takes_differences_where_noise_would_reach_few_parameters():
    model = nn.Sequential(nn.Conv2d(1, 8, 2), Activate(torch.sign), nn.Flatten(), nn.Linear(32, 1, bias=False))
    chosen = resolve(model, torch.randn(4, 1, 3, 3), KernelSpec(gamma=0.5), batch=4)
    assert chosen.estimator == "activation"  # four patches of five numbers, and the readout
    model = nn.Sequential(
        nn.Conv2d(1, 16, 2), Activate(torch.sign), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1)
    )
    chosen = resolve(model, torch.randn(4, 1, 5, 5), KernelSpec(gamma=0.5), batch=4)
    assert chosen.estimator == "weight"
    assert chosen.reason.endswith("noise in pre-activations would reach less than half of its parameters")


def test_the_decision_is_all_that_a_feature_map_needs():
    spec = KernelSpec(gamma=0.5, draws=8, blocks=4)
    model, x = case("deep_sign_mlp").build(), case("deep_sign_mlp").inputs(8)
    resolution = resolve(model, x, spec, batch=8)
    again = make_feature_map(prepare_model(model, dtype=torch.float64, device="cpu"), x[:3], spec, resolution)
    first, _ = prepared_features(model, x, spec)
    for name, array in all_rows(first, x).items():
        assert torch.equal(all_rows(again, x)[name], array)
