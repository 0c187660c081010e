"""The projection of a run before it starts: operations, bytes on disk, peak bytes of a worker, seconds.

It adds up known shapes and what features say that they cost (`FeatureMap.costs`), and measures this machine's rate of
multiply-adds for a moment. It refuses nothing; `plan` does.

Units: operations are floating-point ones (a multiply-add is two); bytes; seconds.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nntk_dist.planning.feature_maps import FeatureGroups
from nntk_dist.products.feature_description import FeatureCosts
from nntk_dist.products.features import FeatureMap
from nntk_dist.products.weighted_products import product_window_bytes
from nntk_dist.runtime.threads import torch_threads
from nntk_dist.sampling.designs import Design, group_size
from nntk_dist.sampling.draws import DRAW_ELEMENTS
from nntk_dist.statistics.standard_errors import SAMPLE_ENTRIES
from nntk_dist.statistics.tile_estimates import tile_window_edges
from pipeline.config.choices import StandardErrorChoice
from pipeline.decisions.build import DTYPES, state_bytes
from pipeline.decisions.layout import (
    FEATURE_CACHE_BYTES,
    activation_elements,
    overlaps_writing,
    pass_operations,
    row_feature_bytes,
    writing_threads,
)
from pipeline.decisions.solver_choice import solver_cost
from pipeline.decisions.weighting_reference import num_reference
from pipeline.job.job import Job, intervals
from pipeline.storage.array_table import (
    StoredArray,
    feature_arrays,
    kernel_width,
    statistics_of,
)
from pipeline.storage.kernel_store import chunk_edge, inner_chunks
from pipeline.work.sampled_calibration import most_sampled_rows
from pipeline.work.stages import stages_of

# Resident size of a process that has imported torch, zarr, ray and this package and computed a little: measured with
# the CPU build of torch.
BASE_BYTES = 490 << 20
_RATE_EDGE = 768
# Share of a plain matrix product's rate that passes and tiles reach, elementwise work and storage included.
_EFFICIENCY = 0.4
_READ_BYTES_PER_SECOND = 1e9  # of a local disk or its cache, with checksums
_WINDOW_SUMS = 10  # float64 arrays of a window beside the sums by block: pairs, their parts, products, statistics


@dataclass(frozen=True)
class Projection:
    """What a run will take.

    Attributes:
        tasks: Number of tasks of each stage.
        operations: Operations of each stage.
        seconds: Time of each stage.
        disk_bytes: Bytes of each group of arrays before compression.
        worker_bytes: Peak memory of one worker over all stages with tiles.
        solve_bytes: Peak memory of spectrum and regression.
    """

    tasks: Mapping[str, int]
    operations: Mapping[str, float]
    seconds: Mapping[str, float]
    disk_bytes: Mapping[str, int]
    worker_bytes: int
    solve_bytes: int

    @property
    def total_disk_bytes(self) -> int:
        """Bytes of all arrays before compression."""
        return sum(self.disk_bytes.values())


def project(
    job: Job,
    features: FeatureMap,
    arrays: list[StoredArray],
    model: nn.Module,
    x: Tensor,
    *,
    num_workers: int,
    num_cpus: int,
    together: FeatureMap | FeatureGroups | None = None,
) -> Projection:
    """Project a job on `num_workers` workers of this machine, whose `num_cpus` the solvers share.

    `together` are the features of all groups, if they are computed in the same passes.
    """
    costs = feature_costs(job, features)
    solves = {stage: solver_cost(job, stage, tuple(arrays)) for stage in job.solvers}
    operations = _operations(job, features, costs, model, x)
    operations |= {stage: cost.operations for stage, cost in solves.items()}
    operations["features"] += num_workers * weighting_operations(job, model, x)
    rate = _rate(job.layout.dtype, job.layout.device) * _EFFICIENCY
    stages = stages_of(job.config.stages)
    parallel = {stage.name: 1 if stage.uses_all_threads else num_workers for stage in stages}
    tasks = {stage.name: sum(1 for _ in stage.tasks(job)) for stage in stages}
    each = share_of_rate(job)
    seconds = {
        name: count / (rate * each * max(1, min(parallel[name], tasks[name]))) for name, count in operations.items()
    }
    solving = _rate("float64", "cpu") * _EFFICIENCY * num_cpus
    for name, cost in solves.items():
        seconds[name] = cost.operations / solving + cost.read_bytes / _READ_BYTES_PER_SECOND
    disk: dict[str, int] = {}
    for array in arrays:
        group = "features" if "features" in array.path else array.path.split("/")[-1]
        disk[group] = disk.get(group, 0) + array.num_bytes
    return Projection(
        tasks=tasks,
        operations=operations,
        seconds=seconds,
        disk_bytes=disk,
        worker_bytes=_worker_bytes(job, features, costs, model, x, together or features),
        solve_bytes=BASE_BYTES + max(cost.memory_bytes for cost in solves.values()),
    )


def feature_costs(job: Job, features: FeatureMap) -> FeatureCosts:
    """Return what the features of a job cost."""
    return features.costs(job.spec.meeting, job.wanted)


def row_operations(job: Job, features: FeatureMap, costs: FeatureCosts, model: nn.Module, x: Tensor) -> float:
    """Return the operations of one row's features under all draws.

    They follow from the forward passes, or are counted on one example and one block if features take more than passes.
    """
    if costs.passes_per_draw is None:
        block, names = range(job.sizes.draws_per_block), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            features.compute(x[:1], names.to(x.device), block, features.columns)
        return float(counter.get_total_flops()) * job.sizes.num_draws / len(block)
    return pass_operations(model, x) * job.sizes.num_draws * costs.passes_per_draw


def weighting_operations(job: Job, model: nn.Module, x: Tensor) -> float:
    """Return the operations of the scores of all draws, which every worker computes for itself."""
    weighting, sizes = job.spec.weighting, job.sizes
    if weighting.is_fixed:
        return 0.0
    if not weighting.compares_outputs:  # ⟨w, θ_s⟩, and w from Q and K
        return 2.0 * sizes.num_parameters * (sizes.num_draws + 2 * weighting.dimension)
    passes = 1 if weighting.per_example else 1 + sizes.num_draws  # with scores per example, features have the outputs
    return pass_operations(model, x) * passes * num_reference(job.spec, sizes.num_train)


def weighting_bytes(job: Job, x: Tensor) -> int:
    """Return the bytes that attention weights take while they are made.

    These are the reference batch, parameters and perturbations in float64, and outputs of several draws.
    """
    weighting, sizes = job.spec.weighting, job.sizes
    if weighting.is_fixed:
        return 0
    count = num_reference(job.spec, sizes.num_train)
    inputs = count * x[:1].numel()
    numbers = max(sizes.num_parameters, inputs, count * sizes.num_outputs)
    at_once = max(numbers, min(DRAW_ELEMENTS, numbers * sizes.draws_per_block))
    parts = 1 if not weighting.compares_outputs else 3  # perturbations; outputs, their copy in float64, the scores
    return x.element_size() * inputs + 8 * (2 * sizes.num_parameters + (1 + parts) * at_once)


def _operations(job: Job, features: FeatureMap, costs: FeatureCosts, model: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the operations of each stage that does not solve."""
    sizes = job.sizes
    rows = sizes.num_train + sizes.num_test
    one_pass, one_row = pass_operations(model, x), row_operations(job, features, costs, model, x)
    per_entry = costs.entry_operations
    tile_rows = len(intervals(sizes.num_train, job.layout.tile)) * sizes.num_train + rows
    recomputed = 0.0 if job.layout.store_features else one_row
    tiles = float(job.layout.write_tiles)
    diagonal = per_entry * sizes.num_test
    return {
        "features": rows * (one_row if job.layout.store_features else one_pass),
        "metric": costs.metric_operations,
        "calibration": float(job.layout.stderr != StandardErrorChoice.NONE)
        * (192.0 * recomputed + 2.0 * SAMPLE_ENTRIES * per_entry),
        "gram": tiles
        * (per_entry * sizes.num_train * (sizes.num_train + job.layout.tile) / 2 + recomputed * tile_rows),
        "test": per_entry * sizes.num_train * sizes.num_test + recomputed * rows if tiles else diagonal,
    }


def group_bytes(job: Job) -> int:
    """Return the bytes of an orthogonal group while it is made: normals, directions and a copy, in float64."""
    if job.spec.design != Design.ORTHOGONAL:
        return 0
    sizes = job.sizes
    group = group_size("orthogonal", sizes.draws_per_block, sizes.num_parameters)
    return 3 * 8 * group * sizes.num_parameters


def _worker_bytes(
    job: Job,
    features: FeatureMap,
    costs: FeatureCosts,
    model: nn.Module,
    x: Tensor,
    together: FeatureMap | FeatureGroups,
) -> int:
    """Return the peak of one worker: what it always holds, and the largest feature, calibration and tile task."""
    layout, sizes = job.layout, job.sizes
    item = torch.empty(0, dtype=DTYPES[layout.dtype]).element_size()
    row_bytes = item * sum(spec.num_numbers for spec in features.arrays)
    held = BASE_BYTES + 5 * state_bytes(model) + costs.held_bytes + group_bytes(job) + weighting_bytes(job, x)
    rows = min(layout.shard_rows if layout.store_features else layout.tile, sizes.num_train)
    inputs = rows * x[0].numel() * x.element_size()
    computed = row_feature_bytes(together, layout.dtype)
    chunk = min(layout.shard_rows, sizes.num_train) * computed * layout.chunk_draws // sizes.num_draws
    activations = costs.pass_copies * item * layout.batch * activation_elements(model, x)
    feature_task = (3 * chunk if layout.store_features else 0) + activations + inputs
    share = layout.outputs_at_once / sizes.num_kernel_outputs if not layout.store_features else 1.0
    tile_task = _tile_bytes(job, features, costs, int(row_bytes * share))
    sample = most_sampled_rows(job) * row_bytes * share * (1 + (8 / item if costs.copies_sample else 0))
    products = SAMPLE_ENTRIES * 8 * 4 * (sizes.num_blocks**2 if job.spec.pair_blocks else sizes.num_blocks)
    calibration_task = 0 if layout.stderr == StandardErrorChoice.NONE else sample + products
    return int(held + max(feature_task, calibration_task) + tile_task)


def _tile_bytes(job: Job, features: FeatureMap, costs: FeatureCosts, row_bytes: int) -> int:
    """Return the bytes of a tile task.

    They are the features that are kept, and what is added while one row set is prepared; the sums of a window; the
    results, and what compressing and writing them takes.
    """
    layout, sizes, width = job.layout, job.sizes, kernel_width(job)
    item = torch.empty(0, dtype=DTYPES[layout.dtype]).element_size()
    tile = min(layout.tile, sizes.num_train)
    entries = (tile * width) ** 2
    window = min(entries, math.prod(tile_window_edges(layout.device)))
    by_block = sizes.num_blocks + features.num_sketch_groups if job.wanted.stderr else 0
    prepared = row_bytes * costs.prepared_share
    everything = int((sizes.num_train + sizes.num_test) * prepared)
    parts = 1 if layout.store_features else -(-sizes.num_kernel_outputs // layout.outputs_at_once)
    kept = min(everything * parts, max(2 * tile * prepared, FEATURE_CACHE_BYTES))
    sums = entries * 8 * (by_block + 2) if parts > 1 else 0
    if costs.pair_numbers or parts > 1:
        sums += window * 8 * (2 * by_block + _WINDOW_SUMS)
    products = product_window_bytes(item, by_block + 2, entries, layout.threads, layout.device)
    sums += item * costs.pair_numbers or products
    sums += costs.product_bytes
    arrays = len(statistics_of(job))
    computing = tile * row_bytes + sums  # one row set at a time is prepared
    written = 1.0 + 2.0 * chunk_edge(tile * width) / (tile * width)  # a shard; a row of its chunks in order, compressed
    writing = min(2 * arrays, writing_threads(job)) * written * item * entries
    results = max(2 if job.spec.pair_blocks else 1, arrays) * item * entries
    shards = (inner_chunks(array.shards, item) for array in feature_arrays(job))
    reading = 2 * layout.threads * item * max(map(math.prod, shards), default=0)  # as it lies in the file, and decoded
    at_once = 2 if overlaps_writing(job) else 1
    # Threads that read or write keep the memory that they have used, or work while another tile is computed.
    return int(kept + at_once * results + computing + reading + writing)


def share_of_rate(job: Job) -> float:
    """Return a worker's share of `_rate`: one for each of its threads, or its share of a GPU."""
    if job.layout.device.startswith("cuda"):
        return 1.0 / job.config.compute.workers_per_gpu
    return float(job.layout.threads)


def _rate(dtype: str, device: str) -> float:
    """Measure the operations a second of a plain matrix product on one thread or a whole GPU: the best of three."""
    with torch_threads(1):
        a = torch.randn(_RATE_EDGE, _RATE_EDGE, dtype=DTYPES[dtype], device=device)
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            float((a @ a)[0, 0])
            best = min(best, time.perf_counter() - start)
    return 2.0 * _RATE_EDGE**3 / best
