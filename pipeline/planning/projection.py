"""What a run will take, before it is launched: operations, bytes on disk, peak bytes of a worker, seconds.

Sums over known shapes, and one short measurement of this machine's rate of multiply-adds. It refuses nothing; `plan`
does.

Units: operations are floating-point ones (a multiply-add is two); bytes; seconds.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.estimators.output_differences import DifferenceFeatures
from nntk_dist.models.noise import is_random
from nntk_dist.products.features import FeatureMap
from nntk_dist.products.noise_pairs import CHUNK_ELEMENTS
from nntk_dist.products.weighted_products import window_bytes
from nntk_dist.runtime.threads import torch_threads
from nntk_dist.sampling.designs import group_size
from nntk_dist.sampling.draws import DRAW_ELEMENTS
from nntk_dist.statistics.estimates import SAMPLE_ENTRIES
from nntk_dist.statistics.tile_estimates import window_edges
from pipeline.decisions.build import DTYPES, state_bytes
from pipeline.decisions.layout import FEATURE_CACHE_BYTES, activation_elements, overlaps_writing, writing_threads
from pipeline.decisions.solvers import SOLVED, Solver, solver_bytes, solver_operations, solver_reads
from pipeline.decisions.weighting_reference import num_reference
from pipeline.job.job import Job, intervals
from pipeline.storage.array_table import (
    StoredArray,
    feature_arrays,
    holds_differences,
    holds_metric,
    holds_sketch,
    kernel_width,
    statistics_of,
)
from pipeline.storage.kernel_store import chunk_edge, inner_chunks
from pipeline.work.sampled_calibration import most_sampled_rows
from pipeline.work.stages import ORDER

# Resident size of a process that has imported torch, zarr, ray and this package and computed a little (measured, CPU
# build).
BASE_BYTES = 490 << 20
_RATE_EDGE = 768
# Share of a plain matrix product's rate that passes and tiles reach as a whole: elementwise work, calls, reading,
# writing.
_EFFICIENCY = 0.4
_READ_BYTES_PER_SECOND = 1e9  # of a local disk or its cache, checksums verified
# Features of layers in factors, which are held as they are computed.
_FACTORS = ("input_", "gradient_", "direction_", "noise_")
_PAIR_BYTES = 1000  # of the pair of draws of a layer that is left in factors: measured
_WINDOW_SUMS = 10  # of a window, in float64, beside the sums by block: of pairs, their parts, products, statistics


@dataclass(frozen=True)
class Projection:
    """Per stage where a mapping; `worker_bytes` is the peak of one worker over all tiled stages, `solve_bytes` of the
    others.
    """

    tasks: Mapping[str, int]
    operations: Mapping[str, float]
    seconds: Mapping[str, float]
    disk_bytes: Mapping[str, int]
    worker_bytes: int
    solve_bytes: int

    @property
    def total_disk_bytes(self) -> int:
        return sum(self.disk_bytes.values())


def project(
    job: Job,
    features: FeatureMap,
    arrays: list[StoredArray],
    model: nn.Module,
    x: Tensor,
    *,
    num_workers: int,
    solvers: Mapping[str, Solver],
    num_cpus: int,
) -> Projection:
    """The projection of a job on `num_workers` workers of this machine, whose `num_cpus` the solvers share."""
    operations = _operations(job, features, model, x, solvers)
    operations["features"] += num_workers * weighting_operations(job, model, x)
    rate = _rate(job.layout.dtype, job.layout.device) * _EFFICIENCY
    parallel = {stage.NAME: 1 if stage.USES_ALL_THREADS else num_workers for stage in ORDER}
    tasks = {stage.NAME: sum(1 for _ in stage.tasks(job)) for stage in ORDER}
    each = share_of_rate(job)
    seconds = {
        name: count / (rate * each * max(1, min(parallel[name], tasks[name]))) for name, count in operations.items()
    }
    solving = _rate("float64", "cpu") * _EFFICIENCY * num_cpus
    factor_bytes = sum(array.num_bytes for array in arrays if array.path == "train/features")
    for name, solver in solvers.items():
        reading = solver_reads(job, name, solver, factor_bytes) / _READ_BYTES_PER_SECOND
        seconds[name] = operations[name] / solving + reading
    disk: dict[str, int] = {}
    for array in arrays:
        group = "features" if "features" in array.path else array.path.split("/")[-1]
        disk[group] = disk.get(group, 0) + array.num_bytes
    return Projection(
        tasks=tasks,
        operations=operations,
        seconds=seconds,
        disk_bytes=disk,
        worker_bytes=worker_bytes(job, features, model, x),
        solve_bytes=solve_bytes(job, solvers),
    )


def pass_operations(model: nn.Module, x: Tensor) -> float:
    """Operations of one forward pass over one example (matrix products and convolutions)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    return float(max(1, counter.get_total_flops()))


def row_operations(job: Job, features: FeatureMap, model: nn.Module, x: Tensor) -> float:
    """Operations of one row's features under all draws: passes, or counted on one example and block where sketched."""
    if features.num_sketch_groups:
        block, names = range(job.sizes.num_draws // job.sizes.num_blocks), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            features.compute(x[:1], names.to(x.device), block, features.columns)
        return float(counter.get_total_flops()) * job.sizes.num_blocks
    passes = 1.0 if job.decision.estimator in ("weight", "activation") else 1.0 + len(features.columns)
    if is_random(model) and passes == 1.0:  # differences have a base pass for every group, which shares its noise
        per_block = job.sizes.num_draws // job.sizes.num_blocks
        passes += 1.0 / group_size(job.spec.design, per_block, job.sizes.num_parameters)
    return pass_operations(model, x) * job.sizes.num_draws * passes


def weighting_operations(job: Job, model: nn.Module, x: Tensor) -> float:
    """Operations of the scores of all draws, which every worker computes for itself."""
    weighting, sizes = job.spec.weighting, job.sizes
    if weighting.is_fixed:
        return 0.0
    if not weighting.compares_outputs:  # ⟨w, θ_s⟩, and w from Q and K
        return 2.0 * sizes.num_parameters * (sizes.num_draws + 2 * weighting.dimension)
    passes = 1 if weighting.per_example else 1 + sizes.num_draws  # of their own scores, examples bring the outputs
    return pass_operations(model, x) * passes * num_reference(job.spec, sizes.num_train)


def weighting_bytes(job: Job, x: Tensor) -> int:
    """What weights take while they are made: the reference batch, parameters and perturbations in float64, outputs of
    several draws.
    """
    weighting, sizes = job.spec.weighting, job.sizes
    if weighting.is_fixed:
        return 0
    count = num_reference(job.spec, sizes.num_train)
    inputs = count * x[:1].numel()
    numbers = max(sizes.num_parameters, inputs, count * sizes.num_outputs)
    at_once = max(numbers, min(DRAW_ELEMENTS, numbers * sizes.num_draws // sizes.num_blocks))
    parts = 1 if not weighting.compares_outputs else 3  # perturbations; outputs, their copy in float64 and what is made
    return x.element_size() * inputs + 8 * (2 * sizes.num_parameters + (1 + parts) * at_once)


def entry_operations(job: Job, features: FeatureMap) -> float:
    """Operations of one entry of the kernel (summed over outputs), standard errors included."""
    sizes, paired = job.sizes, job.spec.pair_blocks
    copies, errors = kernel_width(job), job.layout.stderr == "entry"
    shared = features.shared if isinstance(features, GradientFeatures) else frozenset[int]()
    formed = (1.0 + 1.0 / sizes.num_blocks if errors else 1.0) if paired else 1.0
    metric = (3.0 if errors else 2.0) if paired else 1.0
    total = 0.0
    for spec in features.arrays:
        width, place = math.prod(spec.shape[1:]), spec.name.rpartition("_")[2]
        if spec.name.startswith(("input_", "gradient_")):
            each = 1 if spec.name.startswith("input_") else copies
            pairs = float(sizes.num_draws**2 if paired else sizes.num_draws)
            if place.isdigit() and int(place) in shared:  # one product of h̃, mean output gradients as formed ones
                pairs = 1.0 if spec.name.startswith("input_") else formed * sizes.num_blocks
            total += 2.0 * width * each * pairs
        elif spec.name.startswith(("direction_", "noise_")):  # two Gram matrices for every pair of draws
            total += 2.0 * math.prod(spec.shape) * spec.shape[0] * spec.shape[1]
        elif spec.name == "differences":
            total += 2.0 * metric * spec.shape[0] * width * copies
        else:
            groups = 1.0 if errors and spec.name == "sketch" else 0.0
            total += 2.0 * (formed + groups) * spec.shape[0] * width * copies
    return total


def _operations(
    job: Job, features: FeatureMap, model: nn.Module, x: Tensor, solvers: Mapping[str, Solver]
) -> dict[str, float]:
    sizes = job.sizes
    rows = sizes.num_train + sizes.num_test
    one_pass, one_row = pass_operations(model, x), row_operations(job, features, model, x)
    per_entry = entry_operations(job, features)
    tile_rows = len(intervals(sizes.num_train, job.layout.tile)) * sizes.num_train + rows
    recomputed = 0.0 if job.layout.store_features else one_row
    tiles = float(job.layout.write_tiles)
    diagonal = per_entry * sizes.num_test
    makes_metric = holds_metric(job) and not holds_sketch(job)
    return {
        "features": rows * (one_row if job.layout.store_features else one_pass),
        "metric": 2.0 * sizes.num_draws**2 * sizes.num_parameters if makes_metric else 0.0,
        "calibration": 0.0 if job.layout.stderr == "none" else 192.0 * one_row + 8192.0 * per_entry,
        "gram": tiles
        * (per_entry * sizes.num_train * (sizes.num_train + job.layout.tile) / 2 + recomputed * tile_rows),
        "test": per_entry * sizes.num_train * sizes.num_test + recomputed * rows if tiles else diagonal,
        **{name: solver_operations(job, name, solvers[name]) for name in SOLVED},
    }


def group_bytes(job: Job) -> int:
    """What an orthogonal group takes while it is made: its normals, its directions and a copy, in float64."""
    if job.spec.design != "orthogonal":
        return 0
    sizes = job.sizes
    group = group_size("orthogonal", sizes.num_draws // sizes.num_blocks, sizes.num_parameters)
    return 3 * 8 * group * sizes.num_parameters


def worker_bytes(job: Job, features: FeatureMap, model: nn.Module, x: Tensor) -> int:
    """Peak of one worker: what every worker holds, and the largest of a feature, a calibration and a tile task."""
    layout, sizes = job.layout, job.sizes
    item = torch.empty(0, dtype=DTYPES[layout.dtype]).element_size()
    row_bytes = item * sum(math.prod(spec.shape) for spec in features.arrays)
    metric = 4 * 8 * sizes.num_draws**2 if holds_differences(job) and job.spec.pair_blocks else 0
    held = BASE_BYTES + 5 * state_bytes(model) + metric + group_bytes(job) + weighting_bytes(job, x)
    held += features.probe_bytes + features.pair_weight_bytes if isinstance(features, GradientFeatures) else 0
    product = features.product if isinstance(features, DifferenceFeatures) else None
    held += 0 if product is None else product.trial_bytes
    rows = min(layout.shard_rows if layout.store_features else layout.tile, sizes.num_train)
    inputs = rows * x[0].numel() * x.element_size()
    chunk = min(layout.shard_rows, sizes.num_train) * row_bytes * layout.chunk_draws // sizes.num_draws
    feature_task = (3 * chunk if layout.store_features else 0) + pass_bytes(job, features, model, x) + inputs
    share = layout.outputs_at_once / sizes.num_kernel_outputs if not layout.store_features else 1.0
    tile_task = _tile_bytes(job, features, int(row_bytes * share))
    in_factors = any(spec.name.startswith(_FACTORS) for spec in features.arrays)
    sample = most_sampled_rows(job) * row_bytes * share * (1 + (8 / item if in_factors else 0))
    products = SAMPLE_ENTRIES * 8 * 4 * (sizes.num_blocks**2 if job.spec.pair_blocks else sizes.num_blocks)
    calibration_task = 0 if layout.stderr == "none" else sample + products
    return int(held + max(feature_task, calibration_task) + tile_task)


def pass_bytes(job: Job, features: FeatureMap, model: nn.Module, x: Tensor) -> int:
    """Activations of one batch, and their gradients for every output where they are kept to be differentiated."""
    copies = 1 + len(features.columns) if isinstance(features, GradientFeatures) else 1
    item = torch.empty(0, dtype=DTYPES[job.layout.dtype]).element_size()
    return copies * item * job.layout.batch * activation_elements(model, x)


def solve_bytes(job: Job, solvers: Mapping[str, Solver]) -> int:
    """Peak of the spectrum and of the regression, by their methods."""
    return BASE_BYTES + max(solver_bytes(job, name, solver) for name, solver in solvers.items())


def _tile_bytes(job: Job, features: FeatureMap, row_bytes: int) -> int:
    """Of a tile task: features that are kept, and the more of them that is made in preparing one row set; the sums of a
    window; the results, and what compressing and writing them takes.
    """
    layout, sizes, width = job.layout, job.sizes, kernel_width(job)
    item = torch.empty(0, dtype=DTYPES[layout.dtype]).element_size()
    tile = min(layout.tile, sizes.num_train)
    entries = (tile * width) ** 2
    window = min(entries, math.prod(window_edges(layout.device)))
    by_block = sizes.num_blocks + features.num_sketch_groups if layout.stderr == "entry" else 0
    prepared = row_bytes * _prepared_share(job, features)
    everything = int((sizes.num_train + sizes.num_test) * prepared)
    parts = 1 if layout.store_features else -(-sizes.num_kernel_outputs // layout.outputs_at_once)
    kept = min(everything * parts, max(2 * tile * prepared, FEATURE_CACHE_BYTES))
    names = [spec.name for spec in features.arrays]
    noise = any(name.startswith("noise_") for name in names)
    sums = entries * 8 * (by_block + 2) if parts > 1 else 0
    if noise or parts > 1:
        sums += window * 8 * (2 * by_block + _WINDOW_SUMS)
    products = window_bytes(item, by_block + 2, entries, layout.threads, layout.device)
    sums += 4 * item * CHUNK_ELEMENTS if noise else products
    if job.spec.pair_blocks:
        sums += _PAIR_BYTES * sizes.num_draws**2 * sum(name.startswith("input_") for name in names)
    arrays = len(statistics_of(job))
    computing = tile * row_bytes + sums  # one row set at a time is made ready
    written = 1.0 + 2.0 * chunk_edge(tile * width) / (tile * width)  # a shard; a row of its chunks in order, compressed
    writing = min(2 * arrays, writing_threads(job)) * written * item * entries
    results = max(2 if job.spec.pair_blocks else 1, arrays) * item * entries
    stored = feature_arrays(job, features.arrays)
    chunk = item * max((math.prod(inner_chunks(array.shards, item)) for array in stored), default=0)
    reading = 2 * layout.threads * chunk  # as it lies in the file, and decoded
    at_once = 2 if overlaps_writing(job) else 1
    # Threads that read or write do not give back what they have used, or do it while another tile is computed.
    return int(kept + at_once * results + computing + reading + writing)


def _prepared_share(job: Job, features: FeatureMap) -> float:
    """What prepared features take, over features as they are computed."""
    if job.spec.pair_blocks and holds_differences(job):
        return 3.0
    if all(spec.name.startswith(_FACTORS) for spec in features.arrays) or not job.spec.pair_blocks:
        return 1.0
    if job.layout.stderr != "entry":
        return 1.0
    return 1.0 + 1.0 / job.sizes.num_blocks + (1.0 if features.num_sketch_groups else 0.0)


def share_of_rate(job: Job) -> float:
    """What a worker has of `_rate`: a thread's for each of its own; of a GPU, what those that share it leave."""
    if job.layout.device.startswith("cuda"):
        return 1.0 / job.config.compute.workers_per_gpu
    return float(job.layout.threads)


def _rate(dtype: str, device: str) -> float:
    """Operations a second of a plain matrix product on one thread or a whole GPU; the best of a few."""
    with torch_threads(1):
        a = torch.randn(_RATE_EDGE, _RATE_EDGE, dtype=DTYPES[dtype], device=device)
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            float((a @ a)[0, 0])
            best = min(best, time.perf_counter() - start)
    return 2.0 * _RATE_EDGE**3 / best
