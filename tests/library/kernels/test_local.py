"""The ordinary tangent kernel against gradients taken one example and one output at a time, for every model at hand.

Axes: n1, n2 examples, C outputs.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import NNTKError, local_kernel, nonlocal_kernel
from nntk_dist.layers.per_example import whole_gradients
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.layers.sites import SitePlan
from nntk_dist.models.builders import build_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.runtime.memory import is_out_of_memory
from tests.harness.tools import assert_equal
from tests.oracles import brute_force
from tests.oracles.cases import CASES, Case, case

IMAGE = (2, 6, 6)
BUILT_IN = {
    "mlp-relu": ("mlp", {"widths": [5, 4]}, (6,)),
    "mlp-none": ("mlp", {"widths": [], "bias": False}, (6,)),
    **{f"mlp-{name}": ("mlp", {"widths": [5], "activation": name}, (6,)) for name in ("tanh", "gelu", "erf", "sign")},
    "mlp-quantize": ("mlp", {"widths": [5], "activation": {"name": "quantize", "levels": 4}}, (6,)),
    "mlp-image": ("mlp", {"widths": [4], "activation": "silu"}, IMAGE),
    "cnn-average": ("cnn", {"channels": [3, 4], "activation": "tanh"}, IMAGE),
    "cnn-max": ("cnn", {"channels": [3], "pool": "max", "readout": "flatten", "bias": False}, IMAGE),
    "resnet-batch": ("resnet", {"depth": 8, "width": 2, "norm": "batch"}, IMAGE),
    "resnet-group": ("resnet", {"depth": 8, "width": 2, "norm": "group", "activation": "tanh"}, IMAGE),
    "resnet-none": ("resnet", {"depth": 8, "width": 2, "norm": "none"}, IMAGE),
    "transformer-image": ("transformer", {"dim": 4, "depth": 1, "heads": 2, "hidden": 5, "patch": 3}, IMAGE),
    "transformer-mean": ("transformer", {"dim": 4, "depth": 1, "heads": 2, "hidden": 5, "pool": "mean"}, (5, 3)),
    "transformer-vector": ("transformer", {"dim": 4, "depth": 2, "heads": 1, "hidden": 5}, (5,)),
}  # fmt: skip
CASE_IDS = [entry.name for entry in CASES]


def built_in(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A built-in model in float64, its parameters and running statistics moved off their initial zeros and ones."""
    builder, arguments, shape = BUILT_IN[name]
    model = build_model(builder, arguments, input_shape=shape, num_outputs=3, seed=0).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for values in (*model.parameters(), *model.buffers()):
            if values.is_floating_point():
                values += 0.1 * torch.rand(values.shape, generator=generator, dtype=torch.float64)
    return model, shape


def assert_local(model: nn.Module, x1: Tensor, x2: Tensor | None = None, patterns: Sequence[str] = ("*",)) -> None:
    """Check equality with brute force to 1e-10 of the largest entry, for all ways to treat outputs."""
    first = brute_force.per_example_gradients(model, x1, patterns)
    second = first if x2 is None else brute_force.per_example_gradients(model, x2, patterns)
    for outputs in ("trace", "full", first.shape[1] - 1):
        expected = brute_force.kernel_of(first, second, outputs)
        kernel = local_kernel(model, x1, x2, outputs=outputs, parameters=patterns).numpy()
        np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-10 * np.abs(expected).max(), err_msg=str(outputs))


@pytest.mark.parametrize("entry", CASES, ids=CASE_IDS)
def test_cases(entry: Case):
    assert_local(entry.build(), entry.inputs(4))
    assert_local(entry.build(), entry.inputs(4), entry.inputs(3, seed=5))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models(name: str):
    model, shape = built_in(name)
    generator = torch.Generator().manual_seed(3)
    x1, x2 = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in (3, 2))
    assert_local(model, x1)
    assert_local(model, x1, x2)


def some_of_the_parameters() -> list[tuple[str, str]]:
    """Every case with only its weights, only its biases, and only one layer, if it has them."""
    chosen = []
    for entry in CASES:
        names = [name for name, _ in entry.build().named_parameters()]
        layer = f"{names[0].rpartition('.')[0]}.*"
        patterns = [
            pattern for pattern in ("*weight", "*bias", layer) if brute_force.selected_names(entry.build(), [pattern])
        ]
        chosen += [(entry.name, pattern) for pattern in patterns]
    return chosen


@pytest.mark.parametrize(("name", "pattern"), some_of_the_parameters())
def test_some_of_the_parameters(name: str, pattern: str):
    assert_local(case(name).build(), case(name).inputs(3), case(name).inputs(2, seed=5), (pattern,))


@pytest.mark.parametrize("name", ["cnn-average", "resnet-batch", "resnet-group", "transformer-image"])
@pytest.mark.parametrize("patterns", [("*weight",), ("*bias",), ("output.*", "*norm*")])
def test_some_of_the_parameters_of_built_in_models(name: str, patterns: tuple[str, ...]):
    model, shape = built_in(name)
    present = tuple(pattern for pattern in patterns if brute_force.selected_names(model, [pattern]))
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_local(model, x, None, present or ("*.weight",))


def test_a_shared_parameter_is_selected_by_any_of_its_names():
    tied, x = case("tied_weights").build(), case("tied_weights").inputs(3)
    by_second_name = local_kernel(tied, x, parameters=["readout_again.*"])
    assert torch.equal(by_second_name, local_kernel(tied, x, parameters=["readout.*"]))
    expected = brute_force.local_kernel(tied, x, x, patterns=["readout.*"])
    np.testing.assert_allclose(by_second_name.numpy(), expected, rtol=1e-12)


def test_the_plan_takes_the_short_way_where_there_is_one():
    """A plan that differentiates the model as a whole would be right too, but a thousand times slower."""
    plans = {}
    for name in ("relu_mlp", "convnet", "tied_weights", "raw_parameters", "attention"):
        model = case(name).build()
        plans[name] = plan_sites(model, select_parameters(model), case(name).inputs(3))
    modules = {name: ([s.module for s in p.outer], [s.module for s in p.dense], p.whole) for name, p in plans.items()}
    assert modules["relu_mlp"] == (["0", "2"], [], ())
    assert modules["convnet"] == (["5"], ["0", "2"], ())
    assert modules["raw_parameters"] == (["hidden", "readout"], [], ("scale", "offset"))
    assert modules["attention"] == (["readout"], ["norm", "qkv", "mix"], ("class_token",))
    assert modules["tied_weights"][0] == ["decoder"]
    assert "encoder.weight" in modules["tied_weights"][2]


@pytest.mark.parametrize("name", ["mlp-image", "cnn-average", "resnet-batch", "resnet-group"])
def test_every_layer_of_these_built_in_models_has_a_rule_that_fits(name: str):
    """A rule that does not reproduce automatic differentiation is silently left out of the plan."""
    model, shape = built_in(name)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert plan_sites(model, select_parameters(model), x).whole == ()


def test_models_are_used_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)).double()
    x = case("relu_mlp").inputs(4)
    expected = brute_force.local_kernel(model.eval(), x, x)
    assert_equal(local_kernel(model.train(), x), expected)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_batches_change_rounding_at_most(batch: int):
    entry = case("convnet")
    whole = local_kernel(entry.build(), entry.inputs(5), entry.inputs(4, seed=2))
    torch.testing.assert_close(
        local_kernel(entry.build(), entry.inputs(5), entry.inputs(4, seed=2), batch=batch),
        whole,
        rtol=1e-12,
        atol=1e-12,
    )


def test_the_kernel_of_one_set_is_bitwise_symmetric_and_that_of_the_set_with_itself():
    for entry in (case("deep_relu_mlp"), case("convnet")):
        kernel = local_kernel(entry.build(), entry.inputs(5), outputs="full")
        assert torch.equal(kernel, kernel.T)
        again = local_kernel(entry.build(), entry.inputs(5), entry.inputs(5), outputs="full")
        torch.testing.assert_close(kernel, again, rtol=1e-12, atol=1e-12)


def test_the_model_is_left_as_it_was():
    entry = case("relu_mlp")
    model = entry.build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    local_kernel(model, entry.inputs(3), dtype=torch.float32)
    assert model.training
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
        assert value.requires_grad
        assert value.grad is None
    assert not any(module._forward_hooks for module in model.modules())


class LooksAtItsBatch(nn.Module):
    """Centres its outputs over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        values = self.layer(x).tanh()
        return values - values.mean(0)


class Undecided(nn.Module):
    """A raw parameter behind a branch on the data, which vmap cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x if float(x.sum()) > 0 else -x) * self.scale


def test_models_that_look_at_their_batch_are_refused():
    message = r"the model's output for one example depends on the other examples of its batch"
    with pytest.raises(NNTKError, match=message):
        local_kernel(LooksAtItsBatch().double(), torch.randn(4, 3, dtype=torch.float64))


class WithPositions(nn.Module):
    """Layers that get the same single row for all examples: learned positions and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.readout = nn.Embedding(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)
        self.register_buffer("numbers", torch.arange(3)[None])
        self.register_buffer("constant", torch.tensor([[0.3, -0.7]]))

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, :, None] + self.embedding(self.numbers) + self.layer(self.constant)[:, None]
        return self.readout(torch.tanh(h).mean(1))


def test_a_single_row_does_not_hide_what_is_the_same_for_all_rows():
    torch.manual_seed(0)
    model, x = WithPositions().double(), torch.randn(7, 3, dtype=torch.float64)
    assert_local(model, x[:1], x)
    assert_local(model, x[:1])
    with pytest.raises(NNTKError, match="depends on the other examples of its batch"):
        local_kernel(LooksAtItsBatch().double(), x[:1], x)


def test_inputs_that_a_model_writes_to_stay_as_they_were():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), -torch.ones(4, 3)
    local_kernel(model, x, x)
    assert torch.equal(x, -torch.ones(4, 3))


class Single(nn.Module):
    """Holds a constant that `.to` does not convert, so that it runs only in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mixing = nn.Linear(3, 4), (torch.arange(12.0) / 9).reshape(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) @ self.mixing


def test_models_that_run_in_float32_alone_have_no_checked_gradients():
    torch.manual_seed(0)
    model, x = Single(), torch.randn(5, 3)
    message = r"the model does not run in float64, in which its derivatives are checked \(.*; keep its constants"
    for compute in (local_kernel, partial(nonlocal_kernel, gamma=0.1, estimator="autodiff")):
        with pytest.raises(NNTKError, match=message):
            compute(model, x)
    estimate = nonlocal_kernel(model, x, gamma=0.1, draws=64)
    assert estimate.estimator == "weight"
    assert "autodiff is unavailable: the model does not run in float64" in estimate.reason
    assert torch.isfinite(estimate.kernel).all()


class Full(nn.Module):
    """A raw parameter, and a forward pass that runs out of memory."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.scale, self.message = nn.Parameter(torch.ones(3)), message

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    "message",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
     "GET was unable to find an engine to execute this computation"],
)  # fmt: skip
def test_memory_that_runs_out_under_vmap_is_said_to_be_so(message: str):
    model, x = Full(message), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match=message.partition("(")[0]) as caught:
        list(whole_gradients(model, SitePlan((), (), ("scale",)), x, dict(model.named_parameters()), range(3)))
    assert is_out_of_memory(caught.value)
    assert not isinstance(caught.value, NNTKError)


def test_models_that_vmap_cannot_take_are_differentiated_one_example_at_a_time():
    model = Undecided()
    assert_equal(local_kernel(model, torch.ones(4, 3)), torch.full((4, 4), 3.0))
    assert plan_sites(model, select_parameters(model), torch.ones(4, 3)).whole_in_turn
