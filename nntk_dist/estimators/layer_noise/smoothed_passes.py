"""Passes with noise in layers, what their activations have in common with their means, and pilot passes for Jacobians.

A noisy layer k computes a_k + s_k ξ with s_k = σ|h̃_k|; an activation behind it makes h_k of that, with the conditional
mean φ̃(a_k, s_k) (`nntk_dist.smoothing`). In a layer that is integrated there is no noise, and φ̃(a_k, s_k) takes the
place of h_k. Pilot passes have noise of their own stream. Behind every h_k they are differentiated with φ̃' in place of
φ', which jumps do not have; the means over the pilot draws are the Jacobians J_k ≈ ∂f/∂h_k of an example.

Axes: n examples, s draws, c outputs, t positions, k basis vectors, i inputs and u units of a layer.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.estimators.layer_noise.noisy_passes import NoisyDraws
from nntk_dist.layers.hooks import AfterHook, hooked
from nntk_dist.layers.innovations import Innovation, factor_of, smoothings_of
from nntk_dist.layers.noise import NoiseSite, as_output, check_called_once, layer_vectors, span_basis
from nntk_dist.layers.recording import products_along
from nntk_dist.models.evaluation import outputs
from nntk_dist.smoothing import Smoothing


@dataclass
class LayerState:
    """One noisy layer in one pass: draws along the rows, (s·n, …).

    Attributes:
        vectors: H̃.
        basis: q D⁻¹; None if the layer is integrated.
        lengths: |h̃ D| of every vector.
        mean: a.
        noisy: a + s ξ, as the next module gets it.
        slope: the derivative of φ̃ in a, or None for 1; with affine maps in between, α φ̃'(α a + β, |α| s).
        innovation: h − φ̃, or s ξ; None if the layer is integrated.
        passed_on: h, or a + s ξ; None if the layer is integrated.
        anchor: the tensor behind which f is differentiated.
    """

    vectors: Float[Tensor, "sn t i"]
    basis: Float[Tensor, "sn k i"] | None
    lengths: Float[Tensor, "sn t 1"]
    mean: Tensor
    noisy: Tensor
    slope: Tensor | None = None
    innovation: Tensor | None = None
    passed_on: Tensor | None = None
    anchor: Tensor | None = None


@dataclass
class SmoothedPass:
    """What one pass leaves behind: f, the state of every noisy layer, h̃ of the readout."""

    outputs: Float[Tensor, "sn c"]
    layers: dict[str, LayerState] = field(default_factory=dict)
    readout: Float[Tensor, "sn i"] | None = None


@dataclass(frozen=True)
class SmoothedDraws:
    """Passes of a plan with noise.

    Attributes:
        draws: the noise.
        innovations: what follows the noisy layers.
    """

    draws: NoisyDraws
    innovations: tuple[Innovation, ...]

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.draws.evaluator.model

    @cached_property
    def smoothings(self) -> dict[str, Smoothing]:
        """The smoothing of the activation behind a layer, by the layer's path."""
        return smoothings_of(self.model, self.innovations)

    def evaluate(
        self,
        x: Tensor,
        noise: Mapping[str, Float[Tensor, "n s k u"]],
        sigma: Float[Tensor, " s"],
        parameters: Mapping[str, Tensor] | None = None,
        *,
        differentiable: bool = False,
    ) -> SmoothedPass:
        """Run one forward pass, draw by draw along the rows of its batch."""
        return _Evaluation(self, x, noise, sigma, differentiable).run(parameters or {})

    def evaluate_each(
        self,
        x: Tensor,
        noise: Mapping[str, Float[Tensor, "n s k u"]],
        sigma: Float[Tensor, " s"],
        parameters: Sequence[Mapping[str, Tensor]],
    ) -> SmoothedPass:
        """Run one forward pass for each draw, each at parameters of its own, and join them."""
        passes = [
            self.evaluate(x, {path: part[:, s : s + 1] for path, part in noise.items()}, sigma[s : s + 1], moved)
            for s, moved in enumerate(parameters)
        ]
        layers = {}
        for name in passes[0].layers:
            each = [passed.layers[name] for passed in passes]
            layers[name] = LayerState(
                *(_joined([getattr(one, part.name) for one in each]) for part in fields(LayerState))
            )
        readouts = [passed.readout for passed in passes]
        return SmoothedPass(torch.cat([passed.outputs for passed in passes]), layers, _joined(readouts))

    def jacobians(self, passed: SmoothedPass, num_examples: int) -> dict[str, Float[Tensor, "n c t u"]]:
        """Return ∂f/∂h of every layer, the mean over the draws of a differentiable pass."""
        values = passed.outputs
        names = list(passed.layers)
        anchors = [passed.layers[name].anchor for name in names]
        present = [anchor for anchor in anchors if anchor is not None]
        one_hot = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
        parts = iter(products_along(values, present, one_hot[:, None].expand(-1, len(values), -1)))
        result = {}
        for name, anchor in zip(names, anchors, strict=True):
            assert anchor is not None  # every noisy layer has one
            part = next(parts)
            part = anchor.new_zeros(values.shape[1], *anchor.shape) if part is None else part
            mean = part.detach().unflatten(1, (-1, num_examples)).mean(1)
            rows = self.by_position(name, mean.transpose(0, 1).flatten(0, 1))
            result[name] = rows.unflatten(0, (num_examples, -1))
        return result

    def by_position(self, layer: str, values: Tensor) -> Float[Tensor, "r t u"]:
        """Bring numbers of the shape of a layer's output into rows, positions and units."""
        if isinstance(self.model.get_submodule(layer), nn.Conv2d):
            return values.flatten(2).transpose(1, 2)
        return values.reshape(len(values), -1, values.shape[-1])


@dataclass
class _Arrival:
    """How a layer's output goes on through affine modules: what the next module gets, and α a + β and α."""

    noisy: Tensor
    mean: Tensor
    factor: Tensor | None = None


class _Evaluation:
    """One pass: hooks add noise to layers, and replace what follows them."""

    def __init__(
        self,
        own: SmoothedDraws,
        x: Tensor,
        noise: Mapping[str, Float[Tensor, "n s k u"]],
        sigma: Float[Tensor, " s"],
        differentiable: bool,
    ) -> None:
        self.own, self.x, self.noise, self.differentiable = own, x, noise, differentiable
        self.model, self.count, self.smoothings = own.model, len(sigma), own.smoothings
        self.sigma_rows = sigma.repeat_interleave(len(x))[:, None, None]
        self.layers, self.arrivals = dict[str, LayerState](), dict[str, _Arrival]()
        self.calls = Counter[str]()

    def run(self, parameters: Mapping[str, Tensor]) -> SmoothedPass:
        """Run it."""
        plan, readout, hooks = self.own.draws.plan, list[Tensor](), dict[str, AfterHook]()
        innovations = {each.module: each for each in self.own.innovations}
        for site in plan.noisy:
            hooks[site.module] = self._layer(site, innovations[site.module])
        for path in {path for each in self.own.innovations for path in each.affine}:
            hooks[path] = self._affine(path)
        for path in {each.activation for each in self.own.innovations if each.activation is not None}:
            hooks[path] = self._activation(path)
        if plan.readout is not None:
            last, module = plan.readout.site, self.model.get_submodule(plan.readout.module)

            def keep(h: Tensor, out: Tensor) -> None:
                self.calls[last.module] += 1
                readout.append(layer_vectors(module, last, h.detach())[:, 0])

            hooks[last.module] = keep
        rows = self.x.repeat(self.count, *[1] * (self.x.ndim - 1))
        with hooked(self.model, after=hooks), torch.set_grad_enabled(self.differentiable):
            values = outputs(self.model, rows, parameters)
        called_once = [*innovations, *(() if plan.readout is None else (plan.readout.module,))]
        check_called_once(self.calls, called_once)
        return SmoothedPass(values, self.layers, readout[0] if readout else None)

    def _layer(self, each: NoiseSite, innovation: Innovation) -> AfterHook:
        """A layer, to whose output noise is added unless it is integrated."""
        module, scale = self.model.get_submodule(each.module), self.own.draws.layer_scale(each, self.x.device)
        normals = self.noise[each.module].transpose(0, 1).flatten(0, 1)

        def noisy(h: Tensor, out: Tensor) -> LayerState:
            vectors = layer_vectors(module, each.site, h.detach())
            lengths = torch.linalg.vector_norm(vectors * scale, dim=2, keepdim=True)
            if innovation.integrated:
                return LayerState(vectors, None, lengths, out, out.clone())
            basis, coordinates = span_basis(vectors * scale)
            added = as_output(module, self.sigma_rows * (coordinates @ normals), out)
            state = LayerState(vectors, basis / scale, lengths, out, out + added)
            if innovation.activation is None:
                state.innovation, state.passed_on = added, state.noisy.detach()
                if self.differentiable:
                    state.noisy = state.anchor = _leaf(state.noisy)
            return state

        def after(h: Tensor, out: Tensor) -> Tensor:
            self.calls[each.module] += 1
            state = noisy(h, out)
            self.layers[each.module] = state
            self.arrivals[each.module] = _Arrival(state.noisy, out.detach())
            return state.noisy

        return after

    def _affine(self, path: str) -> AfterHook:
        """A module that computes α ⊙ x + β behind a layer, with the parameters of this pass."""
        names = [each.module for each in self.own.innovations if path in each.affine]
        module = self.model.get_submodule(path)

        def after(h: Tensor, out: Tensor) -> None:
            for name in names:
                arrival = self.arrivals.get(name)
                if arrival is None or h is not arrival.noisy:
                    continue
                own = factor_of(module, arrival.mean)
                factor = own if arrival.factor is None else arrival.factor * own
                with torch.no_grad():
                    self.arrivals[name] = _Arrival(out, module.forward(arrival.mean), factor)

        return after

    def _activation(self, path: str) -> AfterHook:
        """An activation behind a layer."""
        names = [each.module for each in self.own.innovations if each.activation == path]

        def after(h: Tensor, out: Tensor) -> Tensor | None:
            for name in names:
                if name in self.arrivals and h is self.arrivals[name].noisy:
                    return self._activated(name, self.layers[name], self.arrivals[name], out)
            return None

        return after

    def _activated(self, name: str, state: LayerState, arrival: _Arrival, out: Tensor) -> Tensor:
        """Note slope and innovation of an activation, and return what it passes on."""
        module = self.model.get_submodule(name)
        spread = as_output(module, (self.sigma_rows * state.lengths).expand(-1, -1, _units(module, state)), out)
        if arrival.factor is None:
            smooth, state.slope = self.smoothings[name].values(arrival.mean, spread)
        else:
            smooth, slope = self.smoothings[name].values(arrival.mean, arrival.factor.abs() * spread)
            state.slope = arrival.factor * slope
        if state.basis is None:
            out = smooth
        else:
            state.passed_on = out.detach()
            state.innovation = state.passed_on - smooth
        if not self.differentiable:
            return out
        state.anchor = _leaf(out.detach() + state.slope * (state.mean - state.mean.detach()))
        return state.anchor


def by_example(values: Float[Tensor, "sn ..."], num_examples: int) -> Float[Tensor, "n s ..."]:
    """Return rows draw by draw as an axis of examples and one of draws."""
    return values.unflatten(0, (-1, num_examples)).transpose(0, 1)


def _units(module: nn.Module, state: LayerState) -> int:
    return state.mean.shape[1] if isinstance(module, nn.Conv2d) else state.mean.shape[-1]


def _joined(parts: Sequence[Tensor | None]) -> Any:
    """Tensors of several passes, one after the other; None if they are None."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _leaf(values: Tensor) -> Tensor:
    """The same numbers as a tensor behind which f can be differentiated.

    It is no leaf of the graph: torch's counter of operations cannot follow one that a module returns.
    """
    return values if values.requires_grad else values.requires_grad_().view_as(values)
