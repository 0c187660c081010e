"""What is reported of a model besides its kernel: calls, batches, modules that depend on the mode; it survives JSON.

Axes: n examples, C outputs.
"""

import json

import pytest
import torch
from torch import Tensor, nn

from nntk_dist import BlackBox, ModelProbes, NNTKError, covariance_kernel, local_kernel, nonlocal_kernel
from nntk_dist.models.evaluation import Evaluator
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.model_probes import call_changes, modules_by_mode
from nntk_dist.planning.plain import from_plain, to_plain
from tests.oracles.cases import case


class Drifting(nn.Module):
    """Returns θ, larger by 2^-48 of itself at each further call: far below the threshold of refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -4.0], dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        result = self.theta * (1.0 + self.calls * 2.0**-48)
        self.calls += 1
        return result.expand(len(x), 2)


class Together(nn.Module):
    """θ·x plus a share of the batch's mean."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.theta, self.share = nn.Parameter(torch.ones(1, dtype=torch.float64)), share

    def forward(self, x: Tensor) -> Tensor:
        return self.theta * (x[:, :1] + self.share * x.mean())


def changes(model: nn.Module, x: Tensor) -> tuple[float, float | None]:
    evaluator = Evaluator(model, select_parameters(model))
    return call_changes(evaluator, x, evaluator.base(x))


def test_calls_and_batches_of_a_model_that_depends_on_neither():
    assert changes(case("affine").build(), case("affine").inputs(1)) == (0.0, None)
    repeat, batch = changes(case("attention").build(), case("attention").inputs(8))
    assert repeat == 0.0
    assert 0.0 <= batch < 1e-14


def test_the_change_from_call_to_call_is_that_of_the_largest_output():
    repeat, _ = changes(Drifting(), torch.zeros(3, 1, dtype=torch.float64))
    assert repeat == pytest.approx(2.0**-48)
    estimate = covariance_kernel(Drifting(), torch.zeros(3, 1, dtype=torch.float64), gamma=0.1, draws=8)
    assert estimate.probes.repeat_change == pytest.approx(2.0**-48)


def test_the_change_with_the_batch_is_that_of_the_outputs():
    """With the last row alone the mean goes from 2 to 5; the largest output is 5 + share·2."""
    x = torch.tensor([[0.0], [2.0], [1.0], [5.0]], dtype=torch.float64)
    share = 2.0**-46
    assert changes(Together(share), x)[1] == pytest.approx(3.0 * share / 5.0, rel=0.1)
    assert covariance_kernel(Together(share), x, gamma=0.1).probes.batch_change > 0
    assert changes(Together(1.0), x)[1] == pytest.approx(3.0 / 7.0)
    with pytest.raises(NNTKError, match="depends on the other examples of its batch"):
        covariance_kernel(Together(1.0), x, gamma=0.1)


def test_batch_norm_without_running_statistics_is_refused_and_with_them_named():
    shape = (8, 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))
    estimate = nonlocal_kernel(model, x, gamma=0.1)
    assert estimate.probes.training_modules == ("1 BatchNorm1d", "1 Dropout")
    assert model.training
    model[1] = nn.BatchNorm1d(6, track_running_stats=False)
    with pytest.raises(NNTKError, match="normalise with running statistics, or over each example"):
        nonlocal_kernel(model, x, gamma=0.1)


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ([nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2), nn.GroupNorm(1, 2)], ()),
        ([nn.Dropout(0.0), nn.InstanceNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)], ()),
        ([nn.Dropout(0.1), nn.Linear(2, 2), nn.Dropout(0.2), nn.AlphaDropout(0.1)], ("2 Dropout", "1 AlphaDropout")),
        ([nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True)], ("1 BatchNorm2d", "1 InstanceNorm2d")),
        ([nn.MultiheadAttention(4, 2), nn.RReLU()], ("1 RReLU",)),
        ([nn.MultiheadAttention(4, 2, dropout=0.1)], ("1 MultiheadAttention",)),
        ([nn.GRU(2, 2, num_layers=2, dropout=0.1), nn.GRU(2, 2)], ("1 GRU",)),
    ],
)
def test_modules_that_look_at_the_mode(modules, named):
    assert modules_by_mode(nn.ModuleList(modules)) == named


def test_what_was_probed_depends_on_what_is_asked():
    model, x = case("relu_mlp").build(), case("relu_mlp").inputs(6)
    smooth = nonlocal_kernel(model, x, gamma=0.1).probes
    assert smooth.differentiable is True
    assert smooth.jump_residual <= 0.01
    assert smooth.jump_gradients >= 16
    assert smooth.jump_size == 0.0
    jumping = nonlocal_kernel(case("sign_mlp").build(), x, gamma=0.5).probes
    assert jumping.differentiable is False
    assert jumping.jump_residual > 0.1
    asked = nonlocal_kernel(model, x, gamma=0.1, estimator="weight").probes
    assert (asked.differentiable, asked.jump_residual, asked.jump_gradients, asked.jump_size) == (
        None,
        None,
        None,
        None,
    )
    assert asked.noise == pytest.approx(smooth.noise)
    box = covariance_kernel(BlackBox(lambda params, x: x @ params, [1.0, 2.0, 3.0, 4.0]), x, gamma=0.1).probes
    assert (box.repeat_change, box.differentiable, box.noise_measured) == (0.0, None, False)
    assert local_kernel(model, x).shape == (6, 6)


def test_it_survives_json():
    for entry in ("relu_mlp", "sign_unit", "batch_norm"):
        probes = nonlocal_kernel(case(entry).build().float(), case(entry).inputs(5).float(), gamma=0.3).probes
        assert from_plain(ModelProbes, json.loads(json.dumps(to_plain(probes), allow_nan=False))) == probes
