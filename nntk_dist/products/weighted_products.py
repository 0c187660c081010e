"""Sums of a tile that are made of matrix products: which products, and how they are added up.

A tile's time beyond its products goes into passes over memory. So a tile of plain products without standard errors is
made by these alone, which BLAS adds up in place (`multiply_into_`). Otherwise (`TermSums`) the products of a window, as
large as BLAS likes it, stay in the features' dtype, and all that follows, from sums to statistics, is done for a few
rows at a time, which stay in a core's cache. No models, no randomness.

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

# Kernel rows and columns of a window at most, and numbers that its products (and sums of several passes) may take.
_EDGE, _GPU_EDGE = 1024, 2048
_WINDOW_NUMBERS, _GPU_WINDOW_NUMBERS = 1 << 23, 1 << 26
_FEWEST_ROWS = 128
_MOST_AT_ONCE, _MANY_AT_ONCE = 32, 8  # products that are all held, or of more at least so many
_STRIPE_NUMBERS = 1 << 20  # of a thread


@dataclass(frozen=True)
class Inputs:
    """Features that all outputs share."""

    left: Float[Tensor, "n1 i"]
    right: Float[Tensor, "n2 i"]


@dataclass(frozen=True)
class Term:
    """A product of features that carry outputs, summed over their slots, each number `weights` times where these are
    given, and entry by entry times the product of `inputs`; and how often it is in each sum.

    Terms that have the same object as inputs stand beside each other: its product is made once for them.
    """

    left: Float[Tensor, "n1 w c k"]
    right: Float[Tensor, "n2 w c k"]
    factors: Mapping[Sum, float]
    weights: Float[Tensor, "#w #c #k"] | None = None
    inputs: Inputs | None = None

    def rows(self, selection: slice = slice(None)) -> Float[Tensor, "n w c k"]:
        """Some of the left features, weighted: a copy where there are weights."""
        rows = self.left[selection]
        return rows if self.weights is None else rows * self.weights


def add_terms_(sums: BlockSums, terms: Sequence[Term], meeting: Meeting) -> None:
    """Add the products of all rows and columns, or of each row with its column."""
    if meeting.paired:
        parts = sums.parts()
        for term in terms:
            product = meeting.paired_product(term.rows(), term.right)
            if term.inputs is not None:
                product *= meeting.shared(term.inputs.left, term.inputs.right, term.left.shape[2])
            for name, factor in term.factors.items():
                parts[name].add_(product, alpha=factor)
        return
    for rows, part in TermSums(terms, meeting, sums).stripes():
        sums.of_rows(rows).add_(part)


def multiply_into_(
    results: Mapping[str, Float[Tensor, "rows columns"]],
    terms: Sequence[Term],
    meeting: Meeting,
    shares: Mapping[str, Mapping[Sum, float]],
    rows: slice,
    columns: slice,
) -> None:
    """Set results, each made of the sums so many times, by products that are added to them in their own dtype."""
    started = set[str]()
    for term in terms:
        left, right = meeting.matrix(term.rows(rows)), meeting.matrix(term.right[columns])
        often = {
            name: sum(share * term.factors.get(each, 0.0) for each, share in of.items()) for name, of in shares.items()
        }
        names = [name for name, number in often.items() if number]
        for position, name in enumerate(names):
            result, alone = results[name], not started & {names[0], name}
            if position and alone:  # what the first one holds is this product
                torch.mul(results[names[0]], often[name] / often[names[0]], out=result)
            else:
                torch.addmm(result, left, right.T, beta=float(name in started), alpha=often[name], out=result)
        started |= {*names}


def can_multiply_into(terms: Sequence[Term], meeting: Meeting, dtype: torch.dtype) -> bool:
    """Whether `multiply_into_` makes these sums, as accurately as `TermSums`: results of the features' dtype, of short
    products that nothing multiplies.
    """
    return all(
        term.inputs is None and term.left.dtype == dtype and _length(term, full=meeting.full) <= INNER_TERMS
        for term in terms
    )


class TermSums:
    """The sums of a tile's windows, a stripe of rows at a time; rows and columns all meet. `edges` are the kernel rows
    and columns that a window should have, `form` has the sums that are wanted, of any shape.

    Inner products, but for those of inputs, are of at most `INNER_TERMS` terms in the features' dtype, and sums of
    these in float64.
    """

    def __init__(self, terms: Sequence[Term], meeting: Meeting, form: BlockSums) -> None:
        self._terms, self._meeting, self._form = terms, meeting, form
        self._device, self._dtype = terms[0].left.device, terms[0].left.dtype
        self._portions = [
            (index, slice(start, start + INNER_TERMS))
            for index, term in enumerate(terms)
            for start in range(0, _length(term, full=meeting.full), INNER_TERMS)
        ]
        self._names = list(form.parts())
        self._at_once = num_at_once(len(self._portions), len(self._names))
        self._several = self._at_once < len(self._portions)
        factors = [[terms[index].factors.get(name, 0.0) for index, _ in self._portions] for name in self._names]
        self._factors = torch.tensor(factors, dtype=torch.float64, device=self._device)
        num_sums = len(self._names)
        self.edges = window_edges(len(self._portions), num_sums, self._device)
        self._numbers_of_entry = self._at_once + 2 * num_sums + 8  # about: products, sums, statistics
        self._memory = ReusedMemory()

    def stripes(self, rows: slice = slice(None), columns: slice = slice(None)) -> Iterator[tuple[slice, BlockSums]]:
        """Kernel rows within a window, and the sums of all its columns there, in memory that the next ones take."""
        window = _Window(self._terms, self._meeting, rows, columns)
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


class _Window:
    """Products of some kernel rows and columns, one after the other; those of one term beside each other."""

    def __init__(self, terms: Sequence[Term], meeting: Meeting, rows: slice, columns: slice) -> None:
        self._terms, self._meeting, self._rows, self._columns = terms, meeting, rows, columns
        self._index = -1
        self._inputs: Inputs | None = None
        self._of_inputs: Tensor | None = None
        self._take(0)

    def _take(self, index: int) -> None:
        """Make the matrices of a term."""
        if index != self._index:
            self._index, term = index, self._terms[index]
            self._left = self._meeting.matrix(term.rows(self._rows))
            self._right = self._meeting.matrix(term.right[self._columns])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._left), len(self._right)

    def multiply_into_(self, result: Float[Tensor, "n1 n2"], index: int, part: slice) -> None:
        """Set to the product of a part of a term's features, times that of its inputs."""
        self._take(index)
        torch.mm(self._left[:, part], self._right[:, part].T, out=result)
        if (inputs := self._terms[index].inputs) is not None:
            of_inputs = self._product_of(inputs)
            width = len(result) // len(of_inputs)
            by_output = result.unflatten(1, (-1, width)).unflatten(0, (-1, width))
            by_output.mul_(of_inputs[:, None, :, None])

    def _product_of(self, inputs: Inputs) -> Float[Tensor, "n1 n2"]:
        """Made unless it was the last one made, in memory that is used again."""
        if inputs is not self._inputs:
            left, right = inputs.left[self._rows], inputs.right[self._columns]
            if self._of_inputs is None:
                self._of_inputs = left.new_empty(len(left), len(right))
            self._inputs = inputs
            torch.mm(left, right.T, out=self._of_inputs)
        assert self._of_inputs is not None
        return self._of_inputs


def num_at_once(num_products: int, num_sums: int) -> int:
    """Products of a window that are held at a time: where all are too many, no fewer than there are sums, which are
    gone through once for each time.
    """
    return min(num_products, _MOST_AT_ONCE if num_products <= _MOST_AT_ONCE else max(_MANY_AT_ONCE, num_sums))


def window_edges(num_products: int, num_sums: int, device: torch.device | str) -> tuple[int, int]:
    """Kernel rows and columns of a window: its products, and in float64 the sums of several passes, are no more numbers
    than it may take, where it does not have its fewest rows.
    """
    edge, numbers = _limits(device)
    at_once = num_at_once(num_products, num_sums)
    held = at_once + (2 * num_sums if at_once < num_products else 0)
    return min(edge, max(_FEWEST_ROWS, numbers // (edge * held))), edge


def window_bytes(item: int, num_sums: int, entries: int, threads: int, device: torch.device | str) -> int:
    """What `TermSums` takes on so many threads for a tile of so many entries, of numbers of so many bytes: products and
    sums of a window, the product of inputs, and in float64 a stripe, on a GPU all of the window and its sums.
    """
    edge, numbers = _limits(device)
    most = max(_MOST_AT_ONCE, num_sums)  # products that are held
    of_entry = most * item + 8 * num_sums
    window = min(max(item * numbers, _FEWEST_ROWS * edge * of_entry), entries * of_entry)
    stripe = 2 * numbers if torch.device(device).type == "cuda" else threads * _STRIPE_NUMBERS
    return window + item * min(edge**2, entries) + 8 * min(stripe, entries * (most + 2 * num_sums))


def _limits(device: torch.device | str) -> tuple[int, int]:
    """Of a window's edge, and of its numbers."""
    gpu = torch.device(device).type == "cuda"
    return (_GPU_EDGE, _GPU_WINDOW_NUMBERS) if gpu else (_EDGE, _WINDOW_NUMBERS)


def _length(term: Term, *, full: bool) -> int:
    """Terms of its inner products."""
    _, slots, outputs, columns = term.left.shape
    return slots * columns * (1 if full else outputs)
