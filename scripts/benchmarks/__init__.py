"""Benchmarks of the engine: what `scripts/bench.py` measures, keeps and writes down; one module for each section.

    figures     the results of a benchmark: ratios within one run, each with its target
    perturb     perturbed passes against plain inference
    tile        Gram tiles against plain matrix products
    local       the ordinary tangent kernel, and what kernels of many gradients cost beside it
    solvers     spectra and regressions against the matrix products that they need
    end_to_end  whole runs of MNIST, from configuration to report
    scaling     two workers against one, scheduling, a simulated cluster
    memory      measured peaks against projected ones
    peers       the ordinary tangent kernel against neural-tangents, in a separate environment
    runs        runs in a separate process, observed from outside
    page        the page, from the JSON file alone

Cells and answers come from `scripts.studies`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from scripts.benchmarks import end_to_end, local, memory, peers, perturb, scaling, solvers, tile
from scripts.studies.cells import Cell

# Sections of the page, in its order.
SECTIONS: Mapping[str, Callable[..., list[Cell]]] = MappingProxyType(
    {
        "perturb": perturb.cells,
        "perturb-gpu": partial(perturb.cells, device="cuda"),
        "tile": tile.cells,
        "tile-gpu": partial(tile.cells, device="cuda"),
        "local": local.cells,
        "local-gpu": partial(local.cells, device="cuda"),
        "solvers": solvers.cells,
        "end-to-end": end_to_end.cells,
        "scaling": scaling.cells,
        "memory": memory.cells,
        "peers": peers.cells,
    }
)
NEEDS_DATA = ("end-to-end",)
NEEDS_GPU = ("perturb-gpu", "tile-gpu", "local-gpu")
