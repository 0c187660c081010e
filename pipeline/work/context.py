"""What tasks work with: the job, the data, the prepared model and its features, the store, and rows of features.

Everything is built on first use and can be rebuilt after a restart. Stages get a `Context` and a `Task`; they know
neither Ray nor the ledger.

Axes: n rows, s draws, c outputs.
"""

import socket
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nntk_dist.errors import ModelError
from nntk_dist.planning.feature_maps import FeatureGroups, make_feature_map
from nntk_dist.products.features import FeatureMap, Rows, feature_bytes
from nntk_dist.products.wanted import Side
from nntk_dist.runtime.precision import full_precision
from nntk_dist.runtime.reused_memory import ReusedMemory
from nntk_dist.statistics.tile_estimates import scale_factor
from pipeline.data import Dataset
from pipeline.decisions.build import DTYPES, build_architecture, build_prepared, function_values
from pipeline.decisions.layout import FEATURE_CACHE_BYTES, writing_threads
from pipeline.decisions.weighting_reference import reference_batch
from pipeline.job.job import SPLITS, Job
from pipeline.runtime.allocator import give_back_freed_memory
from pipeline.runtime.fitting_batch import FittingBatch
from pipeline.storage.kernel_arrays import KernelArrays, Piece
from pipeline.storage.run_storage import RunStorage

_CHECK_ROWS = 3

Interval = tuple[str, int, int]  # split, start, stop


@dataclass
class Written:
    """What a task wrote.

    Attributes:
        num_bytes: Bytes in files.
        checksums: One checksum for each piece of an array.
        numbers: Numbers that the driver adds up.
        beside: What the task wrote for other groups of parameters, by their names.
        pending: Pieces that `Context.finish` has yet to write.
        results: Tensors whose memory is free once the pieces are written.
    """

    num_bytes: int = 0
    checksums: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    beside: dict[str, "Written"] = field(default_factory=dict)
    pending: list[Piece] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)

    @property
    def checksum(self) -> int:
        """One checksum for all pieces, in the order of their paths."""
        return zlib.crc32(repr(sorted(self.checksums.items())).encode())


class Sink(Protocol):
    """A destination other than the kernel store, to see what tasks would write."""

    def write(self, path: str, start: Sequence[int], values: np.ndarray) -> tuple[int, int]:
        """Take whole shards of an array that begin at an index; return bytes and checksum."""


@dataclass
class Context:
    """Everything that the tasks of one job share in a worker.

    Attributes:
        job: The job.
        dataset: The data, from the driver.
        state: The model's state dict, as the driver built or loaded it.
        sink: Where tasks write; None is the kernel store.
        results: Memory for tiles, used again once they are written.
        built: The model with that state, if it exists already.
    """

    job: Job
    dataset: Dataset
    state: Mapping[str, Tensor]
    sink: Sink | None = None
    built: nn.Module | None = None
    results: ReusedMemory = field(default_factory=ReusedMemory)
    _cache: "OrderedDict[tuple[object, ...], tuple[Rows, Side]]" = field(default_factory=OrderedDict)

    @cached_property
    def fitting(self) -> FittingBatch:
        """The batch of passes over the model, which shrinks when it does not fit into memory."""
        return FittingBatch(self.job.layout.batch)

    @cached_property
    def storage(self) -> RunStorage:
        """The run directory."""
        return RunStorage(self.job.run_dir)

    @cached_property
    def store(self) -> KernelArrays:
        """The arrays of `kernel.zarr`."""
        return KernelArrays(self.storage)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of model and features."""
        return DTYPES[self.job.layout.dtype]

    @cached_property
    def model(self) -> nn.Module:
        """The prepared model with its parameters."""
        built = self._built_again() if self.built is None else self.built
        prepared = build_prepared(self.job.config, self.dataset, built, self.job.layout.device)
        del built
        give_back_freed_memory()
        return prepared

    def _built_again(self) -> nn.Module:
        """Build the model in this process, whose code may differ from the driver's: another place, or a changed file.

        Raises:
            ModelError: it is another function than the driver's.
        """
        config = self.job.config
        model = build_architecture(config, self.dataset)
        try:
            model.load_state_dict(dict(self.state))
        except RuntimeError as error:  # other names or shapes
            difference: str | None = " ".join(str(error).split())
        else:
            difference = self.job.function.difference(function_values(config, self.dataset, model))
        if difference is not None:
            raise ModelError(
                f"the worker on {socket.gethostname()} builds another model than the driver: {difference}; give all "
                f"machines the same code of '{config.model.builder}', and leave it unchanged during a run"
            )
        return model

    @cached_property
    def features(self) -> FeatureMap:
        """The features of the kernel for this model."""
        examples = self.inputs("train", slice(0, _CHECK_ROWS))
        spec = self.job.spec
        reference = reference_batch(spec, self.dataset, self.dtype, self.job.layout.device)
        return make_feature_map(self.model, examples, spec, self.job.decision, reference=reference)

    @cached_property
    def siblings(self) -> dict[str, "Context"]:
        """The contexts of other groups of parameters, for their stores alone."""
        return {name: Context(job, self.dataset, self.state, self.sink) for name, job in self.job.siblings.items()}

    def compute_groups(
        self, x: Tensor, ids: Tensor, draws: range, columns: Sequence[int], *, batch: int | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Compute the features of all groups of parameters in the same passes; of the kernel alone if it has none."""
        name = self.job.spec.group
        if name is None or not self.job.siblings:
            return {name or "": self.features.compute(x, ids, draws, columns, batch=batch)}
        return self._together.compute(x, ids, draws, columns, batch=batch)

    @cached_property
    def _together(self) -> FeatureGroups:
        """The features of all groups, on one model."""
        jobs, examples = {self.job.spec.group or "": self.job, **self.job.siblings}, self.inputs("train", slice(0, 1))
        reference = reference_batch(self.job.spec, self.dataset, self.dtype, self.job.layout.device)
        maps = {
            name: make_feature_map(self.model, examples, job.spec, job.decision, reference=reference)
            for name, job in jobs.items()
        }
        return FeatureGroups(self.job.decision.estimator, maps)

    @cached_property
    def features_with_metric(self) -> FeatureMap:
        """The features with the stored metric if products need it; else the same as `features`."""
        stored = self.job.features
        if stored.metric is None or not stored.needs_metric:
            return self.features
        factor = scale_factor(self.job.spec.scale, self.job.sizes.num_parameters)
        metric = torch.from_numpy(self.store.read(stored.metric.name)) / factor
        return self.features.with_metric(metric.to(self.job.layout.device))

    def inputs(self, split: str, selection: slice | np.ndarray) -> Tensor:
        """Return a copy of some inputs in the job's dtype and device; a model may write to its input."""
        values = torch.from_numpy(np.ascontiguousarray(getattr(self.dataset, split).inputs[selection]))
        device, dtype = self.job.layout.device, self.dtype if values.is_floating_point() else values.dtype
        if device.startswith("cuda"):  # a copy from pinned memory runs beside the GPU's work
            values = values.pin_memory()
        return values.to(device, dtype, non_blocking=True, copy=True)

    def output_parts(self) -> list[tuple[int, ...]]:
        """Return the kernel's outputs in the portions in which features are held."""
        columns = self.features.columns
        step = len(columns) if self.job.layout.store_features else self.job.layout.outputs_at_once
        return [columns[i : i + step] for i in range(0, len(columns), step)]

    def outputs(self, x: Tensor) -> Tensor:
        """Compute f(x; θ), in batches that fit."""
        return self.fitting.run(lambda batch: self.features.outputs(x, batch=batch))

    def keys(self, split: str, selection: slice | np.ndarray) -> Tensor:
        """Return numbers of examples, from 0 to 2^32 − 1, from split and id; the noise of an example depends on it."""
        ids = torch.from_numpy(getattr(self.dataset, split).ids[selection])
        return ((ids & 0x7FFFFFFF) + (SPLITS.index(split) << 31)).to(self.job.layout.device)

    def compute(self, split: str, selection: slice | np.ndarray, columns: Sequence[int]) -> dict[str, Tensor]:
        """Compute features of some rows under all draws from the model."""
        x, ids, draws = self.inputs(split, selection), self.keys(split, selection), range(self.job.sizes.num_draws)
        with full_precision():  # also when a tile asks for its rows amid its products
            return self.fitting.run(
                lambda batch: self.features.compute(x, ids, draws, columns, batch=min(batch, len(x)))
            )

    def rows(self, interval: Interval, columns: tuple[int, ...], side: Side = Side.BOTH) -> Rows:
        """Return features of one interval of examples, prepared for products on one side of a tile.

        They are kept as long as they fit, since neighbouring tiles share them.
        """
        key, wanted = (interval, columns), self.job.wanted.on(side)
        kept, prepared_for = self._cache.get(key, (None, Side(0)))
        if kept is None or side not in prepared_for:
            if kept is not None:
                self._cache.move_to_end(key)  # it stays
            self._free_memory()
            rows = self._computed_rows(interval, columns) if kept is None else kept
            prepared = self.features_with_metric.prepare(rows, wanted)
            self._cache[key] = prepared, side
        self._cache.move_to_end(key)
        return self._cache[key][0]

    def _computed_rows(self, interval: Interval, columns: tuple[int, ...]) -> Rows:
        """Return features of one interval from the store, or from the model."""
        split, start, stop = interval
        if not self.job.layout.store_features:
            return self.compute(split, slice(start, stop), columns)
        layout, rows = self.job.layout, {}
        for spec in self.job.features.arrays:
            path = self.job.features.path(split, spec)
            values = self.store.read(path, slice(start, stop), threads=layout.threads)
            rows[spec.name] = torch.from_numpy(values).to(layout.device)
        return rows

    def sampled_rows(self, split: str, rows: np.ndarray, columns: tuple[int, ...], *, stored: bool) -> Rows:
        """Return features of some rows, in ascending order, from the store if they are `stored`, or from the model."""
        if not stored:
            return self.compute(split, rows, columns)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)  # of neighbours
        parts = [self._computed_rows((split, int(run[0]), int(run[-1]) + 1), columns) for run in runs]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def forget(self) -> None:
        """Release the features and the memory that are kept for further tiles."""
        self._cache.clear()
        self.results.clear()
        self.store.forget()

    def _free_memory(self) -> None:
        """Forget row sets until one more, as large as the largest, fits.

        This happens before the new one is made; otherwise three would be in memory. The last one used stays, because a
        tile needs two.
        """
        sizes = [feature_bytes(rows) for rows, _ in self._cache.values()]
        while len(sizes) > 1 and sum(sizes) + max(sizes) > FEATURE_CACHE_BYTES:
            self._cache.popitem(last=False)
            del sizes[0]

    def write(self, written: Written, path: str, start: Sequence[int], values: Tensor | np.ndarray) -> None:
        """Write whole shards of an array that begin at an index, and note bytes and checksum."""
        self.write_later(written, path, start, values)
        self.finish(written)

    def write_later(self, written: Written, path: str, start: Sequence[int], values: Tensor | np.ndarray) -> None:
        """Leave values for `finish` to write; they go to main memory now, so the next task can use the device."""
        written.pending.append((path, start, _as_array(values)))

    def finish(self, written: Written) -> None:
        """Write what is pending, several pieces at once: compression and checksums release the interpreter.

        Everything is on storage when this returns, or the first error is raised. Another task may compute meanwhile.
        """
        pieces, written.pending = written.pending, []
        if self.sink is not None:
            results = [self.sink.write(*piece) for piece in pieces]
        else:
            results = self.store.write_all(pieces, threads=writing_threads(self.job))
            self.results.give_back(written.results)
            written.results = []  # memory that is returned twice would hold two tiles
        for (path, start, _), (num_bytes, checksum) in zip(pieces, results, strict=True):
            written.num_bytes += num_bytes
            written.checksums[f"{path}@{','.join(map(str, start))}"] = checksum


@dataclass(frozen=True)
class FeatureParts:
    """Features of two row intervals, computed on demand, one portion of the outputs after the other.

    Attributes:
        context: The worker's context.
        row: The rows of a tile.
        column: Its columns.
    """

    context: Context
    row: Interval
    column: Interval

    def __len__(self) -> int:
        return len(self.context.output_parts())

    def __iter__(self) -> Iterator[tuple[Rows, Rows]]:
        for part in self.context.output_parts():
            yield self._pair(part)

    def _pair(self, part: tuple[int, ...]) -> tuple[Rows, Rows]:
        """Return rows and columns, as one object if they are the same interval."""
        columns = self.context.rows(self.column, part)
        if self.row == self.column:
            return columns, columns
        return self.context.rows(self.row, part, Side.ROWS), columns


def _as_array(values: Tensor | np.ndarray) -> np.ndarray:
    """Return values in main memory; a transposed tile stays a view, which the store copies in order chunk by chunk."""
    return values.detach().to("cpu").numpy() if isinstance(values, Tensor) else values
