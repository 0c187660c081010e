"""The layer before the readout: found where it is, refused where it is not, and the same kernel as without it.

Axes: n examples, C outputs, o units.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nntk_dist import NNTKError, averaged_kernel, local_kernel
from nntk_dist.capture import Recording, Site, plan_sites
from nntk_dist.evaluation import moved_in_place, prepare_model
from nntk_dist.gradients import GradientFeatures
from nntk_dist.parameters import select_parameters
from nntk_dist.slopes import Slopes, find_slopes, shared_slopes
from nntk_dist.spec import KernelSpec
from tests.library.tools import all_rows, assert_equal, by_definition, estimates_of, prepared_features
from tests.oracles import brute_force
from tests.oracles.cases import case


class Doubled(nn.Module):
    """An activation that reads its input twice."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * x


class Skipping(nn.Module):
    """A network whose readout is not all of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.hidden(x))) + x[:, :3]


class Turning(nn.Module):
    """A network that normalises its hidden units where there are more than three examples, and only there."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(x))
        return self.readout(torch.softmax(h, 1) if len(x) > 3 else h)


def network(*between: nn.Module, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, 3, bias=bias)).double().eval().requires_grad_(False)


def found(model: nn.Module) -> Slopes | None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    recording = Recording(model, [Site(name, ()) for name in names], torch.randn(6, 4, dtype=torch.float64))
    return find_slopes(recording.outputs, recording.outs(names))


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
    assert found(model) == Slopes("0", str(len(between) + 1))
    deeper = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), model).double().requires_grad_(False)
    assert found(deeper) == Slopes("2.0", f"2.{len(between) + 1}")


@pytest.mark.parametrize(
    "between", [[nn.Softmax(1)], [nn.LayerNorm(5)], [nn.BatchNorm1d(5)], [Doubled()], [nn.Flatten(), nn.Hardshrink()]]
)
def test_what_mixes_units_or_is_not_known_counts_for_nothing(between):
    assert found(network(*between)) is None


def test_a_readout_is_all_of_the_output():
    assert found(Skipping().double().requires_grad_(False)) is None
    assert found(nn.Sequential(network(nn.ReLU()), nn.Tanh())) is None


def test_slopes_and_shares_give_the_gradients_again():
    """Units of which one output, or none, takes anything too."""
    model = network(nn.Tanh())
    weight = model[2].weight
    weight[:, 0], weight[1:, 1] = 0.0, 0.0
    recording = Recording(model, [Site("0", ()), Site("2", ())], torch.randn(6, 4, dtype=torch.float64))
    for columns in ((0, 1, 2), (2, 0), (1,)):
        (delta,) = recording.gradients(columns)["0"]
        slopes, shares = shared_slopes(delta, weight, columns)
        assert float(shares.abs().max()) <= 1.0
        assert_equal(slopes[:, None] * shares, delta, 1e-14)


@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp", "deep_relu_mlp"])
def test_kernels_that_share_slopes_are_those_that_do_not(name):
    """Against brute force, and the layer's gradients take one output's room."""
    model, x = case(name).build(), case(name).inputs(4)
    assert_equal(local_kernel(model, x), brute_force.local_kernel(model, x, x))
    spec = KernelSpec(kind="averaged", statistic="plugin", gamma=0.6, draws=8, blocks=4)
    features, _ = prepared_features(model, x, spec)
    assert isinstance(features, GradientFeatures)
    assert features.plan.slopes is not None
    index = [site.module for site in features.plan.outer].index(features.plan.slopes.module)
    rows = all_rows(features, x)
    assert rows[f"gradient_{index}"].shape[2] == 1
    assert_equal(averaged_kernel(model, x, gamma=0.6, draws=8, blocks=4).kernel,
                 by_definition(model, x, x, spec, "autodiff").plugin)  # fmt: skip
    plain = replace(features, sums_outputs=False)
    kept = all_rows(plain, x)
    assert kept[f"gradient_{index}"].shape[2] == case(name).num_outputs
    assert_equal(
        estimates_of(features, rows, rows, spec)["plugin"], estimates_of(plain, kept, kept, spec)["plugin"], 1e-13
    )


def test_a_model_that_goes_another_way_is_refused():
    model, x = prepare_model(Turning(), dtype=torch.float64, device="cpu"), torch.randn(6, 4, dtype=torch.float64)
    features, _ = prepared_features(model, x[:3], KernelSpec(kind="local", statistic="plugin"))
    features.compute(x, torch.arange(6), range(1), features.columns, batch=3)
    with pytest.raises(
        NNTKError, match=r"goes another way from layer 'hidden' to its output .*; use estimator: weight"
    ):
        features.compute(x, torch.arange(6), range(1), features.columns)


# What gradients rest on besides ---------------------------------------------------------------------------------------


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
    """Its backward is one that vmap cannot take."""

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
