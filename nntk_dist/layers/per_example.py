"""Per-example gradients of the parameters of a plan, from one recorded pass.

A site's rule gives them from its input and output gradient; parameters without a rule are differentiated as a whole
under vmap. No draws and no kernels here.

Axes: n examples, m first of them, c outputs, j length of h̃.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from nntk_dist.errors import Unavailable
from nntk_dist.layers.recording import Pass
from nntk_dist.layers.rules import linear_sides, num_positions, rule_for
from nntk_dist.layers.sites import Site, SitePlan
from nntk_dist.models.evaluation import outputs, trying


def write_extended_input(site: Site, h: Tensor, target: Float[Tensor, "m j"]) -> None:
    """Write h̃ of a Linear site's first m examples: (h, 1), or h or 1 if only the weight or the bias is selected."""
    h = h.reshape(len(h), -1)[: len(target)]
    if "weight" in site.attributes:
        target[:, : h.shape[1]] = h
    if "bias" in site.attributes:
        target[:, -1] = 1.0


def dense_gradients(model: nn.Module, plan: SitePlan, passed: Pass) -> dict[str, Float[Tensor, "n c ..."]]:
    """Return the gradients of dense and whole parameters, (n, c, *shape) by name, summed over their uses."""
    like, lead = passed.parameters, (len(passed.x), len(passed.columns))
    # a module that this pass never called has no gradient
    result = {name: like[name].new_zeros(*lead, *like[name].shape) for name in plan.dense_names()}
    add_dense_gradients_(result, model, plan, passed)
    return result


def add_dense_gradients_(
    sums: Mapping[str, Float[Tensor, "m c ..."]], model: nn.Module, plan: SitePlan, passed: Pass
) -> None:
    """Add the gradients of the first m examples to sums by name, in place, never forming an outer product first."""
    for site in plan.dense:
        module, names = model.get_submodule(site.module), dict(site.parameters)
        rule = rule_for(module)
        assert rule is not None
        for call, delta in zip(passed.recording.calls[site.module], passed.deltas[site.module], strict=True):
            if isinstance(module, nn.Linear) and num_positions(tuple(call.h.shape)) == 1:
                delta, h = linear_sides(module, call.h, delta)
                for attribute, name in names.items():
                    part, own = sums[name], delta[: len(sums[name]), :, 0]
                    if attribute == "weight":
                        part.addcmul_(own[..., None], h[: len(part), :, None])
                    else:
                        part += own
                continue
            gradients = rule.gradients(module, passed.parameters, call.h, delta)
            for attribute, name in names.items():
                part = sums[name]
                part += gradients[attribute][: len(part)]
    if plan.whole:
        for name, gradient in whole_gradients(model, plan.whole, passed.x, passed.parameters, passed.columns).items():
            part = sums[name]
            part += gradient[: len(part)]


def whole_gradients(
    model: nn.Module, names: Sequence[str], x: Tensor, parameters: Mapping[str, Tensor], columns: Sequence[int]
) -> dict[str, Float[Tensor, "n c ..."]]:
    """Differentiate the model one example at a time under vmap, by the named parameters.

    Raises: Unavailable if vmap cannot take the model (data-dependent control flow, in-place writes).
    """
    chosen = {name: parameters[name] for name in names}
    selection = torch.tensor(columns, device=x.device)

    def one_example(example: Tensor) -> dict[str, Tensor]:
        def chosen_outputs(part: dict[str, Tensor]) -> Tensor:
            return outputs(model, example[None], {**parameters, **part})[0, selection]

        return torch.func.jacrev(chosen_outputs)(chosen)

    with trying(
        Unavailable,
        f"per-example gradients of {', '.join(names[:3])} need torch.func.vmap, which cannot take this model "
        "({reason}); use estimator: weight, or leave these parameters out by kernel.parameters",
    ):
        return vmap(one_example)(x)
