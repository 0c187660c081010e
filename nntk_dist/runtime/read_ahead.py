"""Reading what comes next while the present is worked on: storage and arithmetic at the same time, with little memory.

It knows neither stores nor kernels, and changes no order.

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
    """`(item, read(item))` for every item, in order; at most two further values are held.

    `read` is called in threads: it must not depend on the order of its calls.

    Raises: whatever `read` raises, when its item's turn comes.
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
