"""Noise in pre-activations instead of weights: what a random weight matrix does to one example.

A layer applies W to the vectors h̃_t of an example (one vector, tokens, or the patches of a convolution), rows of H̃.
Of a Gaussian matrix σΞ added to W the example sees only σ H̃ Ξᵀ, hence only the part of Ξ in the span of its vectors:
with an orthonormal basis q_k of that span, σ H̃ Qᵀ η, η = Q Ξᵀ again standard normal. For one vector this is σ|h̃| ξ.
By Stein's identity the gradient of E f(W + σΞ) is E[(f − constant) Σ_k η_k ⊗ q_k / σ]. No numbers are drawn here.

Axes: n rows, t positions, k basis vectors, i inputs of a layer (the 1 for its bias included), u units.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import Unavailable
from nntk_dist.layers.hooks import AfterHook, hooked
from nntk_dist.layers.rules.convolution import patches
from nntk_dist.layers.sites import Site
from nntk_dist.models.evaluation import outputs

# (input of a layer, its output) -> what is added to the output, or None if the call is only observed
Shift = Callable[[Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class NoiseSite:
    """A layer with separate noise for every example: `rank` vectors q_k of `width` numbers, `units` normals each."""

    site: Site
    rank: int
    width: int
    units: int

    @property
    def module(self) -> str:
        """The path of the layer."""
        return self.site.module

    @property
    def num_noise(self) -> int:
        """Standard normals of one example and draw."""
        return self.rank * self.units

    @property
    def num_parameters(self) -> int:
        """Selected parameters of the layer."""
        return self.width * self.units

    def columns_of(self, names: Collection[str]) -> slice:
        """Return which of the `width` numbers belong to these parameters, a 1 for the bias being the last."""
        weights, kept = self.width - ("bias" in self.site.attributes), dict(self.site.parameters)
        start = 0 if kept.get("weight") in names else weights
        return slice(start, self.width if kept.get("bias") in names else weights)

    def only(self, names: Collection[str]) -> "NoiseSite":
        """Return the same layer with these of its parameters."""
        columns = self.columns_of(names)
        site = replace(self.site, parameters=tuple(pair for pair in self.site.parameters if pair[1] in names))
        return replace(self, site=site, width=columns.stop - columns.start)


def layer_vectors(module: nn.Module, site: Site, h: Tensor) -> Float[Tensor, "n t i"]:
    """Return H̃: the vectors that the selected weight multiplies, each followed by a 1 if the bias is selected."""
    if isinstance(module, nn.Conv2d):
        vectors = patches(module, h).transpose(1, 2)
    else:
        vectors = h.reshape(len(h), -1, h.shape[-1])
    parts = [vectors] if "weight" in site.attributes else []
    if "bias" in site.attributes:
        parts.append(vectors.new_ones(*vectors.shape[:2], 1))
    return torch.cat(parts, dim=2)


def as_output(module: nn.Module, values: Float[Tensor, "n t u"], out: Tensor) -> Tensor:
    """Bring numbers by position and unit into the shape of the layer's output."""
    return (values.transpose(1, 2) if isinstance(module, nn.Conv2d) else values).reshape(out.shape)


def span_basis(vectors: Float[Tensor, "n t i"]) -> tuple[Float[Tensor, "n k i"], Float[Tensor, "n t k"]]:
    """Return Q and L with H̃ = L Q; rows of Q are orthonormal, or 0 if no vector has a part along them (as for h̃ = 0).

    Computed by a QR decomposition, so the span of Q contains the span of H̃ for any rank; only rounding is cut off.
    """
    if vectors.shape[1] == 1:
        norms = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
        return torch.where(norms > 0, vectors / norms, 0.0), norms
    q, r = torch.linalg.qr(vectors.mT)
    largest = r.abs().amax(dim=2)
    rounding = max(vectors.shape[1:]) * torch.finfo(r.dtype).eps
    seen = largest > rounding * largest.amax(dim=1, keepdim=True)
    return torch.where(seen[:, :, None], q.mT, 0.0), r.mT


def check_called_once(calls: Mapping[str, int], paths: Iterable[str]) -> None:
    """Check that a pass called every layer with noise once, as the trial of the model did.

    Raises:
        Unavailable: it called one more often, or never; the message names it.
    """
    for path in paths:
        if (count := calls.get(path, 0)) != 1:
            raise Unavailable(
                f"estimator is 'activation', but module '{path}' is called {count} times for some inputs and once for "
                "others; use estimator: weight, or leave its parameters out"
            )


def shifted_outputs(
    model: nn.Module, x: Tensor, parameters: Mapping[str, Tensor], shifts: Mapping[str, Shift]
) -> Float[Tensor, "n c"]:
    """Return the outputs of f with something added to the outputs of some modules, each called once; no gradients.

    Raises: Unavailable, naming a module that this pass calls more than once, or never.
    """
    calls = dict.fromkeys(shifts, 0)

    def shifted(path: str) -> AfterHook:
        def add(h: Tensor, out: Tensor) -> Tensor:
            calls[path] += 1
            added = shifts[path](h, out)
            return out if added is None else out + added

        return add

    with hooked(model, after={path: shifted(path) for path in shifts}), torch.no_grad():
        values = outputs(model, x, parameters)
    check_called_once(calls, shifts)
    return values
