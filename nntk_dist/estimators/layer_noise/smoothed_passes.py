"""Passes with noise in layers, what their activations have in common with their means, and pilot passes for Jacobians.

A noisy layer k computes a_k + s_k ξ with s_k = σ|h̃_k|; an activation behind it makes h_k of that, with the conditional
mean φ̃(a_k, s_k) (`nntk_dist.smoothing`). In a layer that is integrated there is no noise, and φ̃(a_k, s_k) takes the
place of h_k. Pilot passes have noise of their own stream. Behind every h_k they are differentiated with φ̃' in place of
φ', which jumps do not have; the means over the pilot draws are the Jacobians J_k ≈ ∂f/∂h_k of an example.

Axes: n examples, s draws, c outputs, t positions, k basis vectors, i inputs and u units of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.estimators.layer_noise.noisy_passes import NoisyDraws
from nntk_dist.layers.hooks import AfterHook, hooked
from nntk_dist.layers.innovations import Innovation, smoothings_of
from nntk_dist.layers.noise import NoiseSite, as_output, layer_vectors, span_basis
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
        slope: φ̃', or None for 1.
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
        count, plan, smoothings = len(sigma), self.draws.plan, self.smoothings  # found before there are hooks
        sigma_rows = sigma.repeat_interleave(len(x))[:, None, None]
        found, readout = dict[str, LayerState](), list[Tensor]()
        activations: dict[str, AfterHook] = {}
        hooks: dict[str, AfterHook] = {}
        own = {each.module: each for each in self.innovations}

        def layer(each: NoiseSite) -> AfterHook:
            module, scale = self.model.get_submodule(each.module), self.draws.layer_scale(each, x.device)
            normals = noise[each.module].transpose(0, 1).flatten(0, 1)

            def after(h: Tensor, out: Tensor) -> Tensor:
                vectors = layer_vectors(module, each.site, h.detach())
                lengths = torch.linalg.vector_norm(vectors * scale, dim=2, keepdim=True)
                if own[each.module].integrated:
                    found[each.module] = LayerState(vectors, None, lengths, out, out.clone())
                    return found[each.module].noisy
                basis, coordinates = span_basis(vectors * scale)
                added = as_output(module, sigma_rows * (coordinates @ normals), out)
                state = LayerState(vectors, basis / scale, lengths, out, out + added)
                found[each.module] = state
                if own[each.module].activation is None:
                    state.innovation, state.passed_on = added, state.noisy.detach()
                    if differentiable:
                        state.noisy = state.anchor = _leaf(state.noisy)
                return state.noisy

            return after

        def activation(path: str) -> AfterHook:
            layers = [each.module for each in self.innovations if each.activation == path]

            def after(h: Tensor, out: Tensor) -> Tensor | None:
                for name in layers:
                    if name in found and h is found[name].noisy:
                        return self._activated(
                            smoothings[name], name, found[name], out, sigma_rows, differentiable=differentiable
                        )
                return None

            return after

        for each in plan.noisy:
            hooks[each.module] = layer(each)
        for path in {each.activation for each in self.innovations if each.activation is not None}:
            activations[path] = activation(path)
        if plan.readout is not None:
            site, last = plan.readout.site, self.model.get_submodule(plan.readout.module)

            def keep(h: Tensor, out: Tensor) -> None:
                readout.append(layer_vectors(last, site, h.detach())[:, 0])

            hooks[site.module] = keep
        rows = x.repeat(count, *[1] * (x.ndim - 1))
        with hooked(self.model, after={**hooks, **activations}), torch.set_grad_enabled(differentiable):
            values = outputs(self.model, rows, parameters or {})
        return SmoothedPass(values, found, readout[0] if readout else None)

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

    def _activated(
        self,
        smoothing: Smoothing,
        name: str,
        state: LayerState,
        out: Tensor,
        sigma_rows: Tensor,
        *,
        differentiable: bool,
    ) -> Tensor:
        """Note slope and innovation of an activation, and return what it passes on."""
        module = self.model.get_submodule(name)
        spread = as_output(module, (sigma_rows * state.lengths).expand(-1, -1, _units(module, state)), out)
        mean = state.mean.detach()
        smooth, state.slope = smoothing.values(mean, spread)
        if state.basis is None:
            out = smooth
        else:
            state.passed_on = out.detach()
            state.innovation = state.passed_on - smooth
        if not differentiable:
            return out
        state.anchor = _leaf(out.detach() + state.slope * (state.mean - mean))
        return state.anchor

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
    """The same numbers as a tensor behind which f can be differentiated."""
    return values if values.requires_grad else values.requires_grad_()
