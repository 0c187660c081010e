"""An unbiased sketch of gradients: k numbers in place of P, made without ever forming the gradient of a layer.

Column j of the sketch is Σ_p u_pjᵀ G_p v_pj, summed over the parameters p, G_p the gradient of parameter p as a matrix
(its first axis by all others; v_pj = 1 where there are no others) and u, v independent random *complex* vectors with
entries (±1 ± i)/√2. Real and imaginary part are two of the k numbers, all scaled by √(2/k), so that products of
sketches are on average products of gradients: E⟨φ(G), φ(G')⟩ = Σ_p ⟨G_p, G'_p⟩. Where G_p = Σ_t δ_t ⊗ h_t, the
column is Σ_t (u·δ_t)(v·h_t): k·(|δ| + |h|) multiply-adds a position.
Variance of ⟨φ(G), φ(G)⟩, relative to |G|⁴: 6/k where G is one outer product, 2/k where it is none or many; 8/k with
real vectors, which is why they are complex (Wacker, Ohana, Filippone, "Complex-to-real sketches for tensor products",
AISTATS 2023). Projections of both sides to b×b blocks would cost less for a column, but 4(b + 1)/k at the same k.

The probes are a function of (seed, parameter, side, coordinate, column): the same for all rows, draws and processes.
Columns form Q independent groups, from whose scatter `nntk_dist.statistics` tells the sketch's own error. No draws and
no kernels here.

Axes: n examples, c outputs, t positions, o/i units out/in, k columns, m = k/2 complex columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from nntk_dist.capture import Recording, Site, SitePlan, whole_gradients
from nntk_dist.errors import NNTKError
from nntk_dist.layers import factors_for, rule_for
from nntk_dist.philox import Stream, signs

AUTO_COLUMNS = 1024
_MOST_GROUPS = 32
_FEWEST_GROUPS = 8
# Complex columns: with one, intervals of nominal 95 % cover 0.89 where the sketch rules (measured); with four, 0.935.
_FEWEST_IN_A_GROUP = 4
_ELEMENTS_AT_ONCE = 1 << 23
_OUT, _IN = 0, 1  # the two sides of a parameter


def columns_of_sketch(sketch: int | str) -> int:
    """The numbers of a sketch, k.

    Raises: NNTKError unless eight groups get equally many complex columns, and enough that their scatter is nearly
    normal.
    """
    if isinstance(sketch, str):
        return AUTO_COLUMNS
    unit, least = 2 * _FEWEST_GROUPS, 2 * _FEWEST_GROUPS * _FEWEST_IN_A_GROUP
    if sketch < least or sketch % unit:
        nearest = max(least, round(sketch / unit) * unit)
        raise NNTKError(
            f"sketch is {sketch}; allowed: auto, or a multiple of {unit} ({_FEWEST_GROUPS} groups of complex numbers) "
            f"from {least}; the nearest is {nearest}"
        )
    return sketch


def groups_of_columns(num_columns: int, num_blocks: int) -> int:
    """Q: at least 8, and about as many as blocks where that leaves enough columns to each.

    Intervals take Student's t with R − 1 degrees of freedom: with fewer groups than blocks they would be too short
    where the sketch's error rules (nominal 95 % cover 0.91 at the worst, Q = 8 and R = ∞).
    """
    groups = _FEWEST_GROUPS
    while (
        groups < min(num_blocks, _MOST_GROUPS)
        and num_columns % (4 * groups) == 0
        and num_columns >= 4 * groups * _FEWEST_IN_A_GROUP
    ):
        groups *= 2
    return groups


@dataclass(frozen=True)
class Sketch:
    """The probes of every parameter of a space; `names` are all its parameters, whichever of them are sketched."""

    seed: int
    num_columns: int
    num_groups: int
    names: tuple[str, ...]

    def probes(self, name: str, side: int, coordinates: Tensor, dtype: torch.dtype) -> Float[Tensor, "coordinate k"]:
        """√2 u or √2 v of a parameter at some coordinates; real and imaginary parts alternate."""
        number = 2 * self.names.index(name) + side
        return signs(self.seed, Stream.SKETCH, coordinates, self.num_columns, draw=number, dtype=dtype)

    def all_probes(self, name: str, side: int, length: int, like: Tensor) -> Float[Tensor, "coordinate k"]:
        """The probes at every coordinate."""
        return self.probes(name, side, torch.arange(length, device=like.device), like.dtype)

    def of_factors(
        self, name: str, delta: Float[Tensor, "n c t o"], h: Float[Tensor, "n t i"]
    ) -> Float[Tensor, "n c k"]:
        """The sketch of Σ_t δ_t ⊗ h_t, by whichever takes fewer operations: both sides apart, or the sum itself."""
        (n, c, t, o), i = delta.shape, h.shape[2]
        if c * o * i < t * (c * o + i):
            return self.of_gradient(name, torch.einsum("ncto,nti->ncoi", delta, h))
        u, v = self.all_probes(name, _OUT, o, delta), self.all_probes(name, _IN, i, h)
        parts = []
        for columns in self._chunks(n * c * t):
            left, right = _complex(delta @ u[:, columns]), _complex(h @ v[:, columns])
            parts.append((left * right[:, None]).sum(2))
        return self._scaled(parts)

    def of_gradient(self, name: str, gradient: Float[Tensor, "n c ..."]) -> Float[Tensor, "n c k"]:
        """The sketch of a parameter's gradient that is there already."""
        n, c, *shape = gradient.shape
        if len(shape) <= 1:
            flat = gradient.reshape(n, c, -1)
            return flat @ self.all_probes(name, _OUT, flat.shape[2], flat) * self.num_columns**-0.5
        matrix = gradient.flatten(3)
        u, v = (self.all_probes(name, side, matrix.shape[2 + side], matrix) for side in (_OUT, _IN))
        chunks = self._chunks(n * c * matrix.shape[2])
        return self._scaled([(_complex(matrix @ v[:, part]) * _complex(u[:, part])).sum(2) for part in chunks])

    def of_shared(
        self, name: str, weights: Float[Tensor, "n t c"], a: Float[Tensor, "n t o"], b: Float[Tensor, "n t i"]
    ) -> Float[Tensor, "n c k"]:
        """The sketch of Σ_t w_tc a_t ⊗ b_t: outer products that the outputs share but for a number."""
        u, v = self.all_probes(name, _OUT, a.shape[2], a), self.all_probes(name, _IN, b.shape[2], b)
        parts = []
        for columns in self._chunks(a.shape[0] * a.shape[1]):
            products = _complex(a @ u[:, columns]) * _complex(b @ v[:, columns])
            parts.append(weights.mT.to(products.dtype) @ products)
        return self._scaled(parts)

    def of_tokens(
        self, name: str, delta: Float[Tensor, "n c t i"], tokens: Float[Tensor, "n t"]
    ) -> Float[Tensor, "n c k"]:
        """The sketch of an embedding table's gradient: probes of the rows that occur are gathered, no table is made."""
        distinct, position = tokens.unique(return_inverse=True)
        u = self.probes(name, _OUT, distinct, delta.dtype)
        v = self.all_probes(name, _IN, delta.shape[3], delta)
        parts = []
        for columns in self._chunks(delta[..., 0].numel()):
            left = _complex(u[:, columns])[position]
            parts.append((_complex(delta @ v[:, columns]) * left[:, None]).sum(2))
        return self._scaled(parts)

    def _chunks(self, num_vectors: int) -> Iterator[slice]:
        """Columns in portions, so that products of this many vectors stay within 2^23 numbers."""
        step = 2 * max(8, _ELEMENTS_AT_ONCE // (2 * num_vectors))
        for start in range(0, self.num_columns, step):
            yield slice(start, min(start + step, self.num_columns))

    def _scaled(self, parts: Sequence[Complex[Tensor, "n c m"]]) -> Float[Tensor, "n c k"]:
        """√(2/k) u·v of the products of √2 u and √2 v, real and imaginary parts as columns."""
        return torch.view_as_real(torch.cat(list(parts), dim=2)).flatten(2).mul_((2.0 * self.num_columns) ** -0.5)


def _complex(columns: Float[Tensor, "... k"]) -> Complex[Tensor, "... m"]:
    return torch.view_as_complex(columns.unflatten(-1, (-1, 2)))


def sketched_gradients(
    model: nn.Module,
    plan: SitePlan,
    sketch: Sketch,
    recording: Recording,
    deltas: Mapping[str, Sequence[Tensor]],
    x: Tensor,
    parameters: Mapping[str, Tensor],
    columns: Sequence[int],
) -> Float[Tensor, "n c k"]:
    """The sketch of the gradient of all parameters of a plan without outer sites; shared ones are summed over their
    uses.
    """
    first = next(iter(parameters.values()))
    total = torch.zeros(len(x), len(columns), sketch.num_columns, dtype=first.dtype, device=first.device)
    for site in plan.dense:
        for call, delta in zip(recording.calls[site.module], deltas[site.module], strict=True):
            for part in _site_sketches(model.get_submodule(site.module), site, sketch, parameters, call.h, delta):
                total += part
    if plan.whole:
        for name, gradient in whole_gradients(model, plan.whole, x, parameters, columns).items():
            total += sketch.of_gradient(name, gradient)
    return total


def _site_sketches(
    module: nn.Module, site: Site, sketch: Sketch, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor
) -> Iterator[Float[Tensor, "n c k"]]:
    """One call of one module, parameter by parameter."""
    names = dict(site.parameters)
    factors, rule = factors_for(module), rule_for(module)
    assert rule is not None
    if factors is not None:
        delta, h = factors(module, h, delta)
        if "weight" in names:
            yield sketch.of_factors(names["weight"], delta, h)
        if "bias" in names:
            yield sketch.of_gradient(names["bias"], delta.sum(2))
    elif isinstance(module, nn.Embedding):
        tokens = h.reshape(len(h), -1)
        yield sketch.of_tokens(names["weight"], delta.reshape(*delta.shape[:2], tokens.shape[1], -1), tokens)
    else:
        gradients = rule(module, parameters, h, delta)
        for attribute, name in site.parameters:
            yield sketch.of_gradient(name, gradients[attribute])
