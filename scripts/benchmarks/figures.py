"""What a benchmark answers: figures, each a ratio of two things measured side by side in one run.

Machines are shared and noisy: so what is compared runs in turns, again and again, and the best time of each counts.
Absolute seconds are kept beside a ratio and prove nothing.

Units: seconds.
"""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

import torch

from pipeline.runtime.allocator import keep_freed_memory
from scripts.studies.cells import Answer


@dataclass(frozen=True)
class Figure:
    """A measured ratio; `least` or `most` is its target, None without one.

    `details` are the measured numbers behind it, seconds and sizes, by name.
    """

    what: str
    value: float
    least: float | None = None
    most: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def answer(*figures: Figure) -> Answer:
    """Figures as a cell keeps them."""
    return {"figures": [asdict(figure) for figure in figures]}


def as_a_worker(measure: Callable[..., Answer], *arguments: object) -> Answer:
    """Call a function in a new process with the allocator of a worker, and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=keep_freed_memory) as process:
        return process.submit(measure, *arguments).result()


def best_seconds(actions: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """The least time of each action over `rounds` rounds, in which they take turns, after one that does not count."""
    best = dict.fromkeys(actions, math.inf)
    for number in range(rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if torch.cuda.is_initialized():  # a call returns before its work is done there
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            if number:
                best[name] = min(best[name], seconds)
    return best
