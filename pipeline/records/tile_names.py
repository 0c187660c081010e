"""An exact set of tile names in a fraction of a byte for each: what a ledger of a million tiles keeps in memory.

Names that end in one or two numbers ("diagonal/7", "train/3/5") are bits of pages: 32 rows by 32 columns of pairs, or
1,024 single numbers. So the tiles of a Gram matrix take half a byte each, tiles in a single column about ten. Any other
name is kept as text. No two names share a bit.

Axes: i row and j column numbers of a name.
"""

import sys
from collections.abc import Iterable, Iterator, MutableSet

_SHIFT = 5  # pages of 2^5 × 2^5 names
_EDGE = 1 << _SHIFT
_ONE_NUMBER = -1  # the page row of names with one number
_Page = tuple[str, int, int]  # text before the numbers, page row, page column


class TileSet(MutableSet[str]):
    """A set of strings; adding one, or asking for one, takes about a microsecond.

    Args:
        names: to begin with.

    Example:
        >>> tiles = TileSet(["train/3/5", "metric"])
        >>> "train/3/5" in tiles, "train/5/3" in tiles, len(tiles)
        (True, False, 2)
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._pages: dict[_Page, int] = {}
        self._others: set[str] = set()
        self._count = 0
        for name in names:
            self.add(name)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        place = _place(name)
        if place is None:
            return name in self._others
        page, bit = place
        return bool(self._pages.get(page, 0) >> bit & 1)

    def __len__(self) -> int:
        return self._count + len(self._others)

    def __iter__(self) -> Iterator[str]:
        for (text, row, column), bits in self._pages.items():
            for bit in range(bits.bit_length()):
                if bits >> bit & 1:
                    yield _name(text, row, column, bit)
        yield from self._others

    def add(self, name: str) -> None:
        """Add a name."""
        place = _place(name)
        if place is None:
            self._others.add(name)
            return
        page, bit = place
        bits = self._pages.get(page, 0)
        if not bits >> bit & 1:
            self._pages[page] = bits | 1 << bit
            self._count += 1

    def discard(self, name: str) -> None:
        """Remove a name, if it is there."""
        place = _place(name)
        if place is None:
            self._others.discard(name)
            return
        page, bit = place
        bits = self._pages.get(page, 0)
        if bits >> bit & 1:
            self._count -= 1
            self._pages[page] = bits ^ 1 << bit
            if not self._pages[page]:
                del self._pages[page]

    def clear(self) -> None:
        """Remove all names."""
        self._pages, self._others, self._count = {}, set(), 0


def _place(name: str) -> tuple[_Page, int] | None:
    """Return page and bit of a name; None if its numbers do not determine it, as for "tile/007" or "metric"."""
    head, _, last = name.rpartition("/")
    if not _is_number(last):
        return None
    j = int(last)
    middle = head.rpartition("/")[2]
    if not _is_number(middle):
        text = sys.intern(name[: len(name) - len(last)])
        return (text, _ONE_NUMBER, j >> 2 * _SHIFT), j & (_EDGE * _EDGE - 1)
    i = int(middle)
    text = sys.intern(head[: len(head) - len(middle)])
    return (text, i >> _SHIFT, j >> _SHIFT), (i & (_EDGE - 1)) << _SHIFT | j & (_EDGE - 1)


def _name(text: str, row: int, column: int, bit: int) -> str:
    """Return the name at a bit of a page."""
    if row == _ONE_NUMBER:
        return f"{text}{(column << 2 * _SHIFT) + bit}"
    return f"{text}{(row << _SHIFT) + (bit >> _SHIFT)}/{(column << _SHIFT) + (bit & (_EDGE - 1))}"


def _is_number(text: str) -> bool:
    """Return whether the text is a number as Python writes it: ASCII digits without leading zeros."""
    return text.isdecimal() and text.isascii() and (text[0] != "0" or text == "0")
