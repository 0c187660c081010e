"""The joint sketch of many outputs by random projections of the outputs: D backward passes in place of C.

The outputs are projected on D directions V_d, with independent entries ±1. Column j of the sketch belongs to one
direction d, k/D neighbouring columns to each, and is Σ_p u_pjᵀ (Σ_c V_dc G_pc) v_pj: the gradient of one projected
output, sketched as in `nntk_dist.layers.sketches.sketch`. E[V_dc V_dc'] = δ_cc', so that products of sketches are on
average the same as without projections: Σ_p Σ_c ⟨G_pc, G'_pc⟩. A position takes k·(|δ| + |h|) multiply-adds.

The projections add to the variance of ⟨φ(G), φ(G)⟩, relative to its square, at most (2/D)·ρ, ρ = ‖Θ‖²_F/(tr Θ)² of the
C×C matrix Θ_cc' = Σ_p ⟨G_pc, G_pc'⟩: 1/C if outputs have orthogonal gradients of one length, 1 if they have the same
one (Hutchinson's trace estimator; Avron, Toledo, J. ACM 2011). No direction serves two groups of columns, so that the
scatter of the groups, which gives the error of the sketch, holds this part too.

Axes: n examples, d directions, C outputs, t positions, o/i units out/in, r rows of a parameter's gradient, k columns,
m = k/2 complex columns; e is 1.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from nntk_dist.errors import ArgumentError
from nntk_dist.layers.sketches.sketch import (
    IN,
    OUT,
    Projector,
    Sketch,
    add_products_,
    as_complex,
    columns_of_sketch,
    complex_columns,
    groups_of_columns,
    used_positions,
)

_FEWEST_IN_A_GROUP = 4  # directions: fewer make the scatter of the groups too far from normal, as fewer columns do
# Of `auto`: complex columns of a direction, and how many times the directions the outputs are at least
_COLUMNS_OF_A_DIRECTION = 8
_WORTH = 4
_SIGNS_OF_A_COUNTER = 128


def count_directions(asked: int | str, num_columns: int, num_blocks: int, num_outputs: int) -> int:
    """Return D, the directions on which outputs are projected; 0 if each output counts by itself.

    Args:
        asked: 0 for none, the number, or `auto`: k/16, if there are at least four times as many outputs.
        num_columns: k.
        num_blocks: R, on which the number of groups depends.
        num_outputs: C.
    """
    if isinstance(asked, int):
        return asked
    groups = groups_of_columns(num_columns, num_blocks)
    most = num_columns // 2 // _COLUMNS_OF_A_DIRECTION
    allowed = _allowed(num_columns, groups)
    found = max([count for count in allowed if count <= most], default=allowed[0])
    return found if _WORTH * found <= num_outputs else 0


def check_projections(asked: int | str, sketch: int | str, num_blocks: int) -> None:
    """Refuse a number of directions that does not divide the groups of columns.

    Raises:
        ArgumentError: the columns of a group are not equally many for each of its directions.
    """
    if isinstance(asked, str) or asked == 0:
        return
    columns = columns_of_sketch(sketch)
    allowed = _allowed(columns, groups_of_columns(columns, num_blocks))
    if asked not in allowed:
        raise ArgumentError(
            f"output_projections is {asked}; allowed for a sketch of {columns} numbers: auto, 0 (none), or one of "
            f"{', '.join(map(str, allowed))}"
        )


def _allowed(num_columns: int, groups: int) -> list[int]:
    """Multiples of the groups that divide the complex columns."""
    own = num_columns // 2 // groups
    return [groups * count for count in range(_FEWEST_IN_A_GROUP, own + 1) if own % count == 0]


def make_projector(sketch: Sketch, outputs: Sequence[int]) -> Projector:
    """Return what adds to a sketch for some outputs."""
    return OutputProjector(sketch, outputs) if sketch.num_directions else Projector(sketch, outputs)


class OutputProjector(Projector):
    """Adds gradients along directions of the outputs to sums, each to the columns of its direction."""

    @property
    def _width(self) -> int:
        """Columns of one direction."""
        return self.sketch.num_columns // self.sketch.num_directions

    def directions(self, outputs: Float[Tensor, "n C"]) -> Float[Tensor, "d C"]:
        """Return V, 0 for outputs that are not in the sketch."""
        return self.sketch.directions(self.outputs, outputs.shape[1], outputs)

    def chunks(self, num_vectors: int) -> Iterator[slice]:
        """Yield the columns of some directions at a time; see `Projector.chunks`."""
        step = next(super().chunks(num_vectors)).stop
        whole = math.lcm(_SIGNS_OF_A_COUNTER, self._width)
        step = max(whole, step // whole * whole)
        for start in range(0, self.sketch.num_columns, step):
            yield slice(start, min(start + step, self.sketch.num_columns))

    def add_factors_(
        self,
        total: Complex[Tensor, "n e m"],
        name: str,
        delta: Float[Tensor, "n d t o"],
        h: Float[Tensor, "n t i"],
        bias: str | None = None,
    ) -> None:
        """Add Σ_t δ_t ⊗ h_t, projecting both sides apart."""
        delta, h = used_positions(delta, h)
        if h.shape[1] == 1 and delta.stride(0) == 0:  # the readout's δ is the same for all examples
            delta = delta[:1]
        for columns in self.chunks(h.shape[0] * h.shape[1]):
            left = as_complex(self._along(delta, self.probes(name, OUT, delta.shape[3], delta, columns), columns))
            right = as_complex(self._inputs(name, h, columns, bias))
            add_products_(total[..., complex_columns(columns)], left[:, None], right[:, None])

    def add_gradient_(self, total: Complex[Tensor, "n e m"], name: str, gradient: Float[Tensor, "n d ..."]) -> None:
        """Add a parameter's gradient that has been formed."""
        if gradient.ndim > 3:
            matrix = gradient.flatten(3)
            for columns in self.chunks(matrix.shape[0] * matrix.shape[2]):
                u = self.probes(name, OUT, matrix.shape[2], matrix, columns)
                right = as_complex(
                    self._along(matrix, self.probes(name, IN, matrix.shape[3], matrix, columns), columns)
                )
                add_products_(total[..., complex_columns(columns)], right[:, None], as_complex(u.contiguous()))
            return
        vectors = gradient.reshape(*gradient.shape[:2], 1, -1)
        for columns in self.chunks(len(vectors)):
            product = self._along(vectors, self.probes(name, OUT, vectors.shape[3], vectors, columns), columns)
            # v is 1 here, and other layers have √2 v
            total[..., complex_columns(columns)].add_(as_complex(product), alpha=math.sqrt(2.0))

    def add_tokens_(
        self,
        total: Complex[Tensor, "n e m"],
        name: str,
        delta: Float[Tensor, "n d t i"],
        tokens: Float[Tensor, "n t"],
        num_tokens: int,
    ) -> None:
        """Add an embedding table's gradient from the probes of the rows that occur; no table is formed."""
        distinct, position = tokens.unique(return_inverse=True)
        for columns in self.chunks(tokens.numel()):
            u = as_complex(self.sketch.probes(name, OUT, distinct, delta.dtype, columns).contiguous())
            right = as_complex(self._along(delta, self.probes(name, IN, delta.shape[3], delta, columns), columns))
            add_products_(total[..., complex_columns(columns)], right[:, None], u[position][:, None])

    def _of_outputs(self, coordinates: Tensor, length: int) -> Tensor:
        """Coordinates of a side of the parameter: directions have columns of their own."""
        return coordinates

    def _along(
        self, values: Float[Tensor, "n d t a"], probes: Float[Tensor, "a k"], columns: slice
    ) -> Float[Tensor, "n t k"]:
        """Multiply the values of each direction by the probes of its columns."""
        own = values[:, columns.start // self._width : columns.stop // self._width]
        return torch.einsum("ndta,adw->ntdw", own, probes.unflatten(1, (-1, self._width))).flatten(2)

    def _folded_probes(self, name: str, shares: Float[Tensor, "d o"]) -> Float[Tensor, "o k"]:
        """B_d ⊙ u of each column."""
        columns = slice(0, self.sketch.num_columns)
        return shares.repeat_interleave(self._width, 0).T * self.probes(name, OUT, shares.shape[1], shares, columns)
