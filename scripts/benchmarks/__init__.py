"""Benchmarks of the engine: what `scripts/bench.py` measures, keeps and writes down, a section a room.

figures     what a benchmark answers: ratios within one run, each with what was asked of it
perturb     perturbed passes against plain inference
tile        Gram tiles against plain matrix products
page        the page, from the JSON file alone
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from scripts.benchmarks import tile
from scripts.studies.cells import Cell

# Sections of the page, in its order.
SECTIONS: Mapping[str, Callable[..., list[Cell]]] = MappingProxyType({"tile": tile.cells})
