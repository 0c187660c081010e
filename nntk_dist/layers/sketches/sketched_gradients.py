"""The sketch of a network's gradient, layer by layer, from one recorded pass.

If a layer's gradient is Σ_t δ_t ⊗ h_t, its two sides are projected apart; its bias, if no other layer shares it, is one
more input. The layer before the readout is sketched once for all outputs (`nntk_dist.layers.penultimate`). Shared
parameters are summed over their uses. Sketches are defined in `nntk_dist.layers.sketches.sketch`.

Axes: n examples, c outputs, o/i units out/in, k columns, m = k/2 complex columns, e sketches (1 if joint, else c).
"""

from collections import Counter
from collections.abc import Mapping

from jaxtyping import Complex, Float
from torch import Tensor, nn

from nntk_dist.layers.per_example import whole_gradients
from nntk_dist.layers.recording import Call, Pass
from nntk_dist.layers.rules import rule_for, token_sides
from nntk_dist.layers.sites import Site, SitePlan
from nntk_dist.layers.sketches.sketch import Projector


def sketched_gradients(model: nn.Module, plan: SitePlan, projector: Projector, passed: Pass) -> Float[Tensor, "n *c k"]:
    """Sketch the gradient of all parameters of a plan without outer sites."""
    uses = Counter(name for site in plan.dense for _, name in site.parameters)
    like = next(iter(passed.parameters.values()))
    total = projector.start(like.new_empty(len(passed.x), len(passed.columns)))
    for site in plan.dense:
        if (
            site.module == passed.penultimate
            and projector.sketch.joint
            and _add_penultimate_(total, site, projector, passed, uses)
        ):
            continue
        for call, delta in zip(passed.recording.calls[site.module], passed.deltas_of(site.module), strict=True):
            _add_site_(total, model.get_submodule(site.module), site, projector, passed, call, delta, uses)
    if plan.whole:
        found = whole_gradients(model, plan, passed.x, passed.parameters, passed.columns, passed.directions)
        for rows, gradients in found:
            for name, gradient in gradients.items():
                projector.add_gradient_(total[rows], name, gradient)
    return projector.finished(total)


def _add_penultimate_(
    total: Complex[Tensor, "n e m"], site: Site, projector: Projector, passed: Pass, uses: Mapping[str, int]
) -> bool:
    """Add the layer before the readout for all outputs at once; False if its parameters do not allow it."""
    names = dict(site.parameters)
    weight, bias = names.get("weight"), names.get("bias")
    if weight is None or (bias is not None and uses[bias] > 1):
        return False
    assert passed.derivatives is not None
    assert passed.weight is not None
    (call,) = passed.recording.calls[site.module]
    h = call.h.reshape(len(call.h), -1)
    projector.add_derivatives_(total, weight, passed.derivatives, passed.weight, h, bias)
    return True


def _add_site_(
    total: Complex[Tensor, "n e m"],
    module: nn.Module,
    site: Site,
    projector: Projector,
    passed: Pass,
    call: Call,
    delta: Tensor,
    uses: Mapping[str, int],
) -> None:
    """Add one call of one module."""
    names, h = dict(site.parameters), call.h
    rule = rule_for(module)
    assert rule is not None
    if rule.sides is not None:
        weight, bias = names.get("weight"), names.get("bias")
        joined = bias if weight is not None and bias is not None and uses[bias] == 1 else None
        if weight is not None:
            projector.add_factors_(total, weight, *rule.sides(module, h, delta), joined)
        if bias is not None and joined is None:
            projector.add_gradient_(total, bias, rule.sides(module, h, delta)[0].sum(2))
    elif isinstance(module, nn.Embedding):
        tokens, deltas = token_sides(module, h, delta)
        projector.add_tokens_(total, names["weight"], deltas, tokens, module.num_embeddings)
    else:
        gradients = rule.gradients(module, passed.parameters, h, delta)
        for attribute, name in site.parameters:
            projector.add_gradient_(total, name, gradients[attribute])
