"""Which estimator computes a kernel for a given model, decided once, from the model and a few examples, and explained.

The decision is handed around as a value (`Decision`): workers rebuild the same feature map from it, and a resumed run
reuses it. No kernel is computed here.

Axes: n examples, c outputs.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from nntk_dist.errors import NNTKError
from nntk_dist.estimators.contraction import contraction_of
from nntk_dist.estimators.noise_contraction import noise_contraction
from nntk_dist.estimators.noisy_passes import MOST_GROUPS
from nntk_dist.layers.noise_plan import NoisePlan, plan_noise
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.layers.sites import SitePlan
from nntk_dist.models.black_box import holds_black_box
from nntk_dist.models.evaluation import Evaluator, check_finite
from nntk_dist.models.noise import agreement, check_gradients, noise_text
from nntk_dist.models.parameters import ParameterSpace, select_parameters
from nntk_dist.planning.jumps import JumpProbe, probe_jumps
from nntk_dist.planning.model_probes import ModelProbes, call_changes, probe_model
from nntk_dist.planning.stacking import try_stacking
from nntk_dist.sampling.laws import LowRank
from nntk_dist.spec import KernelSpec

_ROUNDING = 1e4  # in units of the dtype: another order of summation, far below any real dependence


@dataclass(frozen=True)
class Decision:
    """What was decided for a model: which estimator and why, how draws are evaluated, and the sizes that follow.

    `contraction` says in words how products of gradients are made, which follows from the number of draws.
    """

    estimator: str
    reason: str
    num_draws: int
    num_parameters: int
    num_outputs: int
    stacked: bool
    num_columns: int = 0  # numbers of a sketch for a block, 0 without one
    num_sketched: int = 0  # parameters that are in the sketch
    contraction: str = ""
    stacking: str = ""  # how perturbed models are evaluated and why, where there are such
    probes: ModelProbes | None = None  # what the model was found to be like; None where nobody looked
    sites: SitePlan | None = field(default=None, repr=False, compare=False)  # of `autodiff`, where known already

    @property
    def explanation(self) -> str:
        """Reason and contraction as one sentence."""
        return "; ".join(filter(None, (self.reason, self.contraction)))


def decide(model: nn.Module, x: Tensor, spec: KernelSpec, *, batch: int, threads: int | None = None) -> Decision:
    """Decide the estimator for a prepared model, on up to 32 of the examples, for those who will evaluate it in batches
    with so many threads (None: as many as now).

    Raises: NNTKError where the asked estimator is not valid for the model, an output does not exist, or f is not
    finite.
    """
    space = select_parameters(model, spec.parameters)
    values = Evaluator(model, space).base(x[:32])
    check_finite(values, "the model's output")
    calls = _check_function(model, space, x[:32], values)
    num_outputs = values.shape[1]
    if isinstance(spec.outputs, int) and not 0 <= spec.outputs < num_outputs:
        raise NNTKError(
            f"outputs is {spec.outputs}; allowed: 0 to {num_outputs - 1} (the model has {num_outputs}), trace, full"
        )
    jumps, rough = None, check_gradients(model, spec.kind, spec.estimator)
    if rough is None:
        try:
            jumps = _probe_jumps(model, space, spec, x)
        except NNTKError as error:
            if spec.estimator != "auto":
                raise
            rough = f"autodiff is not to be had: {error}"
    estimator, reason = _choose(model, space, spec, x, jumps, rough)
    sites = None
    if estimator == "autodiff":
        try:
            sites = plan_sites(model, space, x)
        except NNTKError as error:
            if spec.kind != "nonlocal" or spec.estimator != "auto":
                raise
            estimator, reason = _without_gradients(model, space, spec, x, f"autodiff is not to be had: {error}")
    reason += noise_text(model)
    if not spec.weighting.is_fixed:
        reason = f"{reason}; draws weighted by {spec.weighting.text}: a ratio estimator, consistent but not unbiased"
    drawing = None if spec.kind == "local" else spec.drawing(estimator, space, model)
    draws = 1 if drawing is None else drawing.num_draws
    trial = None
    if drawing is not None and estimator == "weight":
        trial = try_stacking(model, space, _filled(x, batch), drawing, threads=threads)
    stacked = trial is not None and trial.stacked
    probes = probe_model(Evaluator(model, space, stacked), spec, x[:32], estimator, calls=calls, jumps=jumps)
    decision = Decision(
        estimator,
        reason,
        draws,
        space.num_parameters,
        num_outputs,
        stacked,
        stacking="" if trial is None else trial.text,
        probes=probes,
        sites=sites,
    )
    return with_draws(model, x, spec, decision, draws)


def _filled(x: Tensor, batch: int) -> Tensor:
    """A whole batch of the examples at hand, over and over where they are fewer."""
    return x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch]


def with_draws(model: nn.Module, x: Tensor, spec: KernelSpec, decision: Decision, num_draws: int) -> Decision:
    """The same decision with another number of draws: how products are contracted follows from it.

    Raises: NNTKError where a contraction is asked for that this estimator has none of.
    """
    decision = replace(decision, num_draws=num_draws)
    space = select_parameters(model, spec.parameters)
    kept = 1 if isinstance(spec.outputs, int) else decision.num_outputs
    if decision.estimator == "activation":
        noise = plan_noise(model, space, x)
        contraction = noise_contraction(noise, space, spec, num_draws=num_draws, num_outputs=kept)
        sizes = [each.num_parameters for each in noise.noisy if each.module in contraction.sketched]
        return replace(
            decision,
            contraction=contraction.text(noise),
            num_columns=contraction.num_columns,
            num_sketched=sum(sizes),
        )
    if decision.estimator == "autodiff":
        plan = decision.sites or plan_sites(model, space, x)
        chosen = contraction_of(model, plan, space, spec, num_draws=num_draws, num_outputs=kept)
        return replace(
            decision, contraction=chosen.text, num_columns=chosen.num_columns, num_sketched=chosen.num_sketched
        )
    if spec.contraction != "auto":
        raise NNTKError(
            f"contraction is '{spec.contraction}', but the estimator is {decision.estimator} ({decision.reason}), "
            "which forms no gradients; use contraction: auto"
        )
    return decision


def _check_function(model: nn.Module, space: ParameterSpace, x: Tensor, values: Tensor) -> tuple[float, float | None]:
    """Refuse a model whose output is not a function of one example and the parameters; else, how far it changed."""
    repeat_change, batch_change = call_changes(Evaluator(model, space), x, values)
    tolerance = agreement(model, _ROUNDING * torch.finfo(values.dtype).eps)
    if repeat_change > tolerance:
        raise NNTKError(
            "the model's output changes from call to call: it draws random numbers even in eval mode, which are not "
            "seeded; take them from an nntk_dist.StochasticModule, or replace nn.Dropout by nntk_dist.replace_dropout"
        )
    if batch_change is not None and batch_change > tolerance:
        raise NNTKError(
            "the model's output for one example depends on the other examples of its batch, which no kernel of pairs "
            "can express; normalise with running statistics, or over each example"
        )
    return repeat_change, batch_change


def _probe_jumps(model: nn.Module, space: ParameterSpace, spec: KernelSpec, x: Tensor) -> JumpProbe | None:
    """Whether f jumps, where the choice of an estimator depends on it."""
    settled = holds_black_box(model) or spec.kind != "nonlocal" or spec.distribution == LowRank.name
    settled = settled or not spec.weighting.is_fixed or spec.estimator in ("weight", "activation")
    if settled:
        return None
    return probe_jumps(model, space, spec.drawing("autodiff", space, model), x)


def _choose(
    model: nn.Module, space: ParameterSpace, spec: KernelSpec, x: Tensor, probe: JumpProbe | None, rough: str | None
) -> tuple[str, str]:
    """The estimator's name and the reason, in words; `rough` says why there are no gradients."""
    if holds_black_box(model):
        return "weight", _black_box_reason(spec)
    if spec.kind == "local":
        return "autodiff", "the ordinary NTK is made of gradients at θ"
    if spec.kind == "averaged":
        return "autodiff", "the averaged NTK is made of gradients at random parameters"
    if spec.kind == "covariance":
        return "weight", "the covariance kernel is made of output differences"
    if not spec.weighting.is_fixed:
        return "weight", "only differences of outputs belong to one draw each, to be weighted"
    if spec.distribution == LowRank.name:
        return "weight", (
            "only output differences do without radial perturbations; at finite gamma, low-rank ones give another "
            "kernel than those of any radial distribution"
        )
    if spec.estimator == "weight":
        return "weight", "asked for; valid for anything that can be evaluated"
    if spec.estimator == "activation":
        return "activation", f"asked for: {_treatment(_activation_plan(model, space, spec, x), space)}"
    if rough is not None:
        return _without_gradients(model, space, spec, x, rough)
    assert probe is not None
    if probe.differentiable:
        return "autodiff", f"the model is locally Lipschitz in its parameters: {_evidence(probe)}"
    if spec.estimator == "autodiff":
        raise NNTKError(
            f"estimator is 'autodiff', but the model jumps in its parameters ({_evidence(probe)}), where it is "
            "silently wrong; use estimator: weight or auto"
        )
    jumps = f"the model jumps in its parameters, where gradients miss the jumps: {_evidence(probe)}"
    return _without_gradients(model, space, spec, x, jumps)


def _without_gradients(
    model: nn.Module, space: ParameterSpace, spec: KernelSpec, x: Tensor, why: str
) -> tuple[str, str]:
    """The better of the two estimators that only evaluate: `activation` where it is valid and reaches enough."""
    try:
        plan = _activation_plan(model, space, spec, x)
    except NNTKError as error:
        return "weight", f"{why}; activation is not to be had: {error}"
    if 2 * plan.num_parameters(space)[2] > space.num_parameters:
        return "weight", f"{why}; noise in pre-activations would reach less than half of its parameters"
    return "activation", f"{why}; {_treatment(plan, space)}"


def _activation_plan(model: nn.Module, space: ParameterSpace, spec: KernelSpec, x: Tensor) -> NoisePlan:
    """The noise plan of a model, where the kernel's description allows the estimator `activation`.

    Raises: NNTKError for another distribution or design than it is exact for, too many draws, and as `plan_noise`.
    """
    replace(spec, estimator="activation")  # checks that it goes with the distribution and the design
    drawing = spec.drawing("activation", space, model)
    most = MOST_GROUPS * drawing.group_size
    searched = spec.max_draws if spec.rtol is not None else 0
    for name, number in (("draws", drawing.num_draws), ("max_draws", searched)):
        if number > most:
            raise NNTKError(f"{name} is {number}; allowed for estimator activation: up to {most} ({spec.design})")
    return plan_noise(model, space, x)


def _treatment(plan: NoisePlan, space: ParameterSpace) -> str:
    noisy, readout, weight_space = plan.num_parameters(space)
    return (
        f"of {space.num_parameters} parameters {noisy} are reached by noise in the pre-activations of "
        f"{len(plan.noisy)} layers, {readout} lie in the readout, whose gradient is exact, and {weight_space} are "
        "perturbed themselves"
    )


def _black_box_reason(spec: KernelSpec) -> str:
    """Why `weight` computes this kernel of a black box, or the refusal of a kernel that differences cannot give."""
    if spec.kind not in ("nonlocal", "covariance"):
        raise NNTKError(
            f"kind is '{spec.kind}', which is made of gradients, but the model holds a black box, which has none; "
            "allowed: nonlocal, covariance"
        )
    if spec.estimator not in ("auto", "weight"):
        raise NNTKError(
            f"estimator is '{spec.estimator}', but the model holds a black box, which can only be evaluated; allowed: "
            "auto, weight"
        )
    return "the model holds a black box, which can be evaluated and nothing else"


def _evidence(probe: JumpProbe) -> str:
    if math.isnan(probe.residual):
        return "along random segments f does not change at all"
    if probe.jump > 0:
        return f"on a long segment through θ f jumps by {probe.jump:.2g} of its range there"
    return (
        f"along random segments the integrated gradient misses {probe.residual:.2g} of the change of f, "
        f"at up to {probe.num_gradients} points"
    )
