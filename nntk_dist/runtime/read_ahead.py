"""Reading the next items while the present one is in use: storage and arithmetic side by side, in little memory.

It knows neither stores nor kernels, and keeps the order.

Axes: none.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

_READERS = 2  # decoding a checksum takes a core about as long as a product with tens of vectors


def read_ahead(items: Iterable[Item], read: Callable[[Item], Value]) -> Iterator[tuple[Item, Value]]:
    """Yield `(item, read(item))` for every item, in order; at most two further values are held.

    Args:
        items: read from one thread, as they are needed.
        read: called in threads; it must not depend on the order of its calls.

    Raises:
        Exception: `read` raised it; it is raised here when the turn of its item comes.

    Example:
        >>> list(read_ahead([1, 2], lambda number: number**2))
        [(1, 1), (2, 4)]
    """
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[Item, Future[Value]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > _READERS:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)


def _next(waiting: "deque[tuple[Item, Future[Value]]]") -> tuple[Item, Value]:
    item, future = waiting.popleft()
    return item, future.result()
