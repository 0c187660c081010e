"""Per-example gradients of a network, layer by layer: which layer yields what, and the values at one set of parameters.

A *site* is a module whose parameters a rule of `nntk_dist.layers.rules` covers. Where a Linear layer is applied once to
one vector per example, its gradient is an outer product δ ⊗ h̃ and need never be formed (`outer`); other sites, and
parameters that several modules share, give dense per-example gradients; what no rule covers is differentiated as a
whole with vmap (`whole`). The plan is checked against automatic differentiation before it is used: a rule that does not
fit (a weight used outside its module, a batch folded into positions) sends its parameters to `whole`. No draws and no
kernels here.

Axes: n examples, c outputs, P_l parameters of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from nntk_dist.errors import NNTKError
from nntk_dist.layers.input_layers import shared_inputs
from nntk_dist.layers.penultimate import Slopes, find_readout, find_slopes
from nntk_dist.layers.rules import linear_factors, positions, rule_for
from nntk_dist.models.evaluation import as_outputs, call_with, in_float64, output_index, outputs
from nntk_dist.models.parameters import ParameterSpace, aliases
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.philox import normal, signs
from nntk_dist.sampling.streams import Stream

_PROBE_EXAMPLES = 3
_AGREEMENT = 1e-8  # relative, float64: far above rounding, far below any wrong formula


@dataclass(frozen=True)
class Site:
    """One module and which of its parameters are selected: attribute in the module -> name in the parameter space."""

    module: str
    parameters: tuple[tuple[str, str], ...]

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(attribute for attribute, _ in self.parameters)


@dataclass(frozen=True)
class SitePlan:
    """How the gradient of every selected parameter is had; each parameter of the space in exactly one of the three.

    `slopes` names the last two Linear layers, both among the sites, where the outputs share the gradient of the former;
    `readout` the last, where its output is the model's: its δ is then the identity. `shared` names the outer sites
    whose h̃ no parameter changes: those fed with the model's input itself, or with a bias alone, whose h̃ is 1.
    """

    outer: tuple[Site, ...]
    dense: tuple[Site, ...]
    whole: tuple[str, ...]
    slopes: Slopes | None = None
    readout: str | None = None
    shared: frozenset[str] = frozenset()

    def dense_names(self) -> tuple[str, ...]:
        """Parameters whose gradient is formed, in a fixed order."""
        return tuple(dict.fromkeys(name for site in self.dense for _, name in site.parameters)) + self.whole

    def names(self) -> frozenset[str]:
        """All parameters of the plan."""
        return frozenset(name for site in self.outer for _, name in site.parameters) | frozenset(self.dense_names())

    def only(self, names: frozenset[str]) -> "SitePlan":
        """The plan of these parameters alone."""

        def keep(sites: tuple[Site, ...]) -> tuple[Site, ...]:
            pruned = [replace(s, parameters=tuple(p for p in s.parameters if p[1] in names)) for s in sites]
            return tuple(site for site in pruned if site.parameters)

        whole = tuple(name for name in self.whole if name in names)
        return replace(self, outer=keep(self.outer), dense=keep(self.dense), whole=whole)

    def densified(self, modules: frozenset[str]) -> "SitePlan":
        """The same plan with the outer sites of these modules formed densely."""
        moved = tuple(site for site in self.outer if site.module in modules)
        return replace(self, outer=tuple(s for s in self.outer if s.module not in modules), dense=self.dense + moved)


@dataclass
class Call:
    """One call of a site's module: what went in and the tensor that came out."""

    h: Tensor
    out: Tensor


class Recording:
    """One differentiable forward pass, with the calls of the sites' modules kept: at given parameters, or the model's
    own.

    Use: `Recording(model, sites, x, parameters)`, then `gradients(columns)`.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], x: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        self.calls: dict[str, list[Call]] = {site.module: [] for site in sites}
        handles = [
            model.get_submodule(name).register_forward_hook(self._keep(name), with_kwargs=True) for name in self.calls
        ]
        try:
            with torch.enable_grad():
                self.outputs = outputs(model, x, parameters)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
            source = args[0] if args else next(iter(kwargs.values()))
            if not out.requires_grad:
                out = out.detach().requires_grad_()
            # Copies: an in-place activation or residual would otherwise overwrite what is kept here.
            self.calls[name].append(Call(source.detach().clone(), out))
            return out.clone()

        return hook

    def gradients(self, columns: Sequence[int]) -> dict[str, list[Float[Tensor, "n c ..."]]]:
        """∂f_c/∂(module output) for every call of every site, all output columns in one backward pass.

        They lie in memory column by column. Where the model holds what vmap cannot take back, a pass for each column.
        """
        outs = [call.out for calls in self.calls.values() for call in calls]
        parts: Sequence[Tensor | None] = [None] * len(outs)
        if outs and self.outputs.requires_grad:
            one_hot = torch.eye(self.outputs.shape[1], dtype=self.outputs.dtype, device=self.outputs.device)
            directions = one_hot[output_index(columns), None].expand(-1, len(self.outputs), -1)
            parts = self._products(outs, directions)
        zeros = (out.new_zeros(1).expand(len(columns), *out.shape) for out in outs)
        filled = [zero if part is None else part for part, zero in zip(parts, zeros, strict=True)]
        iterator = iter([part.transpose(0, 1) for part in filled])
        return {name: [next(iterator) for _ in calls] for name, calls in self.calls.items()}

    def outs(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of modules that are called once."""
        return {name: self.calls[name][0].out for name in modules}

    def _products(self, outs: Sequence[Tensor], directions: Float[Tensor, "c n o"]) -> Sequence[Tensor | None]:
        """Gradients of the outputs along several directions, None for what they do not depend on."""

        def along(direction: Tensor, *, batched: bool) -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                self.outputs, outs, direction, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        try:
            return along(directions, batched=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # an autograd.Function without a rule for vmap, say
            each = [along(direction, batched=False) for direction in directions]
            return [None if own[0] is None else torch.stack(own) for own in zip(*each, strict=True)]


def write_extended_input(site: Site, h: Tensor, target: Float[Tensor, "m j"]) -> None:
    """h̃ of a Linear site's first examples: (h, 1) with weight and bias selected, h with the weight alone, 1 with the
    bias alone.
    """
    h = h.reshape(len(h), -1)[: len(target)]
    if "weight" in site.attributes:
        target[:, : h.shape[1]] = h
    if "bias" in site.attributes:
        target[:, -1] = 1.0


def dense_gradients(
    model: nn.Module,
    plan: SitePlan,
    recording: Recording,
    deltas: Mapping[str, Sequence[Tensor]],
    x: Tensor,
    parameters: Mapping[str, Tensor],
    columns: Sequence[int],
) -> dict[str, Float[Tensor, "n c ..."]]:
    """Per-example gradients of the dense and whole parameters, (n, c, *shape) by name; shared ones summed over their
    uses.
    """
    result = {  # a module that this pass never called has no gradient
        name: parameters[name].new_zeros(len(x), len(columns), *parameters[name].shape) for name in plan.dense_names()
    }
    add_dense_gradients_(result, model, plan, recording, deltas, x, parameters, columns)
    return result


def add_dense_gradients_(
    sums: Mapping[str, Float[Tensor, "m c ..."]],
    model: nn.Module,
    plan: SitePlan,
    recording: Recording,
    deltas: Mapping[str, Sequence[Tensor]],
    x: Tensor,
    parameters: Mapping[str, Tensor],
    columns: Sequence[int],
) -> None:
    """Add those of the first m examples to sums by name, in place; an outer product is never made by itself."""
    for site in plan.dense:
        module, names = model.get_submodule(site.module), dict(site.parameters)
        rule = rule_for(module)
        assert rule is not None
        for call, delta in zip(recording.calls[site.module], deltas[site.module], strict=True):
            if isinstance(module, nn.Linear) and positions(tuple(call.h.shape)) == 1:
                delta, h = linear_factors(module, call.h, delta)
                for attribute, name in names.items():
                    part, own = sums[name], delta[: len(sums[name]), :, 0]
                    if attribute == "weight":
                        part.addcmul_(own[..., None], h[: len(part), :, None])
                    else:
                        part += own
                continue
            gradients = rule(module, parameters, call.h, delta)
            for attribute, name in names.items():
                part = sums[name]
                part += gradients[attribute][: len(part)]
    if plan.whole:
        for name, gradient in whole_gradients(model, plan.whole, x, parameters, columns).items():
            part = sums[name]
            part += gradient[: len(part)]


def whole_gradients(
    model: nn.Module, names: Sequence[str], x: Tensor, parameters: Mapping[str, Tensor], columns: Sequence[int]
) -> dict[str, Float[Tensor, "n c ..."]]:
    """Per-example gradients of the named parameters by differentiating the model one example at a time under vmap.

    Raises: NNTKError where vmap cannot take the model (data-dependent control flow, in-place writes).
    """
    chosen = {name: parameters[name] for name in names}
    selection = torch.tensor(columns, device=x.device)

    def one_example(example: Tensor) -> dict[str, Tensor]:
        def chosen_outputs(part: dict[str, Tensor]) -> Tensor:
            return as_outputs(call_with(model, {**parameters, **part}, example[None]), 1)[0, selection]

        return torch.func.jacrev(chosen_outputs)(chosen)

    try:
        return vmap(one_example)(x)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise NNTKError(
            f"per-example gradients of {', '.join(names[:3])} need torch.func.vmap, which cannot take this model "
            f"({str(error).splitlines()[0]}); use estimator: weight, or leave these parameters out by kernel.parameters"
        ) from error


def plan_sites(model: nn.Module, space: ParameterSpace, x: Tensor) -> SitePlan:
    """The plan for a model, checked in float64 against automatic differentiation on up to three examples.

    A single example is taken twice: among more rows a module that is fed something constant, one row of it, could not
    be told from one that is fed the example.

    Raises: NNTKError where per-example gradients cannot be separated, as in a model whose outputs depend on their
    batch.
    """
    trial = x[:_PROBE_EXAMPLES] if len(x) > 1 else torch.cat([x, x])
    exact, trial = in_float64(model, trial)
    parameters = _probe_parameters(exact, space)
    plan = _classify(exact, space, trial, parameters)
    wrong = _disagreeing(exact, plan, trial, parameters)
    if wrong:
        plan = _without(plan, frozenset(wrong))
        still = _disagreeing(exact, plan, trial, parameters)
        if still:
            raise NNTKError(
                f"the gradient of parameter '{sorted(still)[0]}' does not separate by example: the model's output for "
                "one example depends on its batch, or it leaves the autograd graph; use estimator: weight"
            )
    return replace(plan, shared=_shared(exact, plan, trial))


def _shared(model: nn.Module, plan: SitePlan, x: Tensor) -> frozenset[str]:
    if not plan.outer:
        return frozenset()
    biases = frozenset(site.module for site in plan.outer if site.attributes == ("bias",))
    return biases | shared_inputs(model, [site.module for site in plan.outer], x)


def _probe_parameters(model: nn.Module, space: ParameterSpace) -> dict[str, Tensor]:
    """The parameters moved a little: at exact zeros (a freshly initialised scale or bias) a wrong rule could pass."""
    base = space.values(model)
    first = next(iter(base.values()))
    count = torch.zeros(1, dtype=torch.int64, device=first.device)
    sides = signs(0, Stream.PROBE, count, space.num_parameters, dtype=first.dtype)[0]
    return space.moved(base, 1e-2 * sides)


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
    recording = Recording(model, sites, x, parameters)
    # A parameter that also lives in a module without a rule, or in one whose calls don't hold one row per example, is
    # whole.
    whole = {name for name in space.names if any(alias not in covered for alias in groups[name])}
    for site in sites:
        calls = recording.calls[site.module]
        if any(call.h.ndim == 0 or len(call.h) != len(x) or len(call.out) != len(x) for call in calls):
            whole.update(name for _, name in site.parameters)
    outer: list[Site] = []
    dense: list[Site] = []
    for site in sites:
        kept = replace(site, parameters=tuple(pair for pair in site.parameters if pair[1] not in whole))
        if not kept.parameters:
            continue
        calls = recording.calls[site.module]
        shared = any(len(groups[name]) > 1 for _, name in kept.parameters)
        is_linear = isinstance(model.get_submodule(site.module), nn.Linear)
        once = len(calls) == 1 and calls[0].h.ndim >= 2 and positions(tuple(calls[0].h.shape)) == 1
        (outer if is_linear and once and not shared else dense).append(kept)
    outs = recording.outs([site.module for site in outer])
    return SitePlan(
        tuple(outer),
        tuple(dense),
        tuple(name for name in space.names if name in whole),
        find_slopes(recording.outputs, outs),
        find_readout(recording.outputs, outs),
    )


def _weighted_gradients(
    model: nn.Module, plan: SitePlan, x: Tensor, parameters: Mapping[str, Tensor], weights: Float[Tensor, "n c"]
) -> dict[str, Tensor]:
    """Every parameter's per-example gradients, weighted over examples and outputs.

    Rules are linear in δ, so outputs are summed before gradients are formed: memory n·P, and n·C·P of whole parameters.
    """
    full = plan.densified(frozenset(site.module for site in plan.outer))
    sites = replace(full, whole=())
    recording = Recording(model, sites.dense, x, parameters)
    deltas = {
        name: [torch.einsum("nc,nc...->n...", weights, delta)[:, None] for delta in parts]
        for name, parts in recording.gradients(range(weights.shape[1])).items()
    }
    summed = dense_gradients(model, sites, recording, deltas, x, parameters, range(1))
    result = {name: part[:, 0].sum(0) for name, part in summed.items()}
    if plan.whole:
        for name, part in whole_gradients(model, plan.whole, x, parameters, range(weights.shape[1])).items():
            result[name] = torch.einsum("nc,nc...->...", weights, part)
    return result


def _disagreeing(model: nn.Module, plan: SitePlan, x: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Parameters whose per-example gradients, weighted at random over examples and outputs, miss the weighted sum's
    gradient.
    """
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad():
        values = outputs(model, x, leaves)
        count = torch.zeros(1, dtype=torch.int64, device=x.device)
        weights = normal(1, Stream.PROBE, count, 0, values.numel()).reshape(values.shape)
        if not values.requires_grad:
            raise NNTKError(
                "the model's output carries no gradient (does its forward pass run under no_grad, or detach?); "
                "use estimator: weight"
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
    return replace(kept, whole=plan.whole + tuple(sorted(names - set(plan.whole))), slopes=None, readout=None)
