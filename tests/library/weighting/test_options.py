"""Refusals of weightings: one line each that names the value, what is allowed and what to do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nntk_dist.estimators.weight
from nntk_dist import BlackBox, NNTKError, nonlocal_kernel
from nntk_dist.spec import KernelSpec
from nntk_dist.weighting.options import Weighting, as_weighting
from tests.oracles.cases import case


def kernel(weighting: Any, **options: Any) -> Any:
    model, x = case("relu_mlp").build(), case("relu_mlp").inputs(4)
    return nonlocal_kernel(model, x, **{"gamma": 0.5, "draws": 16, "blocks": 4, "weighting": weighting, **options})


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        ("outputs", r"weighting is 'outputs'; allowed: fixed, parameter, output, loss, python:module:function; did yo"),
        (0.5, r"weighting is 0\.5; allowed: fixed, parameter, output, loss, a function, or a mapping of name, tempera"),
        ({"name": None}, r"weighting is None; allowed: fixed, parameter, output, loss, a function"),
        ({"temperature": 1.0}, r"weighting has no name; allowed: fixed, parameter, output, loss, or a function"),
        ({"name": "output", "temprature": 1}, r"a key of weighting is 'temprature'; allowed: name, temperature.*did y"),
        ({"name": "output", "temperature": 0}, r"weighting\.temperature is 0; allowed: a number above 0, or infinity"),
        ({"name": "output", "temperature": -1.0}, r"weighting\.temperature is -1\.0; allowed: a number above 0"),
        ({"name": "output", "temperature": float("nan")}, r"weighting\.temperature is nan; allowed: a number above 0"),
        ({"name": "output", "temperature": "hot"}, r"weighting\.temperature is 'hot'; allowed: a number above 0"),
        ({"name": "output", "temperature": True}, r"weighting\.temperature is True; allowed: a number above 0"),
        ({"name": "output", "per_example": 1}, r"weighting\.per_example is 1; allowed: True or False"),
        ({"name": "fixed", "per_example": True}, r"per_example is True; allowed for weighting fixed: False \(all draw"),
        (
            {"name": "parameter", "per_example": True},
            r"per_example is True; allowed for weighting parameter: False \(a score of parameters depends on",
        ),
        (
            {"name": "loss", "per_example": True},
            r"per_example is True; allowed for weighting loss: False \(the loss of an example would need its target, w",
        ),
        ({"name": "parameter", "dimension": 0}, r"weighting\.dimension is 0; allowed: a whole number, 1 or more$"),
        ({"name": "parameter", "dimension": 2.5}, r"weighting\.dimension is 2\.5; allowed: a whole number, 1 or more$"),
        ({"name": "output", "reference": 0}, r"weighting\.reference is 0; allowed: a whole number, 1 or more, or a te"),
        ({"name": "output", "reference": True}, r"weighting\.reference is True; allowed: a whole number, 1 or more, o"),
        ({"name": "output", "reference": [1.0]}, r"weighting\.reference is \[1\.0\]; allowed: a whole number, .* tens"),
        ({"name": "output", "reference": torch.zeros(0, 4)}, r"weighting\.reference is shape \(0, 4\); allowed: a who"),
        ({"name": "loss", "targets": [1, 2]}, r"weighting\.targets is \[1, 2\]; allowed: a tensor or NumPy array wi"),
        ({"name": "loss", "targets": torch.tensor(1)}, r"weighting\.targets is shape \(\); allowed: a tensor or N"),
    ],
)  # fmt: skip
def test_words_that_do_not_exist_or_do_not_go_together(weighting, message):
    with pytest.raises(NNTKError, match=message):
        as_weighting(weighting)


@pytest.mark.parametrize("weighting", ["parameter", "output", len])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "covariance"}, r"weighting is '.*'; allowed for kind covariance: fixed \(only kind nonlocal weights"),
        ({"kind": "averaged"}, r"weighting is '.*'; allowed for kind averaged: fixed \(only kind nonlocal weights"),
        ({"kind": "local"}, r"weighting is '.*'; allowed for kind local: fixed \(only kind nonlocal weights its draws"),
        ({"estimator": "autodiff"}, r"estimator is 'autodiff'; allowed for weighting .*, which weights .*auto, weight"),
        ({"estimator": "activation"}, r"estimator is 'activation'; allowed for weighting .*, which .*: auto, weight"),
    ],
)
def test_only_differences_of_the_nonlocal_kernel_are_weighted(weighting, arguments, message):
    with pytest.raises(NNTKError, match=message):
        KernelSpec(weighting=weighting, **arguments)


def test_contractions_of_gradients_are_refused_with_the_reason():
    with pytest.raises(
        NNTKError, match=r"contraction is 'means', but the estimator is weight \(only differences of out"
    ):
        kernel("parameter", contraction="means")


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        ({"name": "loss"}, r"weighting is 'loss', which needs targets of the reference batch; give targets with ref"),
        ({"name": "loss", "targets": torch.zeros(3)}, r"weighting\.targets has 3 rows; allowed: 4, one for each exam"),
        (
            {"name": "loss", "targets": torch.zeros(3), "reference": torch.zeros(2, 4)},
            r"weighting\.targets has 3 rows; allowed: 2, one for each example of the reference",
        ),
        (
            {"name": "output", "reference": torch.zeros(2, 5)},
            r"weighting\.reference has examples of shape \(5,\); allowed: \(4,\), as the inputs",
        ),
        (
            {"name": "loss", "targets": torch.zeros(4)},
            r"targets are torch\.float32 of shape \(4,\); allowed for numbers: finite ones of shape \(4, 3\), as the o",
        ),
        (
            {"name": "loss", "targets": torch.full((4, 3), torch.nan)},
            r"targets are torch\.float32 of shape \(4, 3\); allowed for numbers: finite ones of shape \(4, 3\)",
        ),
        (
            {"name": "loss", "targets": torch.tensor([0, 1, 2, 3])},
            r"targets are labels from 0 to 3, and the model has 3 outputs; allowed: 0 to 2 \(floating-point targets",
        ),
        ({"name": "loss", "targets": torch.tensor([0, -1, 2, 1])}, r"targets are labels from -1 to 2, and the model h"),
        (
            {"name": "loss", "targets": torch.zeros(4, 3, dtype=torch.int64)},
            r"targets are torch\.int64 of shape \(4, 3\); allowed: labels, whole numbers of shape \(4,\), or numbers",
        ),
        ({"name": "loss", "targets": torch.ones(4, dtype=torch.bool)}, r"targets are torch\.bool of shape \(4,\); all"),
        ("python:no_such_module:f", r"weighting 'python:no_such_module:f': cannot import 'no_such_module' \(ModuleNot"),
        ("python:math:no_such", r"weighting 'python:math:no_such': 'math' has no 'no_such'"),
        ("python:math", r"weighting 'python:math' has the wrong form; write python:module:function"),
    ],
)  # fmt: skip
def test_reference_batches_and_functions_that_do_not_fit(weighting, message):
    with pytest.raises(NNTKError, match=message):
        kernel(weighting)


def test_outputs_that_are_zero_have_no_scale():
    box = BlackBox(lambda params, x: np.where(params[0] > 1.0, 1.0, 0.0) * np.ones(len(x)), [0.0, 0.0])
    with pytest.raises(
        NNTKError, match=r"weighting is 'output', .* the outputs on the reference batch, but these are all 0"
    ):
        nonlocal_kernel(box, torch.zeros(3, 1), gamma=1.0, weighting="output")


class Grows(nn.Module):
    """Infinite for parameters above 0, only on negative examples."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return 1.0 + torch.where((x < 0) & (self.scale > 0), torch.inf, 0.0)


def test_outputs_that_are_not_finite_are_named_as_the_reference_batchs():
    options = {"gamma": 0.5, "draws": 16, "blocks": 4, "estimator": "weight"}
    x = torch.ones(3, 1)
    assert nonlocal_kernel(Grows(), x, **options).plugin.abs().max() == 0
    with pytest.raises(
        NNTKError, match=r"the model's output on the reference batch under draws .*: NaN or infinity for 1"
    ):
        nonlocal_kernel(Grows(), x, weighting={"name": "output", "reference": torch.tensor([[1.0], [-1.0]])}, **options)


class Failing:
    """A score that is a callable object and fails."""

    def __call__(self, *given: Tensor) -> Tensor:
        raise KeyError("no such thing")


def one_of_many_is_nan(theta: Tensor, moved: Tensor, base: Tensor, outputs: Tensor) -> Tensor:
    return torch.zeros(len(moved)).log() if len(moved) > 1 else torch.zeros(1)


@pytest.mark.parametrize(
    ("score", "per_example", "message"),
    [
        (Failing(), False, r"the score Failing failed on 1 draws, parameters of shape \(51,\) .* \(4, 3\): KeyError:"),
        (lambda *given: 1.0, False, r"the score <lambda> returned float for 1 draws and 4 examples; .* \(1,\)"),
        (lambda *given: torch.zeros(4), False, r"returned a tensor of shape \(4,\) for .* shape \(1,\), one for each "),
        (lambda *given: torch.zeros(1), True, r"returned a tensor of shape \(1,\) for .* \(1, 2\), one for each draw"),
        (lambda *given: torch.zeros(1, dtype=torch.complex64), False, r"allowed: a tensor of real numbers of shape \("),
        (lambda *given: torch.full((1,), torch.nan), False, r"the score <lambda> is NaN or infinite for 1 of 1 draws;"),
        (lambda *given: torch.full((1, 2), torch.inf), True, r"the score <lambda> is NaN or infinite for 1 of 1 draws"),
        (one_of_many_is_nan, False, r"the score one_of_many_is_nan is NaN or infinite for 16 of 16 draws; allowed: fi"),
    ],
)  # fmt: skip
def test_functions_that_are_no_scores(score, per_example, message):
    with pytest.raises(NNTKError, match=message):
        kernel({"name": score, "per_example": per_example})


@pytest.mark.parametrize("metric_draws", [0, 4096])
def test_outputs_that_are_not_finite_are_not_blamed_on_the_score(metric_draws, monkeypatch):
    """For features that are differences, and for features that are their means."""
    monkeypatch.setattr(nntk_dist.estimators.weight, "METRIC_DRAWS", metric_draws)
    weighting = {"name": "output", "per_example": True, "reference": torch.ones(2, 1)}
    with pytest.raises(NNTKError, match=r"^the model's output under draws .*: NaN or infinity for 1 of 3 examples"):
        nonlocal_kernel(
            Grows(), torch.tensor([[1.0], [2.0], [-1.0]]), gamma=0.5, draws=16, blocks=4, weighting=weighting
        )


def test_a_functions_own_refusal_stays_as_it_is():
    def refuses(*given: Tensor) -> Tensor:
        raise NNTKError("not with me")

    with pytest.raises(NNTKError, match=r"^not with me$"):
        kernel(refuses)


def test_messages_are_one_line():
    for weighting in ("outputs", {"name": "loss"}, {"name": "loss", "per_example": True}, Failing(), len):
        with pytest.raises(NNTKError) as caught:
            kernel(weighting)
        assert "\n" not in str(caught.value)


def test_weightings_are_values():
    """They are frozen and compared by their options, or by the function if the score is one."""
    assert Weighting("output", 0.5, reference=torch.zeros(2, 3)) == Weighting("output", 0.5)
    assert Weighting("output", None) == Weighting("output", float("inf"))
    assert Weighting(len) == Weighting(len) != Weighting(sum)
    assert KernelSpec(weighting="parameter") == KernelSpec(
        weighting={"name": "parameter", "temperature": np.float64(1)}
    )
