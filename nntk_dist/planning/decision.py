"""The decision of how a kernel is computed for a model: made once, explained, and carried as a value.

`decide` tries the model on a few examples and returns a `Decision`: the estimator with its reason, its plan (which
parameter's gradient is made how, and how each layer is contracted), how perturbed models are evaluated, and what the
probes of the model found. `auto` takes the first valid estimator of `AUTO_ORDER`; the reason is kept in
`Decision.reason`, in `KernelEstimate.reason`, and under `decision` in a manifest. Workers, the search for draws, a
resumed run and a check of a run get this value; none of them decides again. No kernel is computed here.

Axes: n examples, c outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, ModelError, Unavailable
from nntk_dist.estimators.estimator import Estimator, EstimatorPlan, GroupEstimator, Trial
from nntk_dist.models.black_box import holds_black_box
from nntk_dist.models.evaluation import FAILS_ON_INPUTS, Evaluator, check_finite, trying
from nntk_dist.models.noise import agreement, check_gradients, noise_text
from nntk_dist.models.parameters import ParameterSpace, select_parameters
from nntk_dist.models.passes import lowest_precision, recorded_precisions
from nntk_dist.planning.effort import Effort
from nntk_dist.planning.jumps import JumpProbe, probe_jumps
from nntk_dist.planning.model_probes import NOTABLE_CHANGE, ModelProbes, call_changes, probe_model
from nntk_dist.planning.plain import from_plain
from nntk_dist.planning.stacking import try_stacking
from nntk_dist.registration.estimators import AUTO_ORDER, ESTIMATORS
from nntk_dist.sampling.laws import LowRank
from nntk_dist.spec import ContractionChoice, EstimatorChoice, KernelSpec, Kind
from nntk_dist.weighting.attention import make_attention
from nntk_dist.weighting.options import Reference

_ROUNDING = 1e4  # in units of the dtype: another order of summation, far below any real dependence


@dataclass(frozen=True)
class Decision:
    """How the kernel of a model is computed, and why.

    Attributes:
        estimator: its name.
        reason: why this one, in words.
        num_draws: perturbed models that are evaluated; 1 for the kind `local`.
        num_outputs: C, the number of the model's outputs.
        space: the selected parameters.
        plan: the estimator's own plan, contraction included.
        stacked: whether perturbed models are evaluated many in one call.
        stacking: why, in words; empty if the estimator does not move the parameters.
        probes: what the model was found to be like; None if it was not probed.
        group: the group of parameters whose part of the kernel this is; empty for the whole kernel.
        expected_error: the relative error that a pilot expects, without that of a sketch; None without one.
    """

    estimator: str
    reason: str
    num_draws: int
    num_outputs: int
    space: ParameterSpace
    plan: EstimatorPlan
    stacked: bool = False
    stacking: str = ""
    probes: ModelProbes | None = None
    group: str = ""
    expected_error: float | None = None

    @property
    def num_parameters(self) -> int:
        """P, the number of selected parameters."""
        return self.space.num_parameters

    @property
    def contraction(self) -> str:
        """How products of gradients are contracted, in words."""
        return self.plan.contraction_text

    @property
    def explanation(self) -> str:
        """Reason and contraction as one sentence."""
        return "; ".join(filter(None, (self.reason, self.contraction)))

    def columns(self, outputs: str | int) -> tuple[int, ...]:
        """Return the indices of the model outputs in a kernel with these `outputs`."""
        return (outputs,) if isinstance(outputs, int) else tuple(range(self.num_outputs))

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Decision":
        """Restore a decision from what `to_plain` made of it.

        Raises:
            ValueError: something is missing, unknown, or of another type; the message names the key.
            ArgumentError: the estimator is not registered here.
        """
        estimator: Estimator = ESTIMATORS.get(str(values.get("estimator")))
        return from_plain(cls, values, plan=estimator.plan_type)


def decide(
    model: nn.Module,
    x: Tensor,
    spec: KernelSpec,
    *,
    batch: int,
    threads: int | None = None,
    reference: Reference | None = None,
) -> Decision:
    """Decide how the kernel of a model is computed.

    Args:
        model: a prepared model (`nntk_dist.models.evaluation.prepare_model`).
        x: examples; at most 32 are used, and fewer for a model of many parameters.
        spec: the kernel.
        batch: how many examples a forward pass will hold.
        threads: how many threads each pass will have; None for as many as now.
        reference: the examples on which weights of draws are compared; the weighting's own, or the first of x, if None.

    Raises:
        ArgumentError: an option does not fit the model.
        ModelError: the model fails, is not finite, or is no function of one example and its parameters.
        Unavailable: the requested estimator is not valid for the model.

    Example:
        >>> import torch
        >>> from nntk_dist.models.evaluation import prepare_model
        >>> model = prepare_model(torch.nn.Linear(3, 2), dtype=torch.float32, device="cpu")
        >>> decide(model, torch.randn(4, 3), KernelSpec(gamma=0.1), batch=4).estimator
        'autodiff'
    """
    space = select_parameters(model, spec.parameters)
    evaluator, examples = Evaluator(model, space), x[: Effort.of(model).examples]
    with trying(ModelError, FAILS_ON_INPUTS), recorded_precisions() as found:
        values = evaluator.base(examples)
    check_finite(values, "the model's output")
    unit = lowest_precision(found, values.dtype)
    calls = _check_function(evaluator, examples, values, unit)
    num_outputs = values.shape[1]
    if isinstance(spec.outputs, int) and not 0 <= spec.outputs < num_outputs:
        raise ArgumentError(
            f"outputs is {spec.outputs}; allowed: 0 to {num_outputs - 1} (the model has {num_outputs}), trace, full"
        )
    names, why = _candidates(model, spec)
    jumps, obstacle = _try_gradients(model, space, spec, examples, names, settled=bool(why))
    given: dict[str, Any] = {"model": model, "x": examples, "spec": spec, "num_outputs": num_outputs, "batch": batch}
    decision, problems = _first_valid(names, why, obstacle, partial(plan_for, **given, threads=threads), spec)
    statement = why or _statement(decision, spec, jumps)
    reason = "; ".join([*problems, statement]) + noise_text(model) + space.frozen_text
    if not spec.weighting.is_fixed:
        _try_weighting(decision, model, x, spec, reference)
        reason += f"; draws weighted by {spec.weighting.text}: a ratio estimator, consistent but not unbiased"
    moved = Evaluator(model, space, decision.stacked)
    drawing = None if spec.kind == Kind.LOCAL else spec.drawing(decision.estimator, space, model)
    probes = probe_model(
        moved,
        spec,
        examples,
        drawing,
        differences=not _estimator(decision.estimator).uses_gradients,
        unmoved=decision.plan.unmoved,
        calls=calls,
        jumps=jumps,
    )
    return replace(decision, reason=reason, probes=probes)


def plan_for(
    estimator: str,
    model: nn.Module,
    x: Tensor,
    spec: KernelSpec,
    *,
    num_outputs: int | None = None,
    batch: int | None = None,
    threads: int | None = None,
    stacked: bool = False,
) -> Decision:
    """Plan one estimator for a model, without asking whether its gradients can be trusted, and without probes.

    Args:
        estimator: its name.
        model: a prepared model.
        x: a few examples.
        spec: the kernel.
        num_outputs: C, if it is known.
        batch: how many examples a forward pass will hold; with it, a timed trial decides about `stacked`.
        threads: how many threads each pass will have; None for as many as now.
        stacked: whether perturbed models are evaluated many in one call, if no trial decides.

    Raises:
        Unavailable: the estimator does not work for this model or kernel.
        ArgumentError: a contraction is requested, but the estimator forms no gradients.
    """
    chosen = _estimator(estimator)
    space = select_parameters(model, spec.parameters)
    drawing = None if spec.kind == Kind.LOCAL else spec.drawing(estimator, space, model)
    stacking = ""
    if batch is not None and drawing is not None and chosen.moves_parameters:
        found = try_stacking(model, space, _filled(x, batch), drawing, threads=threads)
        stacked, stacking = found.stacked, found.text
    evaluator = Evaluator(model, space, stacked)
    if num_outputs is None:
        num_outputs = evaluator.base(x[:1]).shape[1]
    _check_contraction(chosen, estimator, spec)
    plan = chosen.plan(Trial(evaluator, spec, x, drawing, num_outputs))
    num_draws = 1 if drawing is None else drawing.num_draws
    return Decision(estimator, "", num_draws, num_outputs, space, plan, stacked, stacking)


def with_draws(decision: Decision, spec: KernelSpec, num_draws: int) -> Decision:
    """Return the same decision with another number of draws: only the contraction follows from it, from values alone.

    Args:
        decision: the decision.
        spec: the kernel; its number of blocks may differ from the one decided for.
        num_draws: the new number of draws.
    """
    chosen, outputs = _estimator(decision.estimator), decision.columns(spec.outputs)
    plan = chosen.contracted(decision.plan, decision.space, spec, num_draws=num_draws, num_outputs=len(outputs))
    return replace(decision, num_draws=num_draws, plan=plan)


def of_group(decision: Decision, spec: KernelSpec, name: str) -> Decision:
    """Return the decision for one group of parameters: its part of the kernel under the same draws, from values alone.

    Args:
        decision: the decision for all groups together.
        spec: the kernel.
        name: the group.
    """
    chosen, space, outputs = _estimator(decision.estimator), decision.space, decision.columns(spec.outputs)
    assert isinstance(chosen, GroupEstimator)
    names = frozenset(dict(space.groups)[name])
    sizes = {"num_draws": decision.num_draws, "num_outputs": len(outputs)}
    plan = chosen.of_group(decision.plan, names, space, spec, **sizes)
    count = sum(stop - start for start, stop in space.intervals(names))
    reason = f"{decision.reason}; group '{name}' has {count:,} of the {space.num_parameters:,} parameters"
    return replace(decision, plan=plan, group=name, reason=reason)


def _estimator(name: str) -> Estimator:
    found: Estimator = ESTIMATORS.get(name)
    return found


def _filled(x: Tensor, batch: int) -> Tensor:
    """A whole batch of the examples at hand, repeated if they are fewer."""
    return x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch]


def _check_contraction(chosen: Estimator, name: str, spec: KernelSpec, why: str = "") -> None:
    """Refuse a contraction of gradients for an estimator that forms none; `why` says why it was chosen."""
    if spec.contraction != ContractionChoice.AUTO and not chosen.forms_gradients:
        reason = f" ({why})" if why else ""
        raise ArgumentError(
            f"contraction is '{spec.contraction}', but the estimator is {name}{reason}, which forms no gradients; use "
            "contraction: auto"
        )


def _check_groups(chosen: Estimator, name: str, spec: KernelSpec) -> None:
    """Refuse groups of parameters for an estimator that cannot tell their parts of the kernel apart."""
    if spec.group_names and not isinstance(chosen, GroupEstimator):
        raise Unavailable(f"estimator {name} has no kernels of groups of parameters")


def _check_function(evaluator: Evaluator, x: Tensor, values: Tensor, unit: float) -> tuple[float, float | None]:
    """Reject a model whose output depends on more than one example and the parameters; return the changes measured.

    `unit` is the largest rounding unit of the numbers that the model computes: it may compute a norm in float32.
    """
    repeat_change, batch_change = call_changes(evaluator, x, values)
    tolerance = agreement(evaluator.model, min(_ROUNDING * unit, NOTABLE_CHANGE))
    if repeat_change > tolerance:
        raise ModelError(
            "the model's output changes from call to call: it draws random numbers even in eval mode, which are not "
            "seeded; take them from an nntk_dist.StochasticModule, or replace nn.Dropout by nntk_dist.replace_dropout"
        )
    if batch_change is not None and batch_change > tolerance:
        raise ModelError(
            "the model's output for one example depends on the other examples of its batch, which no kernel of pairs "
            "can express; normalise with running statistics, or over each example"
        )
    return repeat_change, batch_change


def _next_step(spec: KernelSpec) -> str:
    """What to do if no estimator that is allowed works, for the end of a message."""
    if spec.kind in (Kind.LOCAL, Kind.AVERAGED):
        return f"; the kind '{spec.kind}' needs gradients: use another, nonlocal or covariance, or other parameters"
    if spec.kind == Kind.NONLOCAL and spec.estimator not in (EstimatorChoice.AUTO, EstimatorChoice.WEIGHT):
        return "; use estimator: weight or auto"
    return ""


def _candidates(model: nn.Module, spec: KernelSpec) -> tuple[tuple[str, ...], str]:
    """The estimators to try, in their order; if model and kernel leave a single one, also why."""
    if holds_black_box(model):
        return ("weight",), _black_box_reason(spec)
    if spec.kind == Kind.LOCAL:
        return ("autodiff",), "the ordinary NTK uses gradients at θ"
    if spec.kind == Kind.AVERAGED:
        return ("autodiff",), "the averaged NTK uses gradients at random parameters"
    if spec.kind == Kind.COVARIANCE:
        return ("weight",), "the covariance kernel uses output differences"
    if not spec.weighting.is_fixed:
        return ("weight",), "only differences of outputs belong to one draw each, to be weighted"
    if isinstance(spec.distribution, LowRank):
        return ("weight",), (
            "only output differences do without radial perturbations; at finite gamma, low-rank ones give another "
            "kernel than any radial distribution"
        )
    return (AUTO_ORDER, "") if spec.estimator == EstimatorChoice.AUTO else ((str(spec.estimator),), "")


def _black_box_reason(spec: KernelSpec) -> str:
    """Why `weight` computes this kernel of a black box, or the refusal of a kernel that differences cannot give."""
    if spec.kind not in (Kind.NONLOCAL, Kind.COVARIANCE):
        raise ModelError(
            f"kind is '{spec.kind}', which uses gradients, but the model holds a black box, which has none; "
            "allowed: nonlocal, covariance"
        )
    if spec.estimator not in (EstimatorChoice.AUTO, EstimatorChoice.WEIGHT):
        raise Unavailable(
            f"estimator is '{spec.estimator}', but the model holds a black box, which can only be evaluated; allowed: "
            "auto, weight"
        )
    return "the model holds a black box, which can be evaluated and nothing else"


def _try_gradients(
    model: nn.Module, space: ParameterSpace, spec: KernelSpec, x: Tensor, names: tuple[str, ...], *, settled: bool
) -> tuple[JumpProbe | None, Unavailable | None]:
    """Whether f jumps, if it was tried, and why gradients are not to be trusted, if so.

    It is tried only if the choice of an estimator depends on it: not if one is `settled`.
    """
    users = [name for name in names if _estimator(name).uses_gradients]
    if not users:
        return None, None
    rough = check_gradients(model, spec.kind, spec.estimator)
    if rough is not None:
        return None, Unavailable(rough)
    if settled:
        return None, None
    try:
        probe = probe_jumps(model, space, spec.drawing(users[0], space, model), x)
    except Unavailable as error:
        return None, error
    if probe.differentiable:
        return probe, None
    asked = "" if spec.estimator == EstimatorChoice.AUTO else f"estimator is '{spec.estimator}', but "
    return probe, Unavailable(f"{asked}{probe.distrust}: {probe.evidence}")


def _first_valid(
    names: Sequence[str],
    why: str,
    obstacle: Unavailable | None,
    plan: Callable[[str], Decision],
    spec: KernelSpec,
) -> tuple[Decision, list[str]]:
    """The decision for the first estimator that is valid, and why those before it are not.

    `why` is the reason for a single one, `obstacle` what speaks against gradients.
    """
    problems: list[str] = []
    for name in names:
        try:
            if obstacle is not None and _estimator(name).uses_gradients:
                raise obstacle
            _check_contraction(_estimator(name), name, spec, "; ".join(problems) or why)
            _check_groups(_estimator(name), name, spec)
            return plan(name), problems
        except Unavailable as error:
            if len(names) == 1:
                raise Unavailable(f"{error}{_next_step(spec)}") from error.__cause__ or error
            problems.append(f"{name} is unavailable: {error}")
    raise Unavailable("; ".join(problems) + _next_step(spec))


def _statement(decision: Decision, spec: KernelSpec, jumps: JumpProbe | None) -> str:
    """Why the estimator of a decision is valid, in words."""
    chosen = _estimator(decision.estimator)
    if chosen.uses_gradients and jumps is not None:
        return f"the model is locally Lipschitz in its parameters: {jumps.evidence}"
    statement = chosen.statement(decision.plan, decision.space)
    return statement if spec.estimator == EstimatorChoice.AUTO else f"asked for: {statement}"


def _try_weighting(
    decision: Decision, model: nn.Module, x: Tensor, spec: KernelSpec, reference: Reference | None
) -> None:
    """Score one draw, so that a score that fails is reported before the work begins."""
    evaluator = Evaluator(model, decision.space, decision.stacked)
    drawing = spec.drawing(decision.estimator, decision.space, model)
    reference = reference or spec.weighting.reference_of(x)
    make_attention(evaluator, drawing, spec.weighting, spec.seed, reference).try_on(x)
