"""What noise in a layer does to the numbers behind it: activations that are smoothed, and layers that are integrated.

A noisy layer computes a + s ξ, and an activation φ follows it. Given everything before, φ(a + s ξ) has the mean
φ̃(a, s); its *innovation* φ(a + s ξ) − φ̃(a, s) has the mean 0, whatever φ is, and so has s ξ itself if no elementwise
activation follows. Modules in between may multiply every unit by a number and add one, as batch normalisation does:
with α ⊙ x + β in between, φ gets the mean α a + β and the standard deviation |α| s. Innovations are the control
variates of `nntk_dist.estimators.layer_noise.activation_gradients`. A layer behind whose activation f is affine needs
no noise: its noise is integrated exactly, E f = f(φ̃).

`find_innovations` finds both on a few examples; nothing is differentiated here.

Axes: n examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.layers.hooks import AfterHook, hooked
from nntk_dist.layers.noise_plan import NoisePlan
from nntk_dist.models.evaluation import in_float64, outputs
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream
from nntk_dist.smoothing import Smoothing, find_smoothing

_EXAMPLES = 8
_STEPS = (1.0, -2.0, 50.0)  # relative to the numbers behind an activation, along which f must be affine
_AGREEMENT = 1e-9
_PROBE = 1024.0  # large, so that β is lost in rounding


@dataclass(frozen=True)
class Innovation:
    """What follows a noisy layer.

    Attributes:
        module: the path of the layer.
        activation: the path of the elementwise activation that gets its output; None if none does.
        integrated: whether f is affine in the activation's output, so that the layer needs no noise.
        affine: the paths of the modules in between, each of which computes α ⊙ x + β with constant α and β.
    """

    module: str
    activation: str | None = None
    integrated: bool = False
    affine: tuple[str, ...] = ()


def factor_of(module: nn.Module, like: Float[Tensor, "n ..."]) -> Float[Tensor, "1 ..."]:
    """Return α of a module that computes α ⊙ x + β, with its present parameters.

    Args:
        module: the module; its hooks are not called.
        like: what it may get.
    """
    with torch.no_grad():
        probe = torch.full_like(like[:1], _PROBE)
        return (module.forward(probe) - module.forward(-probe)) / (2.0 * _PROBE)


def smoothings_of(model: nn.Module, innovations: tuple[Innovation, ...]) -> dict[str, Smoothing]:
    """Return the smoothing of every activation that follows a noisy layer, by the path of the layer."""
    found, searched = dict[str, Smoothing](), _Searched()
    for each in innovations:
        if each.activation is not None:
            smoothing = searched.smoothing(model.get_submodule(each.activation))
            assert smoothing is not None
            found[each.module] = smoothing
    return found


class _Searched:
    """Modules that were tried: many layers have activations that are alike, and are searched for once."""

    def __init__(self) -> None:
        self._found: list[tuple[nn.Module, Smoothing | None]] = []

    def smoothing(self, module: nn.Module) -> Smoothing | None:
        """The smoothing of a module; None if it has none."""
        for other, found in self._found:
            if _are_alike(module, other):
                return found
        found = find_smoothing(module)
        self._found.append((module, found))
        return found

    def is_bent(self, model: nn.Module, each: Innovation) -> bool:
        """Whether an activation is an elementwise function that can be smoothed, and not a line."""
        assert each.activation is not None
        found = self.smoothing(model.get_submodule(each.activation))
        return found is not None and not found.is_line


def _are_alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules are of one class, without parts, and have the same settings and tensors."""
    if first is second:
        return True
    if type(first) is not type(second) or list(first.children()) or first._forward_hooks or second._forward_hooks:
        return False
    settings, others = ({k: v for k, v in vars(module).items() if k[0] != "_"} for module in (first, second))
    tensors, other_tensors = (dict(module.state_dict()) for module in (first, second))
    return (
        all(isinstance(value, bool | int | float | str | tuple | None) for value in settings.values())
        and settings == others
        and tensors.keys() == other_tensors.keys()
        and all(torch.equal(value, other_tensors[name]) for name, value in tensors.items())
    )


def find_innovations(model: nn.Module, plan: NoisePlan, x: Tensor) -> tuple[Innovation, ...]:
    """Find what follows the noisy layers of a prepared model, on up to eight examples, in float64.

    Args:
        model: the model.
        plan: which layers have noise.
        x: examples.
    """
    exact, x = in_float64(model, x[:_EXAMPLES])
    layers = [each.module for each in plan.noisy]
    followers, found, searched = _followers(exact, layers, x), [], _Searched()
    for layer in layers:
        each = next((each for each in followers.get(layer, ()) if searched.is_bent(exact, each)), None)
        if each is None:
            found.append(Innovation(layer))
        else:
            found.append(replace(each, integrated=_is_affine_behind(exact, each, x)))
    return tuple(found)


def _followers(model: nn.Module, layers: list[str], x: Tensor) -> dict[str, list[Innovation]]:
    """The modules that get the outputs of some layers, if need be through affine ones; the innermost come first."""
    outs: list[tuple[Tensor, Innovation]] = []  # outputs of layers, and of affine modules behind them
    found: dict[str, list[Innovation]] = {}

    def keep(layer: str) -> AfterHook:
        def after(h: Tensor, out: Tensor) -> Tensor:
            outs.append((out.clone(), Innovation(layer)))  # no other module made this tensor
            return outs[-1][0]

        return after

    def see(path: str, module: nn.Module) -> AfterHook:
        def after(h: object, out: object) -> None:
            own = next((each for tensor, each in outs if tensor is h), None)
            if own is None or not isinstance(h, Tensor) or not isinstance(out, Tensor) or out.shape != h.shape:
                return
            if any(tensor is out for tensor, _ in outs):
                return
            if _is_affine(module, h):
                outs.append((out, replace(own, affine=(*own.affine, path))))
            else:
                found.setdefault(own.module, []).append(replace(own, activation=path))

        return after

    others = {path: see(path, module) for path, module in model.named_modules() if path and path not in layers}
    with torch.no_grad(), hooked(model, after={**{layer: keep(layer) for layer in layers}, **others}):
        outputs(model, x)
    return found


def _is_affine(module: nn.Module, h: Tensor) -> bool:
    """Whether a module computes α ⊙ x + β with numbers that depend on nothing, the same for all rows."""
    try:
        factor, shift = factor_of(module, h), module.forward(torch.zeros_like(h[:1]))
        for values in (h, -3.0 * h.flip(0), h[-1:] - 1.0):
            expected, found = factor * values + shift, module.forward(values.clone())
            size = float((factor * values).abs().max() + shift.abs().max())
            if found.shape != values.shape or float((found - expected).abs().max()) > _AGREEMENT * size:
                return False
    except Exception:  # a module's code may raise anything
        return False
    return bool(torch.isfinite(factor).all()) and bool(torch.isfinite(shift).all())


def _is_affine_behind(model: nn.Module, each: Innovation, x: Tensor) -> bool:
    """Whether f is an affine function of what the activation makes of the layer's output, and of nothing else of it."""
    made, base = _outputs_moved(model, each, x)
    size = float(base.abs().max()) + 1.0
    for trial in range(2):
        group = torch.tensor([trial], dtype=torch.int64, device=x.device)
        move = normal(3, Stream.PROBE, group, 0, made.numel())[0].reshape(made.shape)
        unit = _outputs_moved(model, each, x, move)[1] - base
        for step in _STEPS:
            change = _outputs_moved(model, each, x, step * move)[1] - base
            if float((change - step * unit).abs().max()) > _AGREEMENT * abs(step) * (size + float(unit.abs().max())):
                return False
        # with the activation's output held, the layer must have no other way to f
        held = _outputs_moved(model, each, x, before=size * move, held=made)[1]
        if float((held - base).abs().max()) > _AGREEMENT * size:
            return False
    return True


def _outputs_moved(
    model: nn.Module,
    each: Innovation,
    x: Tensor,
    move: Tensor | None = None,
    *,
    before: Tensor | None = None,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The activation's output, and f: with `move` added to the former, with `before` added to the layer's, or held."""
    current: list[Tensor] = []
    made: list[Tensor] = []

    def keep(h: Tensor, out: Tensor) -> Tensor:
        current[:] = [out.clone() if before is None else out + before]
        return current[0]

    def follow(h: Tensor, out: Tensor) -> None:
        if current and h is current[0]:
            current[0] = out

    def add(h: Tensor, out: Tensor) -> Tensor | None:
        if not current or h is not current[0]:
            return None
        made.append(out)
        if held is not None:
            return held
        return out if move is None else out + move

    assert each.activation is not None
    hooks: Mapping[str, AfterHook] = {each.module: keep, **dict.fromkeys(each.affine, follow), each.activation: add}
    with torch.no_grad(), hooked(model, after=hooks):
        values = outputs(model, x)
    return made[0], values
