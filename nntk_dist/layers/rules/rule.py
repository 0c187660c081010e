"""What a layer rule is, and which one covers a module.

A rule says what a layer's parameters contribute to the gradient of one example, from the layer's input h and its output
gradient δ. It knows nothing of other layers, of draws or of kernels.

Three ways to bring a rule:

* in this project: a file in `nntk_dist.layers.rules` and a line in `RULES`;
* for your own module class: a class attribute `nntk_rule = LayerRule(...)`;
* for a module class of another package: an entry point of the group `nntk_dist.layer_rules` that names a `LayerRule`.

No rule is trusted: `nntk_dist.layers.site_trial` compares each with automatic differentiation before it is used, and
differentiates a module as a whole if it has no rule or a wrong one.

Axes: n examples, c outputs of the model, o/i units out/in of the layer, t positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn

from nntk_dist.registration.registry import Registry

# (module, its parameters at this draw, h of shape (n, ...), δ of shape (n, c, ...)) -> attribute: (n, c, *shape)
GradientRule = Callable[[nn.Module, Mapping[str, Tensor], Tensor, Tensor], dict[str, Tensor]]
# (module, h, δ) -> δ as (n, c, t, o) and h as (n, t, i)
Sides = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayerRule:
    """The per-example gradients of one kind of layer.

    Args:
        module_class: the class that the rule is for. A subclass counts only while it keeps the class's `forward`.
        gradients: `gradients(module, parameters, h, delta)` for one call of the module, with h of shape (n, ...) and δ
            of shape (n, c, ...); returns for each parameter attribute its gradients, (n, c, *shape).
        covers: whether the rule holds for a module's settings.
        sides: if the gradients of `weight` and `bias` are Σ_t δ_t ⊗ h_t and Σ_t δ_t: δ and h in that form. Sketches
            then never form the gradient.

    Example:
        >>> import torch
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> Scale.nntk_rule = LayerRule(Scale, lambda module, parameters, h, delta: {"weight": delta * h[:, None]})
        >>> rule_for(Scale()) is Scale.nntk_rule
        True
    """

    module_class: type[nn.Module]
    gradients: GradientRule
    covers: Callable[[nn.Module], bool] = lambda module: True
    sides: Sides | None = None

    def applies(self, module: nn.Module) -> bool:
        """Return whether the rule holds for this module."""
        same = isinstance(module, self.module_class) and type(module).forward is self.module_class.forward
        return same and self.covers(module)


RULES = Registry[LayerRule](
    "layer rule",
    "nntk_dist.layer_rules",
    {
        "linear": "nntk_dist.layers.rules.linear:LINEAR",
        "convolution": "nntk_dist.layers.rules.convolution:CONVOLUTION",
        "grouped convolution": "nntk_dist.layers.rules.convolution:GROUPED_CONVOLUTION",
        "layer norm": "nntk_dist.layers.rules.normalisation:LAYER_NORM",
        "group norm": "nntk_dist.layers.rules.normalisation:GROUP_NORM",
        "batch norm 1d": "nntk_dist.layers.rules.normalisation:BATCH_NORM_1D",
        "batch norm 2d": "nntk_dist.layers.rules.normalisation:BATCH_NORM_2D",
        "embedding": "nntk_dist.layers.rules.embedding:EMBEDDING",
        "transposed linear": "nntk_dist.layers.rules.transposed_linear:TRANSPOSED_LINEAR",
    },
)


@cache
def _registered() -> tuple[LayerRule, ...]:
    return tuple(RULES.get(name) for name in RULES)


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule of a module: the one that its class brings, or the first registered one that applies, or None."""
    own = getattr(type(module), "nntk_rule", None)
    candidates = _registered() if own is None else (own,)
    return next((rule for rule in candidates if rule.applies(module)), None)
