"""The trial that finds the layers of a model that can have noise in their pre-activations, and checks them.

Every selected parameter goes one of three ways: `noisy` (a Linear or Conv2d called once, whose vectors are fewer than
their length), `readout` (a Linear whose output is the model's output: its gradient is h̃, without noise), or
`weight_space` (everything else: scales, embeddings, shared and repeatedly called layers). The checks compare replaced
weights with shifted pre-activations in float64, which also works for networks with jumps, whose gradients vanish.

Axes: n examples, t positions, i inputs of a layer, u units, c outputs.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from nntk_dist.errors import Unavailable
from nntk_dist.layers.hooks import AfterHook, hooked
from nntk_dist.layers.noise import NoiseSite, as_output, layer_vectors, shifted_outputs
from nntk_dist.layers.recording import Call
from nntk_dist.layers.rules import rule_for
from nntk_dist.layers.sites import Site
from nntk_dist.models.evaluation import in_float64, outputs
from nntk_dist.models.noise import agreement, fixed_noise
from nntk_dist.models.parameters import ParameterSpace, aliases
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import Stream

_EXAMPLES = 8
_TRIALS = 2
_AGREEMENT = 1e-8  # relative, float64: far above rounding, far below any wrong formula
# Shifts of the output, relative to its size, over which a readout must be the output itself.
_SHIFT_SIZES = (1e-2, 1.0, 1e2)


@dataclass(frozen=True)
class NoisePlan:
    """How the gradient of every selected parameter is made; each parameter belongs to exactly one of the three."""

    noisy: tuple[NoiseSite, ...]
    readout: NoiseSite | None
    weight_space: tuple[str, ...]

    def only(self, names: Collection[str]) -> "NoisePlan":
        """Return the plan of these parameters alone."""

        def holds(each: NoiseSite) -> bool:
            return any(name in names for _, name in each.site.parameters)

        readout = self.readout if self.readout is None or not holds(self.readout) else self.readout.only(names)
        return NoisePlan(
            tuple(each.only(names) for each in self.noisy if holds(each)),
            readout if readout is not None and holds(readout) else None,
            tuple(name for name in self.weight_space if name in names),
        )

    def num_parameters(self, space: ParameterSpace) -> tuple[int, int, int]:
        """Return the numbers of parameters that go each way: noisy, readout, weight space."""
        sizes = dict(zip(space.names, space.sizes, strict=True))
        noisy = sum(sizes[name] for each in self.noisy for _, name in each.site.parameters)
        readout = 0 if self.readout is None else sum(sizes[name] for _, name in self.readout.site.parameters)
        return noisy, readout, sum(sizes[name] for name in self.weight_space)


def plan_noise(model: nn.Module, space: ParameterSpace, x: Tensor) -> NoisePlan:
    """Find the noise plan of a prepared model, and check it in float64 on up to eight examples.

    Raises:
        Unavailable: a layer's output does not follow its parameters as W h̃ does (a weight used elsewhere too, a hook
            that changes the output); the message names the module. Or no parameter lies in a layer that can have noise.
    """
    exact, trial = in_float64(model, torch.cat([x, x]) if len(x) == 1 else x[:_EXAMPLES])
    candidates = _candidates(exact, space, trial)
    readout = next((each for each in candidates if _is_readout(exact, each, trial)), None)
    for each in candidates:
        _check(exact, space, each.site, trial)
    noisy = tuple(each for each in candidates if each is not readout)
    covered = {name for each in candidates for _, name in each.site.parameters}
    if not covered:
        raise Unavailable(
            f"estimator is 'activation', but none of the selected parameters ('{space.names[0]}' and so on) lies in a "
            "Linear layer or convolution that is called once with fewer vectors than their length"
        )
    return NoisePlan(noisy, readout, tuple(name for name in space.names if name not in covered))


def _calls(model: nn.Module, paths: tuple[str, ...], x: Tensor) -> dict[str, list[Call]]:
    """Every call of some modules in a pass at θ."""
    calls: dict[str, list[Call]] = {path: [] for path in paths}

    def keep(path: str) -> AfterHook:
        return lambda h, out: calls[path].append(Call(h.clone(), out.clone()))

    with hooked(model, after={path: keep(path) for path in paths}), torch.no_grad():
        outputs(model, x)
    return calls


def _candidates(model: nn.Module, space: ParameterSpace, x: Tensor) -> tuple[NoiseSite, ...]:
    """Plain Linear and Conv2d modules with unshared parameters, called once, with few enough vectors an example."""
    groups = aliases(model)
    sites = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or rule_for(module) is None:
            continue
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            continue
        names = [(a, f"{path}.{a}" if path else a) for a, _ in module.named_parameters(recurse=False)]
        selected = tuple((attribute, name) for attribute, name in names if name in space.names)
        if selected and all(len(groups[name]) == 1 for _, name in selected):
            sites.append(Site(path, selected))
    paths = tuple(site.module for site in sites)
    calls, turned = _calls(model, paths, x), _calls(model, paths, x[1:].flip(0))
    candidates = []
    for site in sites:
        both = calls[site.module], turned[site.module]
        if [len(each) for each in both] != [1, 1] or not _holds_rows(model, both[0][0], both[1][0], len(x)):
            continue
        vectors = layer_vectors(model.get_submodule(site.module), site, both[0][0].h)
        positions, width = vectors.shape[1:]
        units = both[0][0].out.numel() // (len(x) * positions)
        if positions == 1 or positions < width:
            candidates.append(NoiseSite(site, positions, width, units))
    return tuple(candidates)


def _holds_rows(model: nn.Module, call: Call, turned: Call, num_examples: int) -> bool:
    """Whether the leading axis of what goes in and comes out is the examples: turning them round turns it round."""
    for values, others in ((call.h, turned.h), (call.out, turned.out)):
        if values.ndim < 2 or len(values) != num_examples or others.shape != (num_examples - 1, *values.shape[1:]):
            return False
        if not _agree(model, others.flip(0), values[1:]):
            return False
    return True


def _agree(model: nn.Module, values: Tensor, expected: Tensor) -> bool:
    tolerance = agreement(model, _AGREEMENT) * max(float(expected.abs().max()), 1e-300)
    return bool(torch.isfinite(values).all()) and float((values - expected).abs().max()) <= tolerance


def _normals(trial: int, shape: torch.Size | tuple[int, ...], device: torch.device) -> Float64[Tensor, "..."]:
    group = torch.tensor([trial], dtype=torch.int64, device=device)
    return normal(2, Stream.PROBE, group, 0, math.prod(shape))[0].reshape(shape)


def _is_readout(model: nn.Module, candidate: NoiseSite, x: Tensor) -> bool:
    """Whether a change of the layer's output, large or small, changes the model's output by the same amount."""
    module, path = model.get_submodule(candidate.module), candidate.module
    with torch.no_grad():
        base = outputs(model, x)
    if not isinstance(module, nn.Linear) or candidate.rank > 1 or base.shape[1] != candidate.units:
        return False
    size = max(float(base.abs().max()), 1e-3)
    for trial, relative in enumerate(_SHIFT_SIZES):
        added = relative * size * _normals(trial, base.shape, x.device)

        def shift(h: Tensor, out: Tensor, added: Tensor = added) -> Tensor:
            return added.reshape(out.shape)

        with fixed_noise(model, group=trial), torch.no_grad():  # each time another function of a model with noise
            shifted, plain = shifted_outputs(model, x, {}, {path: shift}), outputs(model, x)
        if not _agree(model, shifted, plain + added):
            return False
    return True


def _check(model: nn.Module, space: ParameterSpace, site: Site, x: Tensor) -> None:
    """Raise Unavailable, naming the module unless moving its parameters shifts its output by Z h̃ and does nothing
    else.
    """
    module, base = model.get_submodule(site.module), space.values(model)
    for trial in range(_TRIALS):
        moves = {}
        for index, (attribute, name) in enumerate(site.parameters):
            size = float(base[name].square().mean().sqrt()) or 1.0  # large enough to flip signs behind the layer
            moves[attribute] = size * _normals(10 * trial + index, base[name].shape, x.device)
        matrix = torch.cat([part.reshape(len(part), -1) for part in moves.values()], dim=1)

        def shift(h: Tensor, out: Tensor, matrix: Tensor = matrix) -> Tensor:
            return as_output(module, layer_vectors(module, site, h) @ matrix.T, out)

        replaced: Mapping[str, Tensor] = {name: base[name] + moves[attribute] for attribute, name in site.parameters}
        with torch.no_grad():
            expected = outputs(model, x, replaced)
        if not _agree(model, shifted_outputs(model, x, {}, {site.module: shift}), expected):
            raise Unavailable(
                f"estimator is 'activation', but the output does not follow the parameters of module '{site.module}' "
                "as noise in its pre-activations would (is its weight used elsewhere too, or its output changed by a "
                "hook?); leave its parameters out"
            )
