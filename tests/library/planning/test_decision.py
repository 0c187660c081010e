"""The decision as a value: it survives JSON, adapts to another number of draws without a model, and is made only once.
Estimators are registered objects, tried in order, and only `Unavailable` makes `auto` go on.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nntk_dist.estimators.activation
import nntk_dist.estimators.autodiff
import nntk_dist.estimators.weight
from nntk_dist import nonlocal_kernel
from nntk_dist.errors import ArgumentError, ModelError, Unavailable
from nntk_dist.estimators.weight import Weight
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import Decision, decide, plan_for, with_draws
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.planning.plain import from_plain, to_plain
from nntk_dist.sampling.designs import Design
from nntk_dist.sampling.laws import LowRank
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, prepared_features
from tests.oracles.cases import case

SPECS = {
    "weight": ("tanh_mlp", KernelSpec(gamma=0.5, estimator="weight", draws=64)),
    "means of differences": ("tanh_mlp", KernelSpec(gamma=0.5, estimator="weight", draws=4096)),
    "low rank": ("tanh_mlp", KernelSpec(distribution=LowRank(gamma=0.5, rank=1), draws=32)),
    "autodiff": ("relu_mlp", KernelSpec(gamma=0.5, outputs=1)),
    "sketch": ("relu_mlp", KernelSpec(gamma=0.5, contraction="sketch", sketch=64)),
    "activation": ("deep_sign_mlp", KernelSpec(gamma=0.5, draws=16)),
    "averaged": ("relu_mlp", KernelSpec(kind="averaged", gamma=0.5)),
    "local": ("relu_mlp", KernelSpec(kind="local", outputs="full")),
}


def decided(name: str) -> tuple[nn.Module, Tensor, KernelSpec, Decision]:
    model_name, spec = SPECS[name]
    model, x = prepare_model(case(model_name).build(), dtype=torch.float64, device="cpu"), case(model_name).inputs(8)
    return model, x, spec, decide(model, x, spec, batch=8)


@pytest.mark.parametrize("name", SPECS)
def test_a_decision_survives_json_and_makes_the_same_features(name, monkeypatch):
    model, x, spec, decision = decided(name)
    restored = Decision.from_plain(json.loads(json.dumps(to_plain(decision))))
    assert restored == decision
    assert restored.explanation == decision.explanation

    def planned_again(*args, **options):
        raise AssertionError("planned again")

    monkeypatch.setattr(nntk_dist.estimators.autodiff, "plan_sites", planned_again)
    monkeypatch.setattr(nntk_dist.estimators.autodiff, "contraction_of", planned_again)
    monkeypatch.setattr(nntk_dist.estimators.activation, "plan_noise", planned_again)
    monkeypatch.setattr(nntk_dist.estimators.activation, "noise_contraction", planned_again)
    monkeypatch.setattr(nntk_dist.estimators.weight, "find_low_rank_passes", planned_again)
    first, again = (all_rows(make_feature_map(model, x, spec, each), x) for each in (decision, restored))
    assert first.keys() == again.keys()
    assert all(torch.equal(array, again[key]) for key, array in first.items())


@pytest.mark.parametrize("name", ["means of differences", "autodiff", "sketch", "activation"])
def test_another_number_of_draws_takes_no_model(name):
    """The same as a decision for that number from the start, except for what it states about the model."""
    model, x, spec, decision = decided(name)
    for draws in (16, 512):
        expected = plan_for(decision.estimator, model, x, replace(spec, draws=draws))
        assert with_draws(decision, spec, draws) == replace(
            decision, num_draws=draws, plan=replace(expected.plan, **_trials(decision))
        )


def _trials(decision: Decision) -> dict[str, bool]:
    """Results of trials with the original draws, which hold for any number of draws."""
    plan: Any = decision.plan
    return {"low_rank_passes": plan.low_rank_passes} if decision.estimator == "weight" else {}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"probes": 5}, r"^probes is 5; expected the fields of ModelProbes"),
        ({"num_draws": "many"}, r"^num_draws is 'many'; expected int"),
        ({"plan": {"sites": {}}}, r"^plan\.contraction is missing"),
        ({"unheard": "of"}, r"^unheard is unknown"),
        ({"estimator": "autodif"}, r"estimator is 'autodif'.*did you mean 'autodiff'"),
    ],
)
def test_a_decision_that_is_not_whole_is_refused(change, match):
    plain = json.loads(json.dumps(to_plain(decided("autodiff")[3])))
    with pytest.raises(ValueError, match=match):
        Decision.from_plain(plain | change)


def test_plain_values_keep_their_types():
    @dataclass(frozen=True)
    class Part:
        size: float
        names: frozenset[str] = frozenset()
        design: Design = Design.IID

    part = Part(2.0, frozenset({"b", "a"}), Design.ORTHOGONAL)
    assert type(to_plain(part)["design"]) is str
    plain = json.loads(json.dumps(to_plain(part)))
    assert plain == {"size": 2.0, "names": ["a", "b"], "design": "orthogonal"}
    assert from_plain(Part, plain) == part
    assert from_plain(Part, plain).design is Design.ORTHOGONAL
    with pytest.raises(ValueError, match="design is 'sorted'; expected Design"):
        from_plain(Part, plain | {"design": "sorted"})
    with pytest.raises(TypeError, match="a Tensor has no plain form"):
        to_plain(torch.ones(1))


# Registration, and what `auto` does with errors


@dataclass(frozen=True)
class Doubling(Weight):
    """A user's estimator: output differences under another name."""

    def statement(self, plan, space) -> str:
        return "an estimator of one's own"


MINE = Doubling()
HERE = f"python:{__name__}"


def test_an_estimator_of_ones_own_needs_no_more_than_its_name():
    model, x = case("tanh_mlp").build(), case("tanh_mlp").inputs(5)
    spec = KernelSpec(gamma=0.5, estimator="weight", draws=16)
    own = plan_for(f"{HERE}:MINE", model, x, spec)
    features, expected = make_feature_map(model, x, spec, own), prepared_features(model, x, spec)[0]
    assert Decision.from_plain(json.loads(json.dumps(to_plain(own)))) == own
    one, other = (all_rows(each, x)["differences"] for each in (features, expected))
    torch.testing.assert_close(one, other)
    options = {"gamma": 0.5, "draws": 16}
    named = nonlocal_kernel(model, x, estimator=f"{HERE}:MINE", **options)
    assert "an estimator of one's own" in named.reason
    assert torch.equal(named.kernel, nonlocal_kernel(model, x, estimator="weight", **options).kernel)


class Refusing(Weight):
    """Raises a given error when it is planned."""

    error: Exception

    def __init__(self, error: Exception) -> None:
        object.__setattr__(self, "error", error)

    def plan(self, trial):
        raise self.error


UNAVAILABLE, BROKEN = Refusing(Unavailable("not on a Monday")), Refusing(ModelError("of no use"))


def test_auto_goes_on_after_unavailable_and_after_nothing_else(monkeypatch):
    model, x, spec = case("tanh_mlp").build(), case("tanh_mlp").inputs(5), KernelSpec(gamma=0.5)
    monkeypatch.setattr("nntk_dist.planning.decision.AUTO_ORDER", (f"{HERE}:UNAVAILABLE", "weight"))
    chosen = decide(model, x, spec, batch=5)
    assert chosen.estimator == "weight"
    assert chosen.reason.startswith(f"{HERE}:UNAVAILABLE is unavailable: not on a Monday; valid for anything")
    monkeypatch.setattr("nntk_dist.planning.decision.AUTO_ORDER", (f"{HERE}:BROKEN", "weight"))
    with pytest.raises(ModelError, match="of no use"):
        decide(model, x, spec, batch=5)


class Picky(nn.Module):
    """Raises a given error in its forward pass."""

    def __init__(self, error: Exception, *, if_grad: bool = False) -> None:
        super().__init__()
        self.linear, self.error, self.if_grad = nn.Linear(4, 2), error, if_grad

    def forward(self, x: Tensor) -> Tensor:
        if not self.if_grad or torch.is_grad_enabled():
            raise self.error
        return self.linear(x)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyError("mask"), AssertionError()])
def test_a_model_that_fails_is_a_model_error_with_its_cause(error):
    with pytest.raises(ModelError, match="the model fails on its inputs") as caught:
        decide(Picky(error), torch.randn(5, 4), KernelSpec(gamma=0.5), batch=5)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("no second derivative"), TypeError("not a Tensor")])
def test_a_model_that_cannot_be_differentiated_is_evaluated_instead(error):
    model = prepare_model(Picky(error, if_grad=True), dtype=torch.float32, device="cpu")
    x = torch.randn(5, 4)
    chosen = decide(model, x, KernelSpec(gamma=0.5), batch=5)
    assert chosen.estimator in ("activation", "weight")
    assert f"({error.args[0]})" in chosen.reason
    with pytest.raises(Unavailable, match=str(error.args[0])) as caught:
        decide(model, x, KernelSpec(gamma=0.5, estimator="autodiff"), batch=5)
    assert repr(caught.value.__cause__) == repr(error)


def test_a_contraction_needs_gradients():
    """When `auto` falls back to differences only after it has seen the model."""
    with pytest.raises(
        ArgumentError,
        match=r"contraction is 'means', but the estimator is weight \(autodiff is unavailable: .*\), which forms no",
    ):
        decide(case("sign_unit").build(), case("sign_unit").inputs(4), KernelSpec(contraction="means"), batch=4)
