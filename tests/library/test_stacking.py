"""The trial that decides how perturbed models are evaluated: its choice follows its own measurement, and is remembered.

Axes: none.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import BlackBox, Dropout
from nntk_dist.evaluation import Evaluator, prepare_model
from nntk_dist.parameters import select_parameters
from nntk_dist.stacking import StackingTrial, try_stacking
from tests.oracles.cases import case


def tried(model: nn.Module, x: Tensor) -> StackingTrial:
    prepared = prepare_model(model, dtype=x.dtype, device="cpu")
    return try_stacking(prepared, select_parameters(prepared), x)


class Slow:
    """Counts evaluations, and makes one of the two ways take long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, stacked: bool, milliseconds: float) -> None:
        self.calls = 0
        original = Evaluator.perturbed

        def perturbed(evaluator: Evaluator, x: Tensor, z: Tensor, batch: int | None = None) -> Tensor:
            self.calls += 1
            if evaluator.stacked == stacked:
                end = time_now() + milliseconds * 1e-3 * (1 if stacked else len(z))
                while time_now() < end:
                    pass
            return original(evaluator, x, z, batch)

        monkeypatch.setattr(Evaluator, "perturbed", perturbed)


def time_now() -> float:
    import time

    return time.perf_counter()


@pytest.mark.parametrize("stacked", [True, False])
def test_the_faster_way_is_taken_and_remembered(monkeypatch, stacked):
    """The slower way is made slower than the other could be: 4 ms for a draw in turn, 1 s for a stacked call."""
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7 + stacked)), torch.randn(2, 3)
    slow = Slow(monkeypatch, stacked=not stacked, milliseconds=4 if stacked else 1000)
    trial = tried(model, x)
    assert trial.stacked == stacked
    assert (trial.seconds_stacked < trial.seconds_in_turn) == stacked
    assert ("evaluated stacked" in trial.text) == stacked
    calls = slow.calls
    assert tried(model, x) == trial
    assert slow.calls == calls
    tried(model, torch.randn(3, 3))
    assert slow.calls > calls


def test_long_passes_are_not_stacked_and_stacking_is_not_even_tried(monkeypatch):
    Slow(monkeypatch, stacked=False, milliseconds=20)
    trial = tried(nn.Linear(4, 3), torch.randn(2, 4))
    assert not trial.stacked
    assert math.isnan(trial.seconds_stacked)
    assert "far above a call's overhead" in trial.text


class Branching(nn.Module):
    """Looks at its parameters' values, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.weight.sum() > 0 else x.sum(1)


def test_what_cannot_be_stacked_is_evaluated_in_turn_and_says_why():
    x = torch.randn(2, 2, dtype=torch.float64)
    black_box = BlackBox(lambda params, x: x @ params, np.ones(2))
    assert "a black box takes one set of parameters at a time" in tried(black_box, x).text
    assert "noise is fixed" in tried(nn.Sequential(nn.Linear(2, 2), Dropout(0.1)), x).text
    assert "vmap cannot take the model" in tried(Branching(), x).text


def test_models_that_write_in_place_are_tried_like_any_other():
    model, x = case("relu_mlp_in_place").build(), case("relu_mlp_in_place").inputs(4)
    assert tried(model, x).text.startswith("perturbed models are evaluated")
