"""What a caller wants of products: standard errors or not, and which side of a tile a row set stands on."""

from dataclasses import dataclass
from enum import Flag, auto


class Side(Flag):
    """The side of its tiles on which a row set stands; `BOTH` is `ROWS | COLUMNS`."""

    ROWS = auto()
    COLUMNS = auto()
    BOTH = ROWS | COLUMNS


@dataclass(frozen=True)
class Wanted:
    """What to prepare and to sum.

    Attributes:
        stderr: Whether sums by block, from which standard errors are made, are wanted too.
        side: Which side of its tiles the row set stands on. Some features need less as rows than as columns. Products
            of two row sets do not depend on it.

    Example:
        >>> Wanted(stderr=True).side
        <Side.BOTH: 3>
        >>> Side.ROWS in Wanted(stderr=False, side=Side.COLUMNS).side
        False
    """

    stderr: bool
    side: Side = Side.BOTH

    def on(self, side: Side) -> "Wanted":
        """Return the same for a row set that stands on `side`."""
        return Wanted(self.stderr, side)
