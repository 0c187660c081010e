"""An unbiased sketch of gradients: k numbers in place of P, made without ever forming the gradient of a layer.

Column j of the sketch is Σ_p u_pjᵀ G_p v_pj, summed over the parameters p, G_p the gradient of parameter p as a matrix
(its first axis by all others; v_pj = 1 if there are no others) and u, v independent random *complex* vectors with
entries (±1 ± i)/√2. Real and imaginary part are two of the k numbers, all scaled by √(2/k), so that products of
sketches are on average products of gradients: E⟨φ(G), φ(G')⟩ = Σ_p ⟨G_p, G'_p⟩. If G_p = Σ_t δ_t ⊗ h_t, the
column is Σ_t (u·δ_t)(v·h_t): k·(|δ| + |h|) multiply-adds a position.
A *joint* sketch has all outputs in the same k numbers, for kernels that sum over them: the rows of G_p are pairs
(output, row of the parameter), u has an entry for each, and E⟨φ, φ'⟩ = Σ_p Σ_c ⟨G_pc, G'_pc⟩ at the same variance:
C times fewer numbers, and k·(C|δ| + |h|) multiply-adds a position. Sketches of a few outputs each are independent of
each other, so that their products add up to the same on average. Many outputs are first projected on random directions
(`nntk_dist.layers.sketches.projected_outputs`).
Variance of ⟨φ(G), φ(G)⟩, relative to |G|⁴: 6/k if G is one outer product, 2/k if it is none or many; 8/k with
real vectors, which is why they are complex (Wacker, Ohana, Filippone, "Complex-to-real sketches for tensor products",
AISTATS 2023). Projections of both sides to b×b blocks would cost less for a column, but 4(b + 1)/k at the same k.

The probes are a function of (seed, parameter, side, coordinate, column): the same for all rows, draws and processes.
Columns form Q independent groups; their scatter gives the error of the sketch
(`nntk_dist.statistics.standard_errors`). The local kernel, which has no draws, takes them as its blocks.
No models, no draws and no kernels here.

Axes: n examples, c outputs, e sketches (1 if joint, else c), t positions, o/i units out/in, r rows of a parameter's
gradient ((output, unit) if joint, else unit), k columns, m = k/2 complex columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from nntk_dist.errors import ArgumentError
from nntk_dist.sampling.philox import signs
from nntk_dist.sampling.streams import Stream

AUTO_COLUMNS = 1024
_MOST_GROUPS = 32
_FEWEST_GROUPS = 8
# Complex columns: with one, intervals of nominal 95 % cover 0.89 if the sketch's error dominates (measured); with four,
# 0.935. At the worst, a whole gradient that is one outer product of long vectors, 0.90 with four, 0.93 with sixteen.
_FEWEST_IN_A_GROUP = 4
_ELEMENTS_AT_ONCE = 1 << 21  # 8 MiB of products in float32, to be multiplied while they are in the cache
KEPT_BYTES = 256 << 20  # of probes
_SIGNS_OF_A_COUNTER = 128
OUT, IN = 0, 1  # the two sides of a parameter


def columns_of_sketch(sketch: int | str) -> int:
    """Return k, the numbers of a sketch.

    Raises:
        ArgumentError: eight groups do not get equally many complex columns, or too few for their scatter to be nearly
            normal.
    """
    if isinstance(sketch, str):
        return AUTO_COLUMNS
    unit, least = 2 * _FEWEST_GROUPS, 2 * _FEWEST_GROUPS * _FEWEST_IN_A_GROUP
    if sketch < least or sketch % unit:
        nearest = max(least, round(sketch / unit) * unit)
        raise ArgumentError(
            f"sketch is {sketch}; allowed: auto, or a multiple of {unit} ({_FEWEST_GROUPS} groups of complex numbers) "
            f"from {least}; the nearest is {nearest}"
        )
    return sketch


def groups_of_columns(num_columns: int, num_blocks: int) -> int:
    """Return Q: at least 8, and about as many as blocks if that leaves enough columns to each.

    Intervals take Student's t with R − 1 degrees of freedom: with fewer groups than blocks they would be too short
    if the sketch's error dominates (nominal 95 % cover 0.91 at the worst, Q = 8 and R = ∞).
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
    """The probes of every parameter of a space; `names` are all its parameters, sketched or not.

    `joint` sketches all outputs in the same numbers, otherwise each has its own, under the same probes. A joint sketch
    may have `num_directions`, on which outputs are projected: a divisor of the complex columns, and a multiple of the
    groups.
    """

    seed: int
    num_columns: int
    num_groups: int
    names: tuple[str, ...]
    joint: bool = False
    num_directions: int = 0

    def probes(
        self, name: str, side: int, coordinates: Tensor, dtype: torch.dtype, columns: slice | None = None
    ) -> Float[Tensor, "coordinate k"]:
        """Return √2 u or √2 v of a parameter at some coordinates; real and imaginary parts alternate."""
        number = 2 * self.names.index(name) + side
        start, stop = (0, self.num_columns) if columns is None else (columns.start, columns.stop)
        return signs(self.seed, Stream.SKETCH, coordinates, stop - start, draw=number, start=start, dtype=dtype)

    def directions(self, outputs: Sequence[int], num_outputs: int, like: Tensor) -> Float[Tensor, "d C"]:
        """Return the random directions, ±1 at some outputs and 0 at the others."""
        result = like.new_zeros(self.num_directions, num_outputs)
        chosen, number = torch.tensor(outputs, device=like.device), 2 * len(self.names)
        values = signs(self.seed, Stream.SKETCH, chosen, self.num_directions, draw=number, dtype=like.dtype)
        result[:, chosen] = values.T
        return result

    def of_gradient(
        self, name: str, gradient: Float[Tensor, "n c ..."], outputs: Sequence[int] | None = None
    ) -> Float[Tensor, "n *c k"]:
        """Sketch a parameter's formed gradient; `outputs` are the outputs along its axis c, if not all."""
        projector = Projector(self, range(gradient.shape[1]) if outputs is None else outputs)
        total = projector.start(gradient)
        projector.add_gradient_(total, name, gradient)
        return projector.finished(total)

    def of_shared(
        self, name: str, weights: Float[Tensor, "n t c"], a: Float[Tensor, "n t o"], b: Float[Tensor, "n t i"]
    ) -> Float[Tensor, "n c k"]:
        """Sketch Σ_t w_tc a_t ⊗ b_t for each output: outer products that outputs share but for a factor."""
        projector = Projector(self, range(weights.shape[2]))
        total = projector.start(weights.mT)
        for columns in projector.chunks(a.shape[0] * a.shape[1]):
            left = as_complex(a @ projector.probes(name, OUT, a.shape[2], a, columns))
            products = left.mul_(as_complex(b @ projector.probes(name, IN, b.shape[2], b, columns)))
            total[..., complex_columns(columns)] += weights.mT.to(products.dtype) @ products
        return projector.finished(total)


class Projector:
    """Adds what is sketched to sums, (n, e, m), in place, for some outputs.

    Its probes are made once and kept while they fit into 256 MiB; others are made anew, some columns at a time.
    """

    def __init__(self, sketch: Sketch, outputs: Sequence[int]) -> None:
        self.sketch, self.outputs = sketch, tuple(outputs)
        self._kept: dict[tuple[str, int, int], Tensor] = {}
        self._folded: dict[str, Tensor] = {}

    def start(self, gradient: Float[Tensor, "n c ..."]) -> Complex[Tensor, "n e m"]:
        """Return a zero sum for the examples and outputs of this gradient, of its dtype."""
        num_sketches = 1 if self.sketch.joint else gradient.shape[1]
        return as_complex(gradient.new_zeros(len(gradient), num_sketches, self.sketch.num_columns))

    def finished(self, total: Complex[Tensor, "n e m"]) -> Float[Tensor, "n *c k"]:
        """Return √(2/k) Σ u·v from sums over √2 u and √2 v, with real and imaginary parts as columns."""
        columns = torch.view_as_real(total).flatten(2).mul_((2.0 * self.sketch.num_columns) ** -0.5)
        return columns[:, 0] if self.sketch.joint else columns

    def forget_weights(self) -> None:
        """Forget the readout's weights as folded by `add_derivatives_`; call it before parameters move."""
        self._folded.clear()

    def probes(self, name: str, side: int, length: int, like: Tensor, columns: slice) -> Float[Tensor, "coordinate k"]:
        """Return some columns of a side's probes, at all its coordinates."""
        key, size = (name, side, length), like.element_size()
        if key in self._kept:
            return self._kept[key][:, columns]
        coordinates = torch.arange(length, device=like.device)
        if side == OUT:
            coordinates = self._of_outputs(coordinates, length)
        held = sum(array.numel() for array in self._kept.values())
        if size * (held + len(coordinates) * self.sketch.num_columns) > KEPT_BYTES:
            return self.sketch.probes(name, side, coordinates, like.dtype, columns)
        self._kept[key] = self.sketch.probes(name, side, coordinates, like.dtype)
        return self._kept[key][:, columns]

    def add_factors_(
        self,
        total: Complex[Tensor, "n e m"],
        name: str,
        delta: Float[Tensor, "n c t o"],
        h: Float[Tensor, "n t i"],
        bias: str | None = None,
    ) -> None:
        """Add Σ_t δ_t ⊗ h_t, projecting both sides apart or the formed sum, whichever takes fewer operations.

        A `bias` of the layer is one more input, always 1, with its own probe. Positions on which no output depends are
        left out: if f is a logit of the last position, all others of the last layers.
        """
        delta, h = used_positions(delta, h)
        o, (n, t, i) = delta.shape[3], h.shape
        if self.sketch.joint:
            delta = delta.transpose(1, 2).flatten(2)[:, None]
        size = delta.shape[1] * delta.shape[3]
        if size * i < t * (size + i):
            h = h if bias is None else torch.cat((h, h.new_ones(n, t, 1)), dim=2)
            matrix = torch.einsum("netr,nti->neri", delta, h)
            self._add_matrix_(total, name, matrix, o, bias)
            return
        for columns in self.chunks(n * t * delta.shape[1]):
            left = as_complex(delta @ self.probes(name, OUT, o, delta, columns))
            right = as_complex(self._inputs(name, h, columns, bias))
            add_products_(total[..., complex_columns(columns)], left, right[:, None])

    def add_derivatives_(
        self,
        total: Complex[Tensor, "n e m"],
        name: str,
        derivatives: Float[Tensor, "n o"],
        shares: Float[Tensor, "c o"],
        h: Float[Tensor, "n i"],
        bias: str | None = None,
    ) -> None:
        """Add δ ⊗ h for δ_c = B_c ⊙ s, into a joint sketch: Σ_c B_c u_c is made once for all rows, k·(o + i) a row."""
        if name not in self._folded:
            self._folded[name] = self._folded_probes(name, shares)
        for columns in self.chunks(len(h)):
            left = as_complex(derivatives @ self._folded[name][:, columns])
            right = as_complex(self._inputs(name, h, columns, bias))
            total[:, 0, complex_columns(columns)].addcmul_(left, right)

    def add_gradient_(self, total: Complex[Tensor, "n e m"], name: str, gradient: Float[Tensor, "n c ..."]) -> None:
        """Add a parameter's gradient that has been formed."""
        if gradient.ndim > 3:
            matrix = gradient.flatten(3)
            self._add_matrix_(
                total, name, matrix.flatten(1, 2)[:, None] if self.sketch.joint else matrix, matrix.shape[2]
            )
            return
        vectors = gradient.reshape(*gradient.shape[:2], -1)
        rows = vectors.flatten(1)[:, None] if self.sketch.joint else vectors
        for columns in self.chunks(rows.shape[0] * rows.shape[1]):
            product = rows @ self.probes(name, OUT, vectors.shape[2], rows, columns)
            total[..., complex_columns(columns)].add_(
                as_complex(product), alpha=math.sqrt(2.0)
            )  # v is 1 here, and other layers have √2 v

    def add_tokens_(
        self,
        total: Complex[Tensor, "n e m"],
        name: str,
        delta: Float[Tensor, "n c t i"],
        tokens: Float[Tensor, "n t"],
        num_tokens: int,
    ) -> None:
        """Add an embedding table's gradient from the probes of the rows that occur; no table is formed."""
        distinct, position = tokens.unique(return_inverse=True)
        coordinates = self._of_outputs(distinct, num_tokens)
        for columns in self.chunks(delta[..., 0].numel()):
            u = as_complex(self.sketch.probes(name, OUT, coordinates, delta.dtype, columns).contiguous())
            right = as_complex(delta @ self.probes(name, IN, delta.shape[3], delta, columns))
            if self.sketch.joint:
                left = u.unflatten(0, (len(self.outputs), -1))[:, position].transpose(0, 1)
                total[:, 0, complex_columns(columns)] += left.mul(right).sum((1, 2))
            else:
                add_products_(total[..., complex_columns(columns)], right, u[position][:, None])

    def _of_outputs(self, coordinates: Tensor, length: int) -> Tensor:
        """Coordinates of a side of the parameter, for each output if the sketch is joint."""
        if not self.sketch.joint:
            return coordinates
        outputs = torch.tensor(self.outputs, device=coordinates.device)
        return (outputs[:, None] * length + coordinates).flatten()

    def chunks(self, num_vectors: int) -> Iterator[slice]:
        """Yield columns in portions, so that products of this many vectors stay within 2^21 numbers, if possible."""
        step = _SIGNS_OF_A_COUNTER * max(1, _ELEMENTS_AT_ONCE // (_SIGNS_OF_A_COUNTER * max(1, num_vectors)))
        for start in range(0, self.sketch.num_columns, step):
            yield slice(start, min(start + step, self.sketch.num_columns))

    def _inputs(self, name: str, h: Float[Tensor, "n *t i"], columns: slice, bias: str | None) -> Tensor:
        """v·h, with the bias's own probe if there is one."""
        v = self.probes(name, IN, h.shape[-1], h, columns)
        return h @ v if bias is None else (h @ v).add_(self.probes(bias, IN, 1, h, columns))

    def _folded_probes(self, name: str, shares: Float[Tensor, "c o"]) -> Float[Tensor, "o k"]:
        """Σ_c B_c u_c."""
        c, o = shares.shape
        folded = shares.new_empty(o, self.sketch.num_columns)
        for columns in self.chunks(c * o):
            u = self.probes(name, OUT, o, shares, columns).unflatten(0, (c, o))
            torch.sum(u * shares[:, :, None], 0, out=folded[:, columns])
        return folded

    def _add_matrix_(
        self,
        total: Complex[Tensor, "n e m"],
        name: str,
        matrix: Float[Tensor, "n e r i"],
        rows: int,
        bias: str | None = None,
    ) -> None:
        """Add a gradient as a matrix, its longer side first; `rows` counts the parameter's rows for one output."""
        n, e, r, i = matrix.shape
        for columns in self.chunks(n * e * min(r, i)):
            u = self.probes(name, OUT, rows, matrix, columns)
            v = self.probes(name, IN, i - (bias is not None), matrix, columns)
            if bias is not None:
                v = torch.cat((v, self.probes(bias, IN, 1, matrix, columns)))
            first, second = (matrix.mT @ u, v) if r >= i else (matrix @ v, u)
            add_products_(total[..., complex_columns(columns)], as_complex(first), as_complex(second.contiguous()))


def used_positions(
    delta: Float[Tensor, "n c t o"], h: Float[Tensor, "n t i"]
) -> tuple[Float[Tensor, "n c t o"], Float[Tensor, "n t i"]]:
    """Leave out positions on which no output depends; none are left out on a GPU, which would have to wait."""
    if h.shape[1] == 1 or delta.is_cuda:
        return delta, h
    used = delta.ne(0).any(3).flatten(0, 1).any(0)
    return (delta, h) if bool(used.all()) else (delta[:, :, used], h[:, used])


def add_products_(
    total: Complex[Tensor, "n e m"], left: Complex[Tensor, "n e t m"], right: Complex[Tensor, "*n_e t m"]
) -> None:
    """Add Σ_t of products of the two sides."""
    if left.shape[2] == 1:
        total.addcmul_(left[:, :, 0], right[..., 0, :])
    else:
        total += left.mul_(right).sum(2)


def as_complex(columns: Float[Tensor, "... k"]) -> Complex[Tensor, "... m"]:
    """Join neighbouring columns, real and imaginary parts, to complex ones."""
    return torch.view_as_complex(columns.unflatten(-1, (-1, 2)))


def complex_columns(columns: slice) -> slice:
    """Return the complex columns of a range of real ones."""
    return slice(columns.start // 2, columns.stop // 2)
