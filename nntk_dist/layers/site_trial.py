"""The trial that finds a model's site plan: classify modules by a pass, then compare with automatic differentiation.

A Linear layer that is applied once, to one vector per example, has the gradient δ ⊗ h̃, which need never be formed
(`outer`). Other sites, and parameters that several modules share, give dense per-example gradients. A parameter without
a rule, or whose rule does not fit (its weight is used outside its module, its batch is folded into positions), is
differentiated as a whole (`whole`): with vmap, or in a loop over the examples if vmap cannot take the model. A module
that gets one row for all examples, such as position embeddings, has per-example gradients once that row is repeated, if
the model takes it so.

Axes: n examples, c outputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import Unavailable
from nntk_dist.layers.hooks import BeforeHook, hooked
from nntk_dist.layers.penultimate import find_output_layers, find_readout
from nntk_dist.layers.per_example import site_gradients, whole_gradients
from nntk_dist.layers.recording import Call, Pass, Recording
from nntk_dist.layers.rules import num_positions, rule_for
from nntk_dist.layers.sites import Site, SitePlan
from nntk_dist.models.evaluation import in_float64, outputs
from nntk_dist.models.parameters import ParameterSpace, aliases
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.philox import normal, signs
from nntk_dist.sampling.streams import Stream

_PROBE_EXAMPLES = 3
_CLASSIFIED_EXAMPLES = 32  # more of them show more of a model that routes its examples
_AGREEMENT = 1e-8  # relative, float64: far above rounding, far below any wrong formula


def plan_sites(model: nn.Module, space: ParameterSpace, x: Tensor) -> SitePlan:
    """Find the site plan of a model, and check it in float64 against automatic differentiation on three examples.

    A single example is taken twice: with one row, a module that is fed a constant row looks like one that is fed the
    example.

    Raises:
        Unavailable: per-example gradients cannot be separated, as in a model whose outputs depend on their batch.
    """
    own = x[:_CLASSIFIED_EXAMPLES] if len(x) > 1 else torch.cat([x, x])
    exact, x = in_float64(model, own)
    trial = x[:_PROBE_EXAMPLES]
    parameters = _probe_parameters(exact, space)
    plan = _with_common_rows(exact, _classify(exact, space, x, parameters), trial, parameters)
    plan, wrong = _checked(exact, plan, trial, parameters)
    if wrong:
        plan, wrong = _checked(exact, _without(plan, frozenset(wrong)), trial, parameters)
        if wrong and not plan.whole_in_turn:
            plan, wrong = _checked(exact, replace(plan, whole_in_turn=True), trial, parameters)
        if wrong:
            raise Unavailable(
                f"the gradient of parameter '{sorted(wrong)[0]}' does not separate by example: the model's output for "
                "one example depends on its batch, or it leaves the autograd graph"
            )
    plan = _with_ends_of(model, plan, own)
    return replace(plan, input_layers=_input_layers(exact, plan, trial))


def _with_ends_of(model: nn.Module, plan: SitePlan, x: Tensor) -> SitePlan:
    """The plan without the last layers if the model in its own precision ends in another way, behind a cast, say."""
    if plan.output_layers is None and plan.readout is None:
        return plan
    recording = Recording(model, plan.outer, x)
    outs = recording.outs([site.module for site in plan.outer])
    same_layers = find_output_layers(recording.outputs, outs) == plan.output_layers
    same_readout = find_readout(recording.outputs, outs) == plan.readout
    return replace(
        plan,
        output_layers=plan.output_layers if same_layers else None,
        readout=plan.readout if same_readout else None,
    )


def _checked(
    model: nn.Module, plan: SitePlan, x: Tensor, parameters: Mapping[str, Tensor]
) -> tuple[SitePlan, set[str]]:
    """The plan, in a loop over the examples if vmap cannot take the model, and the parameters that it has wrong."""
    try:
        return plan, _disagreeing(model, plan, x, parameters)
    except Unavailable:
        if not plan.whole or plan.whole_in_turn:
            raise
    in_turn = replace(plan, whole_in_turn=True)
    return in_turn, _disagreeing(model, in_turn, x, parameters)


def _with_common_rows(model: nn.Module, plan: SitePlan, x: Tensor, parameters: Mapping[str, Tensor]) -> SitePlan:
    """The plan, without the rules of common sites if the model does not take a repeated row, or takes it otherwise."""
    names = frozenset(name for site in plan.dense if site.common is not None for _, name in site.parameters)
    if not names:
        return plan
    try:
        wrong = _disagreeing(model, plan.only(names), x, parameters)
    except Exception as error:  # a model's code may raise anything
        if is_out_of_memory(error):
            raise
        wrong = set(names)
    return _without(plan, names) if wrong else plan


def _input_layers(model: nn.Module, plan: SitePlan, x: Tensor) -> frozenset[str]:
    if not plan.outer:
        return frozenset()
    biases = frozenset(site.module for site in plan.outer if site.attributes == ("bias",))
    return biases | layers_fed_with_input(model, [site.module for site in plan.outer], x)


def layers_fed_with_input(model: nn.Module, modules: Iterable[str], x: Tensor) -> frozenset[str]:
    """Find the modules whose input is the model's input itself, which no parameter changes. One forward pass over `x`.

    Decided by memory, not by numbers: the layer's input must be a view of the model's input and still hold its values.
    An input that a module computed anew is not recognised, even if it is computed from the model's input alone.
    """
    seen = dict.fromkeys(modules, False)
    given: list[Tensor] = []  # the copy that the model gets; its values may be overwritten

    def keep(h: object) -> None:
        given[:] = [h] if isinstance(h, Tensor) else []

    def compare(name: str) -> BeforeHook:
        def before(h: Tensor) -> None:
            if name == "":
                keep(h)
            same_memory = bool(given) and h.untyped_storage().data_ptr() == given[0].untyped_storage().data_ptr()
            seen[name] = same_memory and torch.equal(h.reshape(len(x), -1), x.reshape(len(x), -1))

        return before

    with hooked(model, before={"": keep, **{name: compare(name) for name in seen}}), torch.no_grad():
        outputs(model, x)
    return frozenset(name for name, is_input in seen.items() if is_input)


def _probe_parameters(model: nn.Module, space: ParameterSpace) -> dict[str, Tensor]:
    """The parameters moved a little: at exact zeros (a freshly initialised scale or bias) a wrong rule could pass."""
    base = space.values(model)
    first = next(iter(base.values()))
    count = torch.zeros(1, dtype=torch.int64, device=first.device)
    sides = signs(0, Stream.PROBE, count, space.num_parameters, dtype=first.dtype)[0]
    return space.moved(base, sides.mul_(1e-2))


def _classify(model: nn.Module, space: ParameterSpace, x: Tensor, parameters: Mapping[str, Tensor]) -> SitePlan:
    """Sites by what the modules are and how a trial pass calls them."""
    groups = aliases(model)
    first_name = {name: first for first, group in groups.items() for name in group}
    sites: list[Site] = []
    covered: set[str] = set()
    for path, module in model.named_modules():
        own = tuple(
            (attribute, first_name[f"{path}.{attribute}" if path else attribute])
            for attribute, _ in module.named_parameters(recurse=False)
        )
        selected = tuple((attribute, name) for attribute, name in own if name in space.names)
        if selected and rule_for(module) is not None:
            sites.append(Site(path, selected))
            covered.update(f"{path}.{attribute}" if path else attribute for attribute, _ in selected)
    # Another number of rows shows which calls have a row for each example.
    others = x[:_PROBE_EXAMPLES] if len(x) > _PROBE_EXAMPLES else torch.cat([x, x[:1]])
    recording = Recording(model, sites, x, parameters)
    rows_of = _rows_of_calls(recording, Recording(model, sites, others, parameters), len(x), len(others))
    # A parameter that also lives in a module without a rule, or in one with calls of other rows, is whole.
    whole = {name for name in space.names if any(alias not in covered for alias in groups[name])}
    for site in sites:
        calls = recording.calls[site.module]
        if rows_of[site.module] is None:
            whole.update(name for _, name in site.parameters)
        elif calls:
            given = _attributes_of_rule(model.get_submodule(site.module), parameters, calls[0])
            whole.update(name for attribute, name in site.parameters if attribute not in given)
    outer: list[Site] = []
    dense: list[Site] = []
    for site in sites:
        kept = tuple(pair for pair in site.parameters if pair[1] not in whole)
        if not kept:
            continue
        calls = recording.calls[site.module]
        common = tuple(calls[0].h.shape) if rows_of[site.module] == _Rows.COMMON else None
        shared = any(len(groups[name]) > 1 for _, name in kept)
        is_linear = isinstance(model.get_submodule(site.module), nn.Linear)
        once = len(calls) == 1 and calls[0].h.ndim >= 2 and num_positions(tuple(calls[0].h.shape)) == 1
        is_outer = is_linear and once and not shared and common is None
        (outer if is_outer else dense).append(replace(site, parameters=kept, common=common))
    outs = recording.outs([site.module for site in outer])
    return SitePlan(
        tuple(outer),
        tuple(dense),
        tuple(name for name in space.names if name in whole),
        find_output_layers(recording.outputs, outs),
        find_readout(recording.outputs, outs),
    )


class _Rows(Enum):
    """The rows of a module's calls."""

    EACH = auto()  # one for each example
    COMMON = auto()  # one for all examples


def _rows_of_calls(recording: Recording, other: Recording, num_rows: int, num_others: int) -> dict[str, _Rows | None]:
    """The rows of each module's calls, from passes over two numbers of examples; None if they are others."""

    def rows(calls: Sequence[Call], others: Sequence[Call]) -> _Rows | None:
        shapes, other_shapes = ([(call.h.shape, call.out.shape) for call in own] for own in (calls, others))
        if not all(h and out for h, out in shapes + other_shapes):
            return None
        counts = {len(values) for call in calls for values in (call.h, call.out)}
        if counts <= {num_rows} and {len(values) for call in others for values in (call.h, call.out)} <= {num_others}:
            return _Rows.EACH
        is_common = shapes == other_shapes and len(set(shapes)) == 1 and 0 not in counts
        return _Rows.COMMON if is_common else None

    return {module: rows(calls, other.calls[module]) for module, calls in recording.calls.items()}


def _attributes_of_rule(module: nn.Module, parameters: Mapping[str, Tensor], call: Call) -> frozenset[str]:
    """The attributes whose gradients a module's rule gives: not `weight_g`, say, from which a hook makes the weight."""
    rule, h, out = rule_for(module), call.h[:1], call.out[:1]
    assert rule is not None
    return frozenset(rule.gradients(module, parameters, h, torch.zeros_like(out)[:, None]))


def _weighted_gradients(
    model: nn.Module, plan: SitePlan, x: Tensor, parameters: Mapping[str, Tensor], weights: Float[Tensor, "n c"]
) -> dict[str, Tensor]:
    """Every parameter's per-example gradients, weighted over examples and outputs.

    Rules are linear in δ, so outputs are summed before gradients are formed. Memory: P, and n times the largest
    parameter; n·C times the whole parameters.
    """
    sites = plan.densified(frozenset(site.module for site in plan.outer)).dense
    recording = Recording(model, sites, x, parameters)
    deltas = {
        name: [torch.einsum("nc,nc...->n...", weights, delta)[:, None] for delta in parts]
        for name, parts in recording.gradients(range(weights.shape[1])).items()
    }
    result = {name: torch.zeros_like(parameters[name]) for name in plan.names()}
    for name, gradients in site_gradients(model, sites, Pass(x, recording, deltas, parameters, range(1))):
        result[name] += gradients.sum((0, 1))
    if plan.whole:
        for rows, parts in whole_gradients(model, plan, x, parameters, range(weights.shape[1])):
            for name, part in parts.items():
                result[name] += torch.einsum("nc,nc...->...", weights[rows], part)
    return result


def _disagreeing(model: nn.Module, plan: SitePlan, x: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Parameters whose per-example gradients, weighted at random over examples and outputs, miss the weighted sum's
    gradient.
    """
    leaves = {name: parameters[name].detach().requires_grad_() for name in parameters if name in plan.names()}
    with torch.enable_grad():
        values = outputs(model, x, {**parameters, **leaves})
        count = torch.zeros(1, dtype=torch.int64, device=x.device)
        weights = normal(1, Stream.PROBE, count, 0, values.numel()).reshape(values.shape)
        if not values.requires_grad:
            raise Unavailable(
                "the model's output carries no gradient (does its forward pass run under no_grad, or detach?)"
            )
        expected = torch.autograd.grad(
            (values * weights).sum(), list(leaves.values()), materialize_grads=True, allow_unused=True
        )
    gradients = _weighted_gradients(model, plan, x, parameters, weights)
    scale = max(float(part.abs().max()) for part in expected)
    wrong = set()
    for name, truth in zip(leaves, expected, strict=True):
        if float((gradients[name] - truth).abs().max()) > _AGREEMENT * max(scale, 1e-300):
            wrong.add(name)
    return wrong


def _without(plan: SitePlan, names: frozenset[str]) -> SitePlan:
    """The plan with these parameters differentiated as a whole."""
    kept = plan.only(plan.names() - names)
    return replace(kept, whole=plan.whole + tuple(sorted(names - set(plan.whole))), output_layers=None, readout=None)
