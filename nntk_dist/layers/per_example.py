"""Per-example gradients of the parameters of a plan, from one recorded pass.

A site's rule gives them from its input and output gradient; parameters without a rule are differentiated as a whole,
under vmap or one example after the other. No draws and no kernels here.

Axes: n examples, m first of them, c outputs, j length of h̃.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from nntk_dist.errors import Unavailable
from nntk_dist.layers.recording import Call, Pass
from nntk_dist.layers.rules import linear_sides, num_positions, rule_for
from nntk_dist.layers.sites import Site, SitePlan
from nntk_dist.models.evaluation import output_index, outputs, trying
from nntk_dist.models.passes import twice_differentiable

_NUMBERS_AT_ONCE = 1 << 22


def write_extended_input(site: Site, h: Tensor, target: Float[Tensor, "m j"]) -> None:
    """Write h̃ of a Linear site's first m examples: (h, 1), or h or 1 if only the weight or the bias is selected."""
    h = h.reshape(len(h), -1)[: len(target)]
    if "weight" in site.attributes:
        target[:, : h.shape[1]] = h
    if "bias" in site.attributes:
        target[:, -1] = 1.0


def site_gradients(
    model: nn.Module, sites: Sequence[Site], passed: Pass
) -> Iterator[tuple[str, Float[Tensor, "n c ..."]]]:
    """Yield the gradients of the sites' parameters by name, call by call; a shared parameter comes several times."""
    for site, call, delta in _calls(sites, passed):
        yield from _gradients_of_call(model.get_submodule(site.module), site, passed, call, delta)


def add_dense_gradients_(
    sums: Mapping[str, Float[Tensor, "m c ..."]], model: nn.Module, plan: SitePlan, passed: Pass
) -> None:
    """Add the gradients of the first m examples to sums by name, in place, never forming an outer product first."""
    for site, call, delta in _calls(plan.dense, passed):
        module, names = model.get_submodule(site.module), dict(site.parameters)
        if isinstance(module, nn.Linear) and num_positions(tuple(call.h.shape)) == 1:
            delta, h = linear_sides(module, call.h, delta)
            for attribute, name in names.items():
                part, own = sums[name], delta[: len(sums[name]), :, 0]
                if attribute == "weight":
                    part.addcmul_(own[..., None], h[: len(part), :, None])
                else:
                    part += own
            continue
        for name, gradient in _gradients_of_call(module, site, passed, call, delta):
            part = sums[name]
            part += gradient[: len(part)]
    if plan.whole:
        count = len(next(iter(sums.values())))
        for rows, gradients in whole_gradients(model, plan, passed.x[:count], passed.parameters, passed.columns):
            for name, gradient in gradients.items():
                sums[name][rows] += gradient


def _calls(sites: Sequence[Site], passed: Pass) -> Iterator[tuple[Site, Call, Tensor]]:
    """Every call of every site with its output gradients."""
    for site in sites:
        for call, delta in zip(passed.recording.calls[site.module], passed.deltas_of(site.module), strict=True):
            yield site, call, delta


def _gradients_of_call(
    module: nn.Module, site: Site, passed: Pass, call: Call, delta: Tensor
) -> Iterator[tuple[str, Float[Tensor, "n c ..."]]]:
    """The gradients of a site's parameters from one call, by name."""
    rule = rule_for(module)
    assert rule is not None
    gradients = rule.gradients(module, passed.parameters, call.h, delta)
    for attribute, name in site.parameters:
        yield name, gradients[attribute]


def whole_gradients(
    model: nn.Module,
    plan: SitePlan,
    x: Tensor,
    parameters: Mapping[str, Tensor],
    columns: Sequence[int],
    directions: Float[Tensor, "c C"] | None = None,
) -> Iterator[tuple[slice, dict[str, Float[Tensor, "m c ..."]]]]:
    """Differentiate the model one example at a time by the whole parameters of a plan; yield some rows at a time.

    Under vmap, several examples at once; if the plan says that vmap cannot take the model, one after the other. A loop
    costs a forward pass for each example and a backward pass for each of its outputs, or of the directions that stand
    in for them. A portion holds 2^22 numbers, or one example.

    Raises: Unavailable if vmap cannot take the model (recurrent layers, control flow that depends on data).
    """
    chosen = {name: parameters[name] for name in plan.whole}
    if plan.whole_in_turn:
        for row in range(len(x)):
            own = _gradients_of_example(model, x[row : row + 1], chosen, parameters, columns, directions)
            yield slice(row, row + 1), own
        return
    selection = torch.tensor(columns, device=x.device)

    def one_example(example: Tensor) -> dict[str, Tensor]:
        def chosen_outputs(part: dict[str, Tensor]) -> Tensor:
            values = outputs(model, example[None], {**parameters, **part})[0]
            return values[selection] if directions is None else directions @ values

        return torch.func.jacrev(chosen_outputs)(chosen)

    numbers = len(columns if directions is None else directions) * sum(values.numel() for values in chosen.values())
    step = max(1, _NUMBERS_AT_ONCE // max(1, numbers))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        with trying(Unavailable, "torch.func.vmap cannot take this model ({reason})"), twice_differentiable():
            part = vmap(one_example)(x[rows])
        yield rows, part


def _gradients_of_example(
    model: nn.Module,
    example: Float[Tensor, "1 ..."],
    chosen: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    columns: Sequence[int],
    directions: Float[Tensor, "c C"] | None,
) -> dict[str, Float[Tensor, "1 c ..."]]:
    """Every output's gradient for a single example, or the gradient along every direction."""
    leaves = {name: value.detach().requires_grad_() for name, value in chosen.items()}
    with torch.enable_grad():
        values = outputs(model, example, {**parameters, **leaves})[0]
        chosen_values = values[output_index(columns)] if directions is None else directions @ values
    if not values.requires_grad:
        return {name: leaf.new_zeros(1, len(chosen_values), *leaf.shape) for name, leaf in leaves.items()}
    rows = [
        torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in chosen_values
    ]
    return {name: torch.stack(own)[None] for name, own in zip(leaves, zip(*rows, strict=True), strict=True)}
