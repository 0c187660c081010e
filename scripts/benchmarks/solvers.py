"""The solvers of the later stages against what they cannot do without: matrix products, and reading what is stored.

A pass over stored tiles reads, decodes, checks and casts every tile and multiplies by it, twice off the diagonal; its
measure is all but the products alone and a product of the same size in memory alone, one after the other. Sums of
products of a factor's columns are measured against one product of the same shape. All in float64, on all CPUs.

Axes: n kernel rows, F columns of a factor, v vectors.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from nntk_dist.analysis.factor_products import column_products
from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.runtime.read_ahead import read_ahead
from nntk_dist.runtime.threads import torch_threads
from pipeline.storage.array_table import StoredArray
from pipeline.storage.kernel_arrays import KernelArrays
from pipeline.storage.run_storage import RunStorage
from pipeline.storage.solver_inputs import streamed_kernel
from scripts.benchmarks.figures import Figure, answer, best_seconds
from scripts.studies.cells import Answer, Cell

_BLOCK_ROWS = 1024


def cells(*, quick: bool) -> list[Cell]:
    """A pass over stored tiles, and the products of a factor's columns."""
    tiles = {"rows": 512, "tile": 128, "vectors": 16} if quick else {"rows": 8192, "tile": 1024, "vectors": 64}
    factor = {"rows": 1024, "columns": 128} if quick else {"rows": 16384, "columns": 2048}
    rounds = {"rounds": 1 if quick else 5}
    return [
        Cell("pass", tiles | rounds, partial(_pass, **tiles, **rounds)),
        Cell("factor", factor | rounds, partial(_factor, **factor, **rounds)),
    ]


def _pass(*, rows: int, tile: int, vectors: int, rounds: int) -> Answer:
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((rows, rows), dtype=np.float32)
    matrix += matrix.T
    right = generator.standard_normal((rows, vectors))
    with tempfile.TemporaryDirectory() as folder, _all_cpus():
        store = KernelArrays(RunStorage(Path(folder)))
        store.create([StoredArray("train/gram", (rows, rows), (tile, tile), ("row", "col"), "float32")], {})
        for i in range(0, rows, tile):
            for j in range(0, rows, tile):
                store.write("train/gram", (i, j), matrix[i : i + tile, j : j + tile])
        kernel, whole = streamed_kernel(store, "train/gram"), matrix.astype(np.float64)
        stripes, lying = kernel.stripes, np.ascontiguousarray(right.T)  # the faster of the two ways
        upper = [(own, other) for i, own in enumerate(stripes) for other in stripes[i:]]
        seconds = best_seconds(
            {
                "pass": lambda: kernel.product(right),
                "read": lambda: list(map(len, read_ahead(upper, lambda place: kernel.read(*place).shape))),
                "product": lambda: lying @ whole,
            },
            rounds=rounds,
        )
    operations = 2.0 * rows**2 * vectors
    details = {f"{name}_seconds": value for name, value in seconds.items()}
    details["gflops"] = operations / seconds["pass"] / 1e9
    value = (seconds["read"] + seconds["product"]) / seconds["pass"]
    what = f"pass over {rows:,} stored rows with {vectors} vectors: reading and product alone, over both at once"
    return answer(Figure(what, value, details=details))


def _factor(*, rows: int, columns: int, rounds: int) -> Answer:
    generator = np.random.default_rng(0)
    stored = generator.standard_normal((rows, columns), dtype=np.float32)
    intervals = tuple((start, min(start + _BLOCK_ROWS, rows)) for start in range(0, rows, _BLOCK_ROWS))
    source = FactorRows(rows, columns, intervals, lambda own: stored[slice(*own)].astype(np.float64))
    whole = torch.from_numpy(stored.astype(np.float64))
    with _all_cpus():
        seconds = best_seconds(
            {"sums": lambda: column_products(source), "product": lambda: whole.T @ whole}, rounds=rounds
        )
    details = {f"{name}_seconds": value for name, value in seconds.items()}
    details["gflops"] = 2.0 * rows * columns**2 / seconds["sums"] / 1e9
    what = f"products of {columns:,} columns over {rows:,} rows in blocks, against one product of that shape"
    return answer(Figure(what, seconds["product"] / seconds["sums"], details=details))


@contextmanager
def _all_cpus() -> Iterator[None]:
    """As the stages that solve have them."""
    cpus = len(os.sched_getaffinity(0))
    with torch_threads(cpus), threadpool_limits(cpus, user_api="blas"):
        yield
