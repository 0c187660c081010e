"""The trial that decides how perturbed models are evaluated: its choice follows its own measurement, and is remembered.

Axes: none.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import BlackBox, Dropout
from nntk_dist.models.evaluation import Evaluator, prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.stacking import StackingTrial, try_stacking
from nntk_dist.spec import KernelSpec
from tests.oracles.cases import case


def tried(model: nn.Module, x: Tensor, **options: object) -> StackingTrial:
    prepared = prepare_model(model, dtype=x.dtype, device="cpu")
    space = select_parameters(prepared)
    spec = KernelSpec(**{"estimator": "weight", "draws": 16, **options})
    return try_stacking(prepared, space, x, spec.drawing("weight", space, prepared))


class Clock:
    """Replaces the trial's clock: fixed seconds for a draw in turn and for a stacked one; counts evaluations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, in_turn: float, stacked: float) -> None:
        self.calls = 0
        self.elapsed = 0.0
        seconds = {False: in_turn, True: stacked}
        original = Evaluator.perturbed

        def perturbed(evaluator: Evaluator, x: Tensor, z: Tensor, batch: int | None = None) -> Tensor:
            self.calls += 1
            self.elapsed += seconds[evaluator.stacked] * len(z)
            return original(evaluator, x, z, batch)

        def measured(action: Callable[[], object], device: torch.device) -> float:
            before = self.elapsed
            action()
            return self.elapsed - before

        monkeypatch.setattr(Evaluator, "perturbed", perturbed)
        monkeypatch.setattr("nntk_dist.planning.stacking._seconds", measured)


@pytest.mark.parametrize(("stacked", "seconds"), [(True, 1e-4), (False, 9e-4), (False, 2e-3)])
def test_the_faster_way_is_taken_and_remembered(monkeypatch, stacked, seconds):
    """A draw in turn takes 1 ms; near ties are decided for in turn."""
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, round(1e4 * seconds))), torch.randn(2, 3)
    clock = Clock(monkeypatch, in_turn=1e-3, stacked=seconds)
    trial = tried(model, x)
    assert trial.stacked == stacked
    assert (trial.seconds_in_turn, trial.seconds_stacked) == pytest.approx((1e-3, seconds))
    assert ("evaluated stacked" in trial.text) == stacked
    calls = clock.calls
    assert tried(model, x) == trial
    assert clock.calls == calls
    tried(model, torch.randn(3, 3))
    assert clock.calls > calls


@pytest.mark.parametrize("design", ["iid", "antithetic", "orthogonal"])
def test_the_number_of_draws_and_the_seed_change_no_answer(monkeypatch, design):
    """A search for `rtol` begins with few draws; a run that starts with the number found is evaluated the same way."""
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 8)), torch.randn(4, 3)
    Clock(monkeypatch, in_turn=1e-3, stacked=1e-4)
    trial = tried(model, x, draws=64, design=design)
    assert trial.stacked
    Clock(monkeypatch, in_turn=1e-3, stacked=1e-2)  # a new trial would find the opposite
    assert tried(model, x, draws=256, design=design) == trial
    assert tried(model, x, draws=128, seed=1, design=design) == trial
    assert not tried(model, x, draws=64, design=design, distribution="sphere").stacked  # a new trial


def test_the_trial_has_the_threads_of_those_it_is_for(monkeypatch):
    threads, original = [], Evaluator.perturbed

    def perturbed(*arguments: object) -> Tensor:
        threads.append(torch.get_num_threads())
        return original(*arguments)

    monkeypatch.setattr(Evaluator, "perturbed", perturbed)
    model, x = prepare_model(nn.Linear(3, 7), dtype=torch.float32, device="cpu"), torch.randn(2, 3)
    space, before = select_parameters(model), torch.get_num_threads()
    drawing = KernelSpec(estimator="weight", draws=16).drawing("weight", space, model)
    for count in (3, 2):
        threads.clear()
        try_stacking(model, space, x, drawing, threads=count)
        assert set(threads) == {count}
        assert torch.get_num_threads() == before


def test_memory_that_runs_out_is_no_reason_against_stacking(monkeypatch):
    def full(*_arguments: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    Clock(monkeypatch, in_turn=1e-3, stacked=1e-3)
    monkeypatch.setattr(Evaluator, "_stacked", full)
    with pytest.raises(torch.OutOfMemoryError):
        tried(nn.Sequential(nn.Linear(3, 6), nn.Tanh()), torch.randn(2, 3))


def test_long_passes_are_not_stacked_and_stacking_is_not_even_tried(monkeypatch):
    Clock(monkeypatch, in_turn=0.02, stacked=1e-6)
    trial = tried(nn.Linear(4, 3), torch.randn(2, 4))
    assert not trial.stacked
    assert math.isnan(trial.seconds_stacked)
    assert "far above a call's overhead" in trial.text


class Branching(nn.Module):
    """Branches on its parameters' values, which vmap refuses."""

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


def redefined(*, branches: bool) -> type[nn.Module]:
    """A class of the same name each time, as a notebook cell that is run again makes."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

    def plain(self: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(x * self.weight)

    def branching(self: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(x * self.weight) if self.weight.sum() > 0 else x

    Cell.forward = branching if branches else plain
    return Cell


class OfFunction(nn.Module):
    """Any function of a parameter, which no plain attribute tells from another."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(5)), function

    def forward(self, x: Tensor) -> Tensor:
        return x * self.function(self.weight)


def test_two_models_that_print_alike_share_no_choice(monkeypatch):
    Clock(monkeypatch, in_turn=1e-3, stacked=1e-4)
    first, second, x = redefined(branches=False)(), redefined(branches=True)(), torch.randn(2, 5)
    assert repr(first) == repr(second)
    assert tried(first, x).stacked
    assert "vmap cannot take the model" in tried(second, x).text
    assert tried(first, x).stacked


def test_a_remembered_choice_that_fails_is_not_taken(monkeypatch):
    Clock(monkeypatch, in_turn=1e-3, stacked=1e-4)
    x = torch.randn(2, 5)
    assert tried(OfFunction(torch.tanh), x).stacked
    again = tried(OfFunction(lambda weight: weight if weight.sum() > 0 else -weight), x)
    assert not again.stacked
    assert "vmap cannot take the model" in again.text


def test_stacked_evaluation_falls_back_to_in_turn():
    model = prepare_model(Branching(), dtype=torch.float64, device="cpu")
    space, x = select_parameters(model), torch.randn(3, 2, dtype=torch.float64)
    z = torch.randn(4, 2, dtype=torch.float64)
    stacked, in_turn = (Evaluator(model, space, stacked).perturbed(x, z) for stacked in (True, False))
    assert torch.equal(stacked, in_turn)
