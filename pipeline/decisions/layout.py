"""The layout of a run: batch, shards, draw chunks, threads, chosen from the model and the data and never from the
workers.

Everything that changes rounding is decided here, by rules that do not depend on the number of workers, the tile or the
executor. So a plan gives the same features, bit for bit, however it is carried out. (A second plan of the same
configuration may differ in one thing that is measured, and kept in the manifest: `nntk_dist.planning.stacking`.)

Axes: n rows, s draws, r blocks, c outputs.
"""

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nntk_dist.errors import ModelError
from nntk_dist.layers.hooks import hooked
from nntk_dist.models.evaluation import FAILS_ON_INPUTS, outputs, trying
from nntk_dist.planning.feature_maps import FeatureGroups
from nntk_dist.products.features import FeatureMap
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from nntk_dist.spec import KernelSpec, Outputs
from pipeline.config.choices import StandardErrorChoice
from pipeline.config.schema import ComputeConfig, Config
from pipeline.job.job import Job, Layout, Sizes
from pipeline.storage.run_storage import RunStorage

FEATURE_CACHE_BYTES = 512 << 20  # features that a worker keeps, since neighbouring tiles share rows
# Activations of one batch: about the size of the last cache; but 32 examples, below which a pass loses more by its many
# small operations, while they take eight times as much. Measured on one thread: plain passes of the built-in resnet
# and cnn are fastest at 32, of the transformer at 64; at 8 they have 0.85, 0.93 and 0.84 of that rate.
_BATCH_RANGE = (8, 1024)
_BATCH_BYTES = 32 << 20
_FEW, _FEW_BYTES = 32, 256 << 20
# A GPU wants much more work at a time, and has its own memory for it: a 64th for activations. Gradients of all outputs
# keep several times as much.
_GPU_MOST = 8192
_GPU_SHARE = 64
# Perturbations are made once for a shard of rows: the more rows, the less they cost; but there are to be shards enough
# for several workers, also of a small data set.
_SHARD_ROWS = (1024, 8192)
# But a task is to take minutes, so that little is lost with it: operations of its forward passes. The whole takes a few
# times as many.
_TASK_OPERATIONS = 1 << 39
_GPU_TASK_OPERATIONS = 1 << 44
_SHARDS = 8
_PREPARED_COPIES = 3  # at most, of a row set that is ready for products
_CHUNK_DRAWS = 16
_CHUNK_BYTES = 64 << 20
_STORED_FEATURE_BYTES = 1 << 30
_OUTPUT_BYTES = 256 << 20  # features of one row set held at once when they are recomputed for every tile


def activation_elements(model: nn.Module, x: torch.Tensor) -> int:
    """Count the numbers that a model's leaf modules put out for one example; a batch's memory is proportional to it."""
    count = 0

    def add(h: object, out: object) -> None:
        nonlocal count
        if isinstance(out, torch.Tensor):
            count += out.numel()

    leaves = {path: add for path, module in model.named_modules() if not list(module.children())}
    with trying(ModelError, FAILS_ON_INPUTS), hooked(model, after=leaves), torch.no_grad():
        outputs(model, x[:1])
    return max(count, x[:1].numel())


def pass_operations(model: nn.Module, x: torch.Tensor) -> float:
    """Return the operations of one forward pass over one example: matrix products and convolutions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs(model, x[:1])
    return float(max(1, counter.get_total_flops()))


def choose_batch(config: Config, model: nn.Module, x: torch.Tensor, num_rows: int) -> int:
    """Return the examples of one forward pass: what the configuration says, or `automatic_batch`."""
    if config.compute.batch != "auto":
        return config.compute.batch
    return automatic_batch(model, x, num_rows, config.compute.dtype)


def automatic_batch(model: nn.Module, x: torch.Tensor, num_rows: int, dtype: str) -> int:
    """Return the largest power of two from 8 to 1024 with activations of at most 32 MiB (up to 32 examples, 256 MiB).

    It is no larger than necessary to hold all rows, because batches are padded and padding costs time. On a GPU, the
    limits are a 64th of its memory and 8192 examples.
    """
    each = (8 if dtype == "float64" else 4) * activation_elements(model, x)
    low, high = _BATCH_RANGE
    fitting = max(_BATCH_BYTES // each, min(_FEW, _FEW_BYTES // each))
    if x.device.type == "cuda":
        high, fitting = _GPU_MOST, torch.cuda.get_device_properties(x.device).total_memory // _GPU_SHARE // each
    holding_all = 2 ** math.ceil(math.log2(num_rows))
    return int(min(high, max(low, 2 ** int(math.log2(max(1, fitting)))), max(low, holding_all)))


def overlaps_writing(job: Job) -> bool:
    """Return whether a worker computes one task while it writes another: if one of them waits for a GPU or a network.

    If both need the worker's own cores, there is nothing to gain, and a second tile to hold.
    """
    return job.layout.device.startswith("cuda") or RunStorage(job.run_dir).local_path is None


def writing_threads(job: Job) -> int:
    """Return the number of writing threads: the worker's threads, and one more if they wait for a network."""
    return job.layout.threads + (1 if RunStorage(job.run_dir).local_path is None else 0)


def threads_of(compute: ComputeConfig) -> int:
    """Return the threads of a worker: one (then there is a worker for each CPU), unless the configuration says."""
    return 1 if compute.threads == "auto" else compute.threads


def row_feature_bytes(features: FeatureMap | FeatureGroups, dtype: str) -> int:
    """Return the bytes of one row's features under all draws, of all groups that are computed together."""
    item = 8 if dtype == "float64" else 4
    return item * sum(math.prod(spec.shape) for spec in features.arrays)


def make_layout(
    config: Config,
    spec: KernelSpec,
    features: FeatureMap | FeatureGroups,
    sizes: Sizes,
    *,
    batch: int,
    device: str,
    one_pass: float,
) -> Layout:
    """Choose the layout for a kernel's features; differences are always stored, gradients if that costs little disk.

    Features are stored if they take at most 1 GiB, or no more than the kernel itself, or if they stand for tiles;
    otherwise each tile recomputes its rows. Features of groups, which are computed together, are always stored.
    `one_pass` are the operations of a forward pass over one example.
    """
    compute = config.compute
    row_bytes = row_feature_bytes(features, compute.dtype)
    fewest, most = _SHARD_ROWS
    wanted_rows = max(fewest, min(most, sizes.num_train // _SHARDS, _CHUNK_BYTES * sizes.num_blocks // row_bytes))
    passes = int((_GPU_TASK_OPERATIONS if device.startswith("cuda") else _TASK_OPERATIONS) / one_pass)
    shard_rows = batch * max(1, min(wanted_rows, passes) // batch)
    draws_per_block = sizes.draws_per_block
    block_bytes = max(1, shard_rows * row_bytes // sizes.num_blocks)
    most_draws = min(_CHUNK_DRAWS, passes // shard_rows)
    wanted = max(1, min(most_draws // draws_per_block, _CHUNK_BYTES // block_bytes))
    blocks = max(d for d in range(1, sizes.num_blocks + 1) if sizes.num_blocks % d == 0 and d <= wanted)
    item = 8 if compute.dtype == "float64" else 4
    width = sizes.num_kernel_outputs if spec.outputs == Outputs.FULL else 1
    kernel_bytes = item * sizes.num_train * width * (sizes.num_train + sizes.num_test) * width
    total_bytes = row_bytes * (sizes.num_train + sizes.num_test)
    tiles = compute.write_tiles is not False
    stored = (
        spec.group is not None
        or not tiles
        or features.zero_stderr_is_unresolved
        or total_bytes <= max(_STORED_FEATURE_BYTES, kernel_bytes)
    )
    # Fewer outputs at a time make only arrays with an output axis smaller.
    carrying = item * sum(math.prod(array.shape) for array in features.arrays if "output" in array.axes)
    tile_rows = min(compute.tile, sizes.num_train)
    tile_bytes = carrying * tile_rows
    at_once = sizes.num_kernel_outputs
    if not stored and spec.outputs != Outputs.FULL:
        at_once = max(1, min(at_once, at_once * _OUTPUT_BYTES // max(1, tile_bytes)))
    return Layout(
        tile=compute.tile,
        batch=batch,
        shard_rows=shard_rows,
        chunk_draws=min(sizes.num_draws, blocks * draws_per_block),
        threads=threads_of(compute),
        device=device,
        dtype=compute.dtype,
        stderr=StandardErrorChoice.NONE if sizes.num_blocks < MINIMUM_BLOCKS else compute.stderr,
        store_features=stored,
        outputs_at_once=at_once,
        write_tiles=tiles,
        matmul_precision=compute.matmul_precision,
        tile_group=max(1, FEATURE_CACHE_BYTES // (_PREPARED_COPIES * max(1, row_bytes) * tile_rows) - 2),
    )
