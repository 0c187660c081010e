"""Benchmarks of the engine: what `scripts/bench.py` measures, keeps and writes down, a section a room.

figures     what a benchmark answers: ratios within one run, each with what was asked of it
perturb     perturbed passes against plain inference
memory      measured peaks against projected ones
page        the page, from the JSON file alone
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from scripts.benchmarks import memory, perturb
from scripts.studies.cells import Cell

# Sections of the page, in its order.
SECTIONS: Mapping[str, Callable[..., list[Cell]]] = MappingProxyType({"perturb": perturb.cells, "memory": memory.cells})
