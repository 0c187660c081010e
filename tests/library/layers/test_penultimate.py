"""The layer before the readout: found if there is one, and the same kernel as without its special treatment.

Axes: n examples, s/t draws, C outputs, o units.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nntk_dist import Dropout, NNTKError, averaged_kernel, local_kernel
from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.layers.penultimate import (
    OutputLayers,
    find_output_layers,
    pair_weights,
)
from nntk_dist.layers.readout import gradients_of_pass
from nntk_dist.layers.recording import Pass, Recording
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.layers.sites import Site
from nntk_dist.models.evaluation import moved_in_place, prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.products.features import slice_rows
from nntk_dist.products.wanted import Wanted
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.standard_errors import Calibration
from nntk_dist.statistics.tile_estimates import tile_estimates
from tests.harness.tools import all_rows, assert_equal, by_definition, estimates_of, prepared_features
from tests.oracles import brute_force
from tests.oracles.cases import case


class Doubled(nn.Module):
    """An activation that reads its input twice."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * x


class Skipping(nn.Module):
    """A network whose output is more than its readout."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.hidden(x))) + x[:, :3]


class Turning(nn.Module):
    """A network that normalises its hidden units only if there are more than three examples."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(x))
        return self.readout(torch.softmax(h, 1) if len(x) > 3 else h)


def network(*between: nn.Module, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, 3, bias=bias))
    return prepare_model(model, dtype=torch.float64, device="cpu")


def found(model: nn.Module) -> OutputLayers | None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    recording = Recording(model, [Site(name, ()) for name in names], torch.randn(6, 4, dtype=torch.float64))
    return find_output_layers(recording.outputs, recording.outs(names))


@pytest.mark.parametrize(
    "between",
    [
        [nn.ReLU()],
        [nn.ReLU(inplace=True)],
        [nn.Tanh(), nn.Softplus()],
        [nn.GELU(), nn.Dropout(0.5)],
        [nn.SiLU(), nn.Identity()],
        [nn.LeakyReLU(0.1)],
        [],
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_functions_of_single_units_are_seen_through(between, bias):
    model = network(*between, bias=bias)
    assert found(model) == OutputLayers("0", str(len(between) + 1))
    deeper = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), model).double().requires_grad_(False)
    assert found(deeper) == OutputLayers("2.0", f"2.{len(between) + 1}")


@pytest.mark.parametrize(
    "between", [[nn.Softmax(1)], [nn.LayerNorm(5)], [nn.BatchNorm1d(5)], [Doubled()], [nn.Flatten(), nn.Hardshrink()]]
)
def test_what_mixes_units_or_is_not_known_counts_for_nothing(between):
    assert found(network(*between)) is None


def test_a_readout_is_all_of_the_output():
    assert found(Skipping().double().requires_grad_(False)) is None
    assert found(nn.Sequential(network(nn.ReLU()), nn.Tanh())) is None


@pytest.mark.parametrize("shares_derivatives", [True, False])
@pytest.mark.parametrize("between", [[nn.Tanh()], [nn.Tanh(), nn.LayerNorm(5)]])
def test_gradients_behind_the_readout_are_those_of_the_outputs(between, shares_derivatives):
    """From the readout's input on, along its weights; also for units that only one output uses, or none."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 5), *between, nn.Linear(5, 3)]
    model, x = prepare_model(nn.Sequential(*layers), dtype=torch.float64, device="cpu"), torch.randn(6, 4).double()
    weight = model[-1].weight
    weight[:, 0], weight[1:, 1] = 0.0, 0.0
    space = select_parameters(model, ("0.*", "2.*", f"{len(layers) - 1}.*"))
    plan = plan_sites(model, space, x)
    assert (plan.output_layers is None) == (len(between) > 1)
    assert plan.readout is not None
    for columns in ((0, 1, 2), (2, 0), (1,)):
        recording = Recording(model, plan.outer, x)
        passed = gradients_of_pass(
            Pass(x, recording, {}, space.values(model), columns),
            model,
            readout=plan.readout,
            pair=plan.output_layers,
            shares_derivatives=shares_derivatives,
        )
        for module, (expected,) in recording.gradients(columns).items():
            (delta,) = passed.deltas_of(module)
            assert_equal(delta, expected, 1e-14)


@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp", "deep_relu_mlp"])
def test_kernels_that_share_slopes_are_those_that_do_not(name):
    """Against brute force; the layer's gradients take the memory of one output."""
    model, x = case(name).build(), case(name).inputs(4)
    assert_equal(local_kernel(model, x), brute_force.local_kernel(model, x, x))
    spec = KernelSpec(kind="averaged", statistic="plugin", gamma=0.6, draws=8, blocks=4, contraction="layered")
    features, _ = prepared_features(model, x, spec)
    assert isinstance(features, GradientFeatures)
    assert features.plan.output_layers is not None
    index = [site.module for site in features.plan.outer].index(features.plan.output_layers.module)
    rows = all_rows(features, x)
    assert rows[f"gradient_{index}"].shape[2] == 1
    assert_equal(averaged_kernel(model, x, gamma=0.6, draws=8, blocks=4).kernel,
                 by_definition(model, x, x, spec, "autodiff").plugin)  # fmt: skip
    plain = replace(features, sums_outputs=False, readout=None)
    kept = all_rows(plain, x)
    assert kept[f"gradient_{index}"].shape[2] == case(name).num_outputs
    assert_equal(
        estimates_of(features, rows, rows, spec)["plugin"], estimates_of(plain, kept, kept, spec)["plugin"], 1e-13
    )


# Pairs of draws -------------------------------------------------------------------------------------------------------


def wide(*, bias: bool = True, noise: bool = False) -> nn.Module:
    """4 → 6 → 5 → 3, perhaps with dropout behind the first layer."""
    torch.manual_seed(0)
    between = [nn.Tanh(), Dropout(0.4)] if noise else [nn.Tanh()]
    layers = [nn.Linear(4, 6, bias=bias), *between, nn.Linear(6, 5, bias=bias), nn.SiLU(), nn.Linear(5, 3, bias=bias)]
    return nn.Sequential(*layers).double().eval()


def gradients_of(model: nn.Module, x: Tensor, **options: Any) -> tuple[GradientFeatures, KernelSpec]:
    defaults: dict[str, Any] = {
        "estimator": "autodiff",
        "gamma": 0.6,
        "draws": 8,
        "blocks": 4,
        "contraction": "layered",
    }
    spec = KernelSpec(**{**defaults, **options})
    features, _ = prepared_features(model, x, spec)
    assert isinstance(features, GradientFeatures)
    return features, spec


def inputs_of_two_row_sets() -> tuple[Tensor, Tensor]:
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x[:5], x[5:]


PAIRS: dict[str, dict[str, Any]] = {
    "one draw a block": {"draws": 4},
    "three draws a block": {"draws": 12},
    "antithetic": {"design": "antithetic", "draws": 16},
    "orthogonal": {"design": "orthogonal", "draws": 12},
    "relative": {"gamma_scale": "relative", "gamma": 0.4},
    "sphere": {"distribution": "sphere"},
    "student": {"distribution": {"name": "student", "nu": 8.0}},
    "one output": {"outputs": 1},
    "weights alone": {"parameters": ("*.weight",)},
    "a readout that is not moved": {"parameters": ("0.*", "2.*", "4.bias")},
}


def without_slopes(features: GradientFeatures) -> GradientFeatures:
    assert features.penultimate is not None
    return replace(features, penultimate=None, readout=None)


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
def test_slopes_give_the_products_of_all_pairs_of_draws(options):
    """Sums with and without blocks, the diagonal of two row sets, and the products of all pairs of blocks."""
    x1, x2 = inputs_of_two_row_sets()
    features, spec = gradients_of(wide(), x1, **options)
    plain = without_slopes(features)
    assert features.penultimate == 1
    assert features.readout == 2
    ours, theirs = ([all_rows(f, x1), all_rows(f, x2)] for f in (features, plain))
    assert ours[0]["gradient_1"].shape == (5, features.num_draws, 1, 5)
    assert theirs[0]["gradient_1"].shape == (5, features.num_draws, len(features.columns), 5)
    for meeting in (spec.meeting, replace(spec.meeting, paired=True)):
        if meeting.paired:
            ours, theirs = ([slice_rows(rows, slice(4)) for rows in both] for both in (ours, theirs))
        for wanted in (Wanted(stderr=False), Wanted(stderr=True)):
            sums, expected = (f.block_sums(*both, meeting, wanted) for f, both in ((features, ours), (plain, theirs)))
            for name in ("within", "between", *(["by_block"] if wanted.stderr else [])):
                assert_equal(getattr(sums, name), getattr(expected, name))
        assert_equal(features.block_products(*ours, meeting), plain.block_products(*theirs, meeting))


def test_kernels_of_pairs_that_share_slopes_are_the_definition():
    """Against loops over draws, blocks and entries; also of a model without biases."""
    x1, x2 = inputs_of_two_row_sets()
    for bias in (True, False):
        features, spec = gradients_of(wide(bias=bias), x1, draws=12)
        expected = by_definition(wide(bias=bias), x1, x2, spec, "autodiff")
        assert (features.penultimate, features.readout) == (1, 2)
        ours = estimates_of(features, all_rows(features, x1), all_rows(features, x2), spec)
        assert_equal(ours["plugin"], expected.plugin)
        assert_equal(ours["unbiased"], expected.unbiased)
        assert_equal(ours["stderr"], expected.stderr, scale=abs(expected.plugin).max())


def test_slopes_of_a_model_with_noise():
    x1, x2 = inputs_of_two_row_sets()
    features, spec = gradients_of(wide(noise=True), x1, design="antithetic", draws=8)
    plain = without_slopes(features)
    ours, theirs = (estimates_of(f, all_rows(f, x1), all_rows(f, x2), spec) for f in (features, plain))
    assert_equal(ours["unbiased"], theirs["unbiased"])


@pytest.mark.parametrize("moved", [True, False])
def test_slopes_come_whole_with_the_first_of_some_outputs(moved):
    """Also if only the last output uses a unit, so that the first ones do not determine its slope."""
    (x1, x2), model = inputs_of_two_row_sets(), wide()
    with torch.no_grad():
        model[4].weight[:2, 0] = 0.0
    features, spec = gradients_of(model, x1, parameters=("*",) if moved else ("0.*", "2.*", "4.bias"))
    parts = []
    for columns in ((0, 1), (2,)):
        draws = range(features.num_draws)
        parts.append([features.compute(x, torch.arange(len(x)), draws, columns, batch=len(x)) for x in (x1, x2)])
    assert parts[1][0]["gradient_1"].numel() == parts[1][0]["input_1"].numel() == 0
    calibration = Calibration(level=1.0, relative_error=0.1, num_entries=1)
    whole = all_rows(features, x1), all_rows(features, x2)
    ours, expected = (tile_estimates(features, p, spec.meeting, calibration, spec.scale) for p in (parts, [whole]))
    for name, values in expected.items():
        assert_equal(ours[name], values)
    total = torch.stack([features.block_products(*part, spec.meeting) for part in parts]).sum(0)
    assert_equal(total, features.block_products(*whole, spec.meeting))


def test_weights_of_pairs_are_those_of_the_moved_readout():
    """Computed from draws alone: weights in float32, as in a pass over the model, and their products in float64."""
    model = prepare_model(wide(), dtype=torch.float32, device="cpu")
    space, spec = select_parameters(model), KernelSpec(estimator="autodiff", gamma=0.6, draws=12, blocks=4)
    drawing = spec.drawing("autodiff", space, model)
    moved = []
    with moved_in_place(model, space) as move:
        for z in drawing.shrunken(range(12)):
            move(z)
            moved.append(model[4].weight.detach().double().clone())
    stacked = torch.stack(moved)
    for columns in (range(3), range(1, 2)):
        expected = torch.einsum("sco,tco->sto", stacked[:, list(columns)], stacked[:, list(columns)])
        assert_equal(pair_weights(model, "4", space, drawing, tuple(columns)), expected, 1e-7)


class Leaving(nn.Module):
    """A network whose readout is not the last layer if there are more than three examples."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.readout = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.readout(self.norm(self.hidden(x)))
        return 2.0 * outputs if len(x) > 3 else outputs


def test_a_readout_that_another_function_follows_is_refused():
    model, x = prepare_model(Leaving(), dtype=torch.float64, device="cpu"), torch.randn(6, 4, dtype=torch.float64)
    features, _ = gradients_of(model, x[:3])
    assert (features.penultimate, features.readout) == (None, 1)
    features.compute(x, torch.arange(6), range(8), features.columns, batch=3)
    with pytest.raises(NNTKError, match=r"another way from layer 'readout' to its output .*; put examples of both"):
        features.compute(x, torch.arange(6), range(8), features.columns)


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_model_that_goes_another_way_is_refused():
    model, x = prepare_model(Turning(), dtype=torch.float64, device="cpu"), torch.randn(6, 4, dtype=torch.float64)
    features, _ = prepared_features(model, x[:3], KernelSpec(kind="local", statistic="plugin"))
    features.compute(x, torch.arange(6), range(1), features.columns, batch=3)
    with pytest.raises(NNTKError, match=r"goes another way from layer 'hidden' to its output .*; put examples of both"):
        features.compute(x, torch.arange(6), range(1), features.columns)


# What else gradients depend on ----------------------------------------------------------------------------------------


def test_parameters_move_in_place_and_come_back():
    model = prepare_model(case("tied_weights").build(), dtype=torch.float64, device="cpu")
    space = select_parameters(model)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}
    z = torch.linspace(-1, 1, space.num_parameters, dtype=torch.float64)
    expected = space.moved(space.values(model), z)

    def fail_while_moved() -> None:
        with moved_in_place(model, space) as move:
            move(3.0 * z)
            move(z)
            assert all(torch.equal(value, expected[name]) for name, value in space.values(model).items())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_moved()
    for name, value in model.named_parameters():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


class Rounded(torch.autograd.Function):
    """Has a backward that vmap cannot handle."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * (gradient * x).numpy())


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(x)


def test_a_model_that_vmap_cannot_take_back_goes_output_by_output():
    model, x = network(Squares()), torch.randn(4, 4, dtype=torch.float64)
    recording = Recording(model, [Site("0", ()), Site("2", ())], x)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(recording.outputs, recording.calls["0"][0].out, torch.ones(2, 4, 3).double(),
                            is_grads_batched=True, retain_graph=True)  # fmt: skip
    assert plan_sites(model, select_parameters(model), x).whole == ()
    assert_equal(local_kernel(model, x), brute_force.local_kernel(model, x, x))
