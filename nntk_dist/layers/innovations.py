"""What noise in a layer does to the numbers behind it: activations that are smoothed, and layers that are integrated.

A noisy layer computes a + s ξ, and an activation φ follows it. Given everything before, φ(a + s ξ) has the mean
φ̃(a, s); its *innovation* φ(a + s ξ) − φ̃(a, s) has the mean 0, whatever φ is, and so has s ξ itself if no elementwise
activation follows. Innovations are the control variates of
`nntk_dist.estimators.layer_noise.activation_gradients`. A layer behind whose activation f is affine needs no noise: its
noise is integrated exactly, E f = f(φ̃).

`find_innovations` finds both on a few examples; nothing is differentiated here.

Axes: n examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class Innovation:
    """What follows a noisy layer.

    Attributes:
        module: the path of the layer.
        activation: the path of the elementwise activation that gets its output; None if none does.
        integrated: whether f is affine in the activation's output, so that the layer needs no noise.
    """

    module: str
    activation: str | None = None
    integrated: bool = False


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

    def is_bent(self, module: nn.Module) -> bool:
        """Whether a module is an elementwise function that can be smoothed, and not a line."""
        found = self.smoothing(module)
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
        smooth = (path for path in followers.get(layer, ()) if searched.is_bent(exact.get_submodule(path)))
        activation = next(smooth, None)
        integrated = activation is not None and _is_affine_behind(exact, layer, activation, x)
        found.append(Innovation(layer, activation, integrated))
    return tuple(found)


def _followers(model: nn.Module, layers: list[str], x: Tensor) -> dict[str, list[str]]:
    """The modules that get the outputs of some layers, by layer; the innermost of several come first."""
    outs: dict[str, Tensor] = {}
    found: dict[str, list[str]] = {}

    def keep(layer: str) -> AfterHook:
        def after(h: Tensor, out: Tensor) -> Tensor:
            outs[layer] = out.clone()  # no other module made this tensor
            return outs[layer]

        return after

    def see(path: str) -> AfterHook:
        def after(h: object, out: object) -> None:
            for layer, own in outs.items():
                if h is own and isinstance(out, Tensor) and out.shape == own.shape:
                    found.setdefault(layer, []).append(path)

        return after

    others = {path: see(path) for path, module in model.named_modules() if path and path not in layers}
    with torch.no_grad(), hooked(model, after={**{layer: keep(layer) for layer in layers}, **others}):
        outputs(model, x)
    return found


def _is_affine_behind(model: nn.Module, layer: str, activation: str, x: Tensor) -> bool:
    """Whether f is an affine function of what the activation makes of the layer's output, and of nothing else of it."""
    shape, base = _outputs_moved(model, layer, activation, x, None)
    size = float(base.abs().max()) + 1.0
    for trial in range(2):
        group = torch.tensor([trial], dtype=torch.int64, device=x.device)
        move = normal(3, Stream.PROBE, group, 0, shape.numel())[0].reshape(shape)
        unit = _outputs_moved(model, layer, activation, x, move)[1] - base
        for step in _STEPS:
            change = _outputs_moved(model, layer, activation, x, step * move)[1] - base
            if float((change - step * unit).abs().max()) > _AGREEMENT * abs(step) * (size + float(unit.abs().max())):
                return False
        # with the activation's output held, the layer must have no other way to f
        held = _outputs_moved(model, layer, activation, x, None, before=size * move)[1]
        if float((held - base).abs().max()) > _AGREEMENT * size:
            return False
    return True


def _outputs_moved(
    model: nn.Module, layer: str, activation: str, x: Tensor, move: Tensor | None, before: Tensor | None = None
) -> tuple[torch.Size, Tensor]:
    """The shape of the activation's output, and f with something added to it.

    `before` is added to the layer's output, and the activation's output is held.
    """
    outs: list[Tensor] = []
    shapes: list[torch.Size] = []
    module = model.get_submodule(activation)

    def keep(h: Tensor, out: Tensor) -> Tensor:
        outs.append(out.clone() if before is None else out + before)
        return outs[-1]

    def add(h: Tensor, out: Tensor) -> Tensor | None:
        if not any(h is own for own in outs):
            return None
        shapes.append(out.shape)
        if before is not None:
            return module.forward(h - before)
        return out if move is None else out + move

    hooks: Mapping[str, AfterHook] = {layer: keep, activation: add}
    with torch.no_grad(), hooked(model, after=hooks):
        values = outputs(model, x)
    return shapes[0], values
