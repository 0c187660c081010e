"""Sums of a tile that are weighted sums of matrix products: which products, and how they are added up.

A tile's time beyond its products goes into passes over memory. So a tile of plain products without standard errors is
computed by BLAS alone, which adds products up in place (`multiply_into_`). Otherwise (`ProductSums`) the products of a
window, as large as suits BLAS, stay in the features' dtype; everything after them, from sums to statistics, is done for
a few rows at a time, which stay in a core's cache. No models, no randomness.

Axes: n1, n2 rows and columns; w slots of features, c outputs, k feature columns of one output, i of inputs; t products
of a window, e entries of a stripe.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nntk_dist.products.block_sums import INNER_TERMS, BlockSums, Meeting, Sum
from nntk_dist.runtime.reused_memory import ReusedMemory

# The most kernel rows and columns of a window, and numbers of its products and (over several passes) of its sums.
_EDGE, _GPU_EDGE = 1024, 2048
_WINDOW_NUMBERS, _GPU_WINDOW_NUMBERS = 1 << 23, 1 << 26
_FEWEST_ROWS = 128
_MOST_AT_ONCE = 32  # products of a window that are held together; if there are more,
_MANY_AT_ONCE = 8  # at least this many of them
_STRIPE_NUMBERS = 1 << 20  # of one thread


@dataclass(frozen=True)
class Inputs:
    """Features that all outputs share; their product multiplies a `WeightedProduct` entry by entry."""

    left: Float[Tensor, "n1 i"]
    right: Float[Tensor, "n2 i"]


@dataclass(frozen=True)
class WeightedProduct:
    """A product of features that have an axis of outputs, summed over slots, and its share in each sum.

    Products that have the same object as `inputs` follow each other: the product of the inputs is made once for them.

    Attributes:
        left: Features of the rows.
        right: Features of the columns.
        factors: The share of the product in each sum.
        weights: Multiply the features number by number; None leaves them as they are.
        inputs: Their product multiplies this one entry by entry; None multiplies nothing.
    """

    left: Float[Tensor, "n1 w c k"]
    right: Float[Tensor, "n2 w c k"]
    factors: Mapping[Sum, float]
    weights: Float[Tensor, "#w #c #k"] | None = None
    inputs: Inputs | None = None

    def rows(self, selection: slice = slice(None)) -> Float[Tensor, "n w c k"]:
        """Return some of the left features, weighted: a copy if there are weights."""
        rows = self.left[selection]
        return rows if self.weights is None else rows * self.weights


def add_products_(sums: BlockSums, products: Sequence[WeightedProduct], meeting: Meeting) -> None:
    """Add the products of all rows and columns, or of each row with its column."""
    if meeting.paired:
        parts = sums.parts()
        for each in products:
            product = meeting.paired_product(each.rows(), each.right)
            if each.inputs is not None:
                product *= meeting.shared(each.inputs.left, each.inputs.right, each.left.shape[2])
            for name, factor in each.factors.items():
                parts[name].add_(product, alpha=factor)
        return
    for rows, part in ProductSums(products, meeting, sums).stripes():
        sums.of_rows(rows).add_(part)


def multiply_into_(
    results: Mapping[str, Float[Tensor, "rows columns"]],
    products: Sequence[WeightedProduct],
    meeting: Meeting,
    shares: Mapping[str, Mapping[Sum, float]],
    rows: slice,
    columns: slice,
) -> None:
    """Set results by products that BLAS adds to them in their own dtype.

    Args:
        results: The results by name.
        products: What `can_multiply_into` accepts.
        meeting: Whether outputs are summed or kept; rows meet all columns.
        shares: For each result the share of each sum.
        rows: The rows of the results.
        columns: The columns of the results.
    """
    started = set[str]()
    for product in products:
        left, right = meeting.matrix(product.rows(rows)), meeting.matrix(product.right[columns])
        factors = {
            name: sum(share * product.factors.get(each, 0.0) for each, share in of.items())
            for name, of in shares.items()
        }
        names = [name for name, factor in factors.items() if factor]
        for position, name in enumerate(names):
            result, alone = results[name], not started & {names[0], name}
            if position and alone:  # the first result holds this product and nothing else
                torch.mul(results[names[0]], factors[name] / factors[names[0]], out=result)
            else:
                torch.addmm(result, left, right.T, beta=float(name in started), alpha=factors[name], out=result)
        started |= {*names}


def can_multiply_into(products: Sequence[WeightedProduct], meeting: Meeting, dtype: torch.dtype) -> bool:
    """Return whether `multiply_into_` makes these sums as accurately as `ProductSums`.

    It does for results of the features' dtype and short products without inputs.
    """
    return all(
        each.inputs is None and each.left.dtype == dtype and _length(each, full=meeting.full) <= INNER_TERMS
        for each in products
    )


class ProductSums:
    """The sums of a tile's windows, a stripe of rows at a time; all rows meet all columns.

    Inner products are of at most `INNER_TERMS` terms in the features' dtype, but for the products of inputs; sums of
    inner products are of float64.

    Args:
        products: What is added up.
        meeting: Whether outputs are summed or kept.
        form: Sums of any shape: those that exist there are made.

    Attributes:
        edges: The kernel rows and columns that a window should have.
    """

    def __init__(self, products: Sequence[WeightedProduct], meeting: Meeting, form: BlockSums) -> None:
        self._weighted, self._meeting, self._form = products, meeting, form
        self._device, self._dtype = products[0].left.device, products[0].left.dtype
        self._portions = [
            (index, slice(start, start + INNER_TERMS))
            for index, each in enumerate(products)
            for start in range(0, _length(each, full=meeting.full), INNER_TERMS)
        ]
        self._names = list(form.parts())
        self._at_once = num_at_once(len(self._portions), len(self._names))
        self._several = self._at_once < len(self._portions)
        factors = [[products[index].factors.get(name, 0.0) for index, _ in self._portions] for name in self._names]
        self._factors = torch.tensor(factors, dtype=torch.float64, device=self._device)
        num_sums = len(self._names)
        self.edges = product_window_edges(len(self._portions), num_sums, self._device)
        self._numbers_of_entry = self._at_once + 2 * num_sums + 8  # about: products, sums, statistics
        self._memory = ReusedMemory()

    def stripes(self, rows: slice = slice(None), columns: slice = slice(None)) -> Iterator[tuple[slice, BlockSums]]:
        """Yield kernel rows of a window and their sums with all its columns, in memory that the next stripe reuses."""
        window = _WindowProducts(self._weighted, self._meeting, rows, columns)
        shape, totals = window.shape, None
        if self._several:
            totals = torch.zeros(len(self._names), *shape, dtype=torch.float64, device=self._device)
        for begin in range(0, len(self._portions), self._at_once):
            chosen = slice(begin, begin + self._at_once)
            products = self._empty((len(self._portions[chosen]), *shape), self._dtype)
            for (index, part), product in zip(self._portions[chosen], products, strict=True):
                window.multiply_into_(product, index, part)
            for stripe in self._stripes_of(*shape):
                some = products[:, stripe].flatten(1)
                exact = some if some.dtype == torch.float64 else self._empty(some.shape, torch.float64).copy_(some)
                memory = self._empty((len(self._names), some.shape[1]), torch.float64)
                sums = torch.mm(self._factors[:, chosen], exact, out=memory).unflatten(1, (-1, shape[1]))
                if totals is not None:
                    sums = totals[:, stripe].add_(sums)
                if chosen.stop >= len(self._portions):
                    yield stripe, self._form.of_stack(sums)
                self._memory.give_back([memory] if exact is some else [memory, exact])
            self._memory.give_back([products])

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._memory.empty(shape, dtype=dtype, device=self._device)

    def _stripes_of(self, num_rows: int, num_columns: int) -> Iterator[slice]:
        step = num_rows
        if self._device.type == "cpu":
            step = max(1, torch.get_num_threads() * _STRIPE_NUMBERS // (self._numbers_of_entry * num_columns))
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))


class _WindowProducts:
    """The products of some kernel rows and columns, one after the other."""

    def __init__(self, products: Sequence[WeightedProduct], meeting: Meeting, rows: slice, columns: slice) -> None:
        self._weighted, self._meeting, self._rows, self._columns = products, meeting, rows, columns
        self._index = -1
        self._inputs: Inputs | None = None
        self._of_inputs: Tensor | None = None
        self._take(0)

    def _take(self, index: int) -> None:
        """Make the matrices of a product unless they are there."""
        if index != self._index:
            self._index, each = index, self._weighted[index]
            self._left = self._meeting.matrix(each.rows(self._rows))
            self._right = self._meeting.matrix(each.right[self._columns])

    @property
    def shape(self) -> tuple[int, int]:
        """Kernel rows and columns."""
        return len(self._left), len(self._right)

    def multiply_into_(self, result: Float[Tensor, "n1 n2"], index: int, part: slice) -> None:
        """Set `result` to the product of a part of the features, times the product of the inputs."""
        self._take(index)
        torch.mm(self._left[:, part], self._right[:, part].T, out=result)
        if (inputs := self._weighted[index].inputs) is not None:
            of_inputs = self._product_of(inputs)
            width = len(result) // len(of_inputs)
            by_output = result.unflatten(1, (-1, width)).unflatten(0, (-1, width))
            by_output.mul_(of_inputs[:, None, :, None])

    def _product_of(self, inputs: Inputs) -> Float[Tensor, "n1 n2"]:
        """Return the product of inputs, made unless it was the last one, in memory that is reused."""
        if inputs is not self._inputs:
            left, right = inputs.left[self._rows], inputs.right[self._columns]
            if self._of_inputs is None:
                self._of_inputs = left.new_empty(len(left), len(right))
            self._inputs = inputs
            torch.mm(left, right.T, out=self._of_inputs)
        assert self._of_inputs is not None
        return self._of_inputs


def num_at_once(num_products: int, num_sums: int) -> int:
    """Return how many products of a window are held at a time.

    If not all fit, there are no fewer than sums, since all sums are passed over once for each time.
    """
    return min(num_products, _MOST_AT_ONCE if num_products <= _MOST_AT_ONCE else max(_MANY_AT_ONCE, num_sums))


def product_window_edges(num_products: int, num_sums: int, device: torch.device | str) -> tuple[int, int]:
    """Return the kernel rows and columns of a window of `ProductSums`.

    Its products, and over several passes its sums in float64, have no more numbers than a window may hold, but for the
    fewest rows that it has.
    """
    edge, numbers = _limits(device)
    at_once = num_at_once(num_products, num_sums)
    held = at_once + (2 * num_sums if at_once < num_products else 0)
    return min(edge, max(_FEWEST_ROWS, numbers // (edge * held))), edge


def product_window_bytes(item: int, num_sums: int, entries: int, threads: int, device: torch.device | str) -> int:
    """Return the memory that `ProductSums` takes for a tile.

    It holds products and sums of a window, the product of inputs, and a stripe in float64; on a GPU the stripe is the
    whole window and its sums.

    Args:
        item: Bytes of one number of the features.
        num_sums: Number of sums.
        entries: Entries of the tile.
        threads: Threads that compute.
        device: Device that computes.
    """
    edge, numbers = _limits(device)
    most = max(_MOST_AT_ONCE, num_sums)  # products that are held
    of_entry = most * item + 8 * num_sums
    window = min(max(item * numbers, _FEWEST_ROWS * edge * of_entry), entries * of_entry)
    stripe = 2 * numbers if torch.device(device).type == "cuda" else threads * _STRIPE_NUMBERS
    return window + item * min(edge**2, entries) + 8 * min(stripe, entries * (most + 2 * num_sums))


def _limits(device: torch.device | str) -> tuple[int, int]:
    """Return the limits of a window's edge and of its numbers."""
    gpu = torch.device(device).type == "cuda"
    return (_GPU_EDGE, _GPU_WINDOW_NUMBERS) if gpu else (_EDGE, _WINDOW_NUMBERS)


def _length(product: WeightedProduct, *, full: bool) -> int:
    """Return the terms of the inner products."""
    _, slots, outputs, columns = product.left.shape
    return slots * columns * (1 if full else outputs)
