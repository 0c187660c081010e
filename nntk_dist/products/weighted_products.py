"""Sums of a tile that are weighted sums of matrix products: which products, and how they are added up.

A tile's time beyond its products goes into passes over memory. So a tile of plain products without standard errors is
computed by BLAS alone, which adds products up in place (`multiply_into_`). Otherwise (`ProductSums`) the products of a
window, as large as suits BLAS, stay in the features' dtype; everything after them, from sums to statistics, is done for
a few rows at a time, which stay in a core's cache. No models, no randomness.

Axes: n1, n2 rows and columns; w slots of features, c outputs, k feature columns of one output, i of inputs; t products
of a window, e entries of a stripe.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
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
        same_output: C, if the product counts for each of C outputs with itself and is 0 for two different outputs. Only
            kernels that keep outputs have such products; the features have one place on their axis of outputs.
    """

    left: Float[Tensor, "n1 w c k"]
    right: Float[Tensor, "n2 w c k"]
    factors: Mapping[Sum, float]
    weights: Float[Tensor, "#w #c #k"] | None = None
    inputs: Inputs | None = None
    same_output: int = 0

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
            if each.same_output:
                product = meeting.same_output(product[:, 0, 0], each.same_output)
            if each.inputs is not None:
                product = meeting.multiply_shared_(product, each.inputs.left, each.inputs.right)
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
    plain, of_same_output = _divided(products)
    started = set[str]()
    for product in plain:
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
    for name in results.keys() - started:
        results[name].zero_()
    for product in of_same_output:
        values = product.rows(rows).flatten(1) @ product.right[columns].flatten(1).T
        for name, of in shares.items():
            factor = sum(share * product.factors.get(each, 0.0) for each, share in of.items())
            add_to_same_output_(results[name], factor * values, product.same_output)


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
        self._weighted, of_same_output = _divided(products)
        self._of_same_output = None
        if of_same_output:
            alone = [replace(each, same_output=0) for each in of_same_output]
            self._of_same_output = ProductSums(alone, Meeting(), form)
        self._first, self._meeting, self._form = products[0], meeting, form
        self._num_outputs = self._first.same_output or self._first.left.shape[2]
        self._device, self._dtype = products[0].left.device, products[0].left.dtype
        self._portions = [
            (index, slice(start, start + INNER_TERMS))
            for index, each in enumerate(self._weighted)
            for start in range(0, _length(each, full=meeting.full), INNER_TERMS)
        ]
        self._names = list(form.parts())
        self._at_once = num_at_once(len(self._portions), len(self._names))
        self._several = self._at_once < len(self._portions)
        shares = [self._weighted[index].factors for index, _ in self._portions]
        factors = [[share.get(name, 0.0) for share in shares] for name in self._names]
        self._factors = torch.tensor(factors, dtype=torch.float64, device=self._device)
        num_sums = len(self._names)
        self.edges = product_window_edges(len(self._portions), num_sums, self._device)
        self._numbers_of_entry = self._at_once + 2 * num_sums + 8  # about: products, sums, statistics
        self._memory = ReusedMemory()

    def stripes(self, rows: slice = slice(None), columns: slice = slice(None)) -> Iterator[tuple[slice, BlockSums]]:
        """Yield kernel rows of a window and their sums with all its columns, in memory that the next stripe reuses.

        A window of one example with many outputs is computed for some outputs at a time.
        """
        counts = len(self._first.left[rows]), len(self._first.right[columns])
        height, length = self._meeting.shape(*counts, self._num_outputs)
        at_most = min(self.edges[0], self.edges[0] * self.edges[1] // length)
        step = -(-height // -(-height // max(1, at_most)))
        same_output = None if self._of_same_output is None else self._of_same_output.total(rows, columns, counts)
        for start in range(0, height, step):
            portion = slice(start, min(start + step, height))
            width = self._meeting.width(self._num_outputs)
            window = _WindowProducts(self._weighted, self._meeting, rows, columns, portion, width)
            for stripe, sums in self._stripes_of_portion(window, (portion.stop - start, length)):
                own = slice(start + stripe.start, start + stripe.stop)
                if same_output is not None:
                    add_to_same_output_(sums, same_output, width, own.start)
                yield own, self._form.of_stack(sums)

    def _stripes_of_portion(
        self, window: "_WindowProducts", shape: tuple[int, int]
    ) -> Iterator[tuple[slice, Float64[Tensor, "sum rows columns"]]]:
        """Yield rows of a portion and the stack of their sums."""
        totals = None
        if self._several:
            totals = torch.zeros(len(self._names), *shape, dtype=torch.float64, device=self._device)
        for begin in range(0, max(1, len(self._portions)), self._at_once):
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
                    yield stripe, sums
                self._memory.give_back([memory] if exact is some else [memory, exact])
            self._memory.give_back([products])

    def total(self, rows: slice, columns: slice, shape: tuple[int, int]) -> Float64[Tensor, "sum n1 n2"]:
        """Return the stack of all sums of a window."""
        result = torch.empty(len(self._names), *shape, dtype=torch.float64, device=self._device)
        for stripe, sums in self.stripes(rows, columns):
            torch.stack(list(sums.parts().values()), out=result[:, stripe])
        return result

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._memory.empty(shape, dtype=dtype, device=self._device)

    def _stripes_of(self, num_rows: int, num_columns: int) -> Iterator[slice]:
        step = num_rows
        if self._device.type == "cpu":
            step = max(1, torch.get_num_threads() * _STRIPE_NUMBERS // (self._numbers_of_entry * num_columns))
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))


class _WindowProducts:
    """The products of a portion of some examples' kernel rows, `width` each, with columns, one after the other."""

    def __init__(
        self,
        products: Sequence[WeightedProduct],
        meeting: Meeting,
        rows: slice,
        columns: slice,
        portion: slice,
        width: int,
    ) -> None:
        self._weighted, self._meeting, self._rows, self._columns = products, meeting, rows, columns
        self._portion, self._width = portion, width
        self._index = -1
        self._inputs: Inputs | None = None
        self._of_inputs: Tensor | None = None

    def _take(self, index: int) -> None:
        """Make the matrices of a product unless they are there."""
        if index != self._index:
            self._index, each = index, self._weighted[index]
            self._left = self._meeting.matrix(each.rows(self._rows))[self._portion]
            self._right = self._meeting.matrix(each.right[self._columns])

    def multiply_into_(self, result: Float[Tensor, "n1 n2"], index: int, part: slice) -> None:
        """Set `result` to the product of a part of the features, times the product of the inputs."""
        self._take(index)
        torch.mm(self._left[:, part], self._right[:, part].T, out=result)
        if (inputs := self._weighted[index].inputs) is not None:
            result.unflatten(1, (-1, self._width)).mul_(self._product_of(inputs)[:, :, None])

    def _product_of(self, inputs: Inputs) -> Float[Tensor, "rows n2"]:
        """Return the product of inputs for each kernel row, made unless it was the last one."""
        if inputs is not self._inputs or self._of_inputs is None:
            left, right = inputs.left[self._rows], inputs.right[self._columns]
            repeated = left if self._width == 1 else left.repeat_interleave(self._width, 0)
            left = repeated[self._portion]
            if self._of_inputs is None:
                self._of_inputs = left.new_empty(len(left), len(right))
            self._inputs = inputs
            torch.mm(left, right.T, out=self._of_inputs)
        return self._of_inputs


def add_to_same_output_(
    entries: Float[Tensor, "*lead rows columns"], values: Float[Tensor, "*lead n1 n2"], num_outputs: int, first: int = 0
) -> None:
    """Add values of pairs of examples to the entries of each output with itself, in place.

    Args:
        entries: Kernel rows of the examples, from number `first` on, and all their columns.
        values: One value for a pair of examples.
        num_outputs: C, the kernel rows of one example.
        first: The number of the first row.
    """
    by_output, last = entries.unflatten(-1, (-1, num_outputs)), first + entries.shape[-2]
    for example in range(first // num_outputs, -(-last // num_outputs)):
        start = example * num_outputs
        own = slice(max(first, start), min(last, start + num_outputs))
        part = by_output[..., own.start - first : own.stop - first, :, own.start - start : own.stop - start]
        part.diagonal(dim1=-3, dim2=-1).add_(values[..., example, :, None])


def of_each_output(products: Sequence[WeightedProduct], num_outputs: int, *, full: bool) -> list[WeightedProduct]:
    """Return products that count for each of C outputs with itself alone: their sum over outputs unless `full`."""
    if full:
        return [replace(each, same_output=num_outputs) for each in products]
    return [
        replace(each, factors={name: num_outputs * factor for name, factor in each.factors.items()})
        for each in products
    ]


def _divided(products: Sequence[WeightedProduct]) -> tuple[list[WeightedProduct], list[WeightedProduct]]:
    """Return the products of all pairs of outputs, and those of each output with itself alone."""
    return [each for each in products if not each.same_output], [each for each in products if each.same_output]


def num_at_once(num_products: int, num_sums: int) -> int:
    """Return how many products of a window are held at a time.

    If not all fit, there are no fewer than sums, since all sums are passed over once for each time.
    """
    return min(max(1, num_products), _MOST_AT_ONCE if num_products <= _MOST_AT_ONCE else max(_MANY_AT_ONCE, num_sums))


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
