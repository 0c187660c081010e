"""A stored kernel: lazy arrays, tables, xarray, dask, products with vectors, the kernel's explicit factor.

Only metadata is read until entries are requested. No method holds an n × n matrix in memory, and nothing is written.
`nntk_dist.store.opening` opens a kernel.

Axes: n train examples, m test examples, S draws, C outputs, F feature columns.
Kernels of form `full` have n·C (m·C) rows, with index `i·C + c`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
from jaxtyping import Float
from obstore.exceptions import BaseError
from scipy.sparse.linalg import LinearOperator

from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.analysis.streamed_kernel import StreamedKernel
from nntk_dist.errors import ArgumentError, StoreError, Unavailable, first_line, nearest_name
from nntk_dist.products.factor_form import SKETCHES, WITH_FACTOR, FactorForm
from nntk_dist.spec import Kind, Outputs, Statistic
from nntk_dist.store.tables import read_table, table_names

if TYPE_CHECKING:  # in the extra `analysis`
    import dask.array
    import pandas
    import xarray

_KERNEL_STAGES = ("gram", "test")
_FACTOR_STAGES = ("features", "metric", "test")  # of a run that writes no tiles


@dataclass(frozen=True, repr=False)
class StoredKernel:
    """A kernel in its store. Its arrays are lazy zarr arrays: index them to read.

    Tiles of an unfinished run that are not yet written hold NaN. `complete` says whether there are any; the methods
    here refuse NaN, plain indexing of an array does not.

    Attributes:
        location: the path or address that was opened.
        group: the zarr group `kernel.zarr`.
        manifest: the run's `manifest.json`; empty if the store lies alone.
        files: the run directory as an obstore store, for the tables.

    Example:
        >>> from nntk_dist import open_kernel
        >>> kernel = open_kernel("runs/digits")  # doctest: +SKIP
        >>> kernel.shape, kernel[0, 1]  # doctest: +SKIP
        >>> kernel.gram_unbiased[:100, :100]  # doctest: +SKIP
        >>> kernel.regression.set_index("ridge")["test_accuracy"]  # doctest: +SKIP
    """

    location: str
    group: zarr.Group
    manifest: Mapping[str, Any]
    files: Any

    def __repr__(self) -> str:
        rows, columns = self.shape
        statistic = self.group.attrs.get("statistic", "plugin")
        state = "complete" if self.complete else "not complete"
        return f"StoredKernel({self.location!r}, {rows} × {columns}, statistic {statistic}, {state})"

    def __getitem__(self, selection: Any) -> Any:
        """Return entries of `gram` in float64: a float for `kernel[i, j]`, else an array.

        Raises:
            StoreError: they cannot be read, or are not yet written.
        """
        values = self._read("train/gram", self.gram, selection)
        return float(values) if values.ndim == 0 else values

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of `gram`, also if no tiles are stored: (n, n), or (n·C, n·C) in form `full`."""
        examples, outputs = self.outputs.shape
        rows = examples * (outputs if self.group.attrs.get("outputs") == Outputs.FULL else 1)
        return rows, rows

    @property
    def gram(self) -> zarr.Array:
        """Return the kernel, train by train: `plugin` (PSD, for solves), or `unbiased` if the run has only that."""
        return self.array("train/gram")

    @property
    def gram_unbiased(self) -> zarr.Array:
        """Return the unbiased kernel, train by train: for entries and comparisons; not PSD."""
        return self.array("train/gram_unbiased")

    @property
    def gram_stderr(self) -> zarr.Array:
        """Return standard errors of the unbiased entries; NaN for an entry that no draw changed."""
        return self.array("train/gram_stderr")

    @property
    def test_gram(self) -> zarr.Array:
        """Return the same as `gram`, test rows by train columns."""
        return self.array("test/gram")

    @property
    def test_gram_unbiased(self) -> zarr.Array:
        """Return the same as `gram_unbiased`, test rows by train columns."""
        return self.array("test/gram_unbiased")

    @property
    def test_gram_stderr(self) -> zarr.Array:
        """Return the same as `gram_stderr`, test rows by train columns."""
        return self.array("test/gram_stderr")

    @property
    def test_diagonal(self) -> zarr.Array:
        """Return `k(x, x)` of the test examples: (m,), or (m, C, C) in form `full`."""
        return self.array("test/diagonal")

    @property
    def test_diagonal_unbiased(self) -> zarr.Array:
        """Return the same as `test_diagonal`, of the unbiased statistic."""
        return self.array("test/diagonal_unbiased")

    @property
    def test_diagonal_stderr(self) -> zarr.Array:
        """Return standard errors of the unbiased test diagonal."""
        return self.array("test/diagonal_stderr")

    @property
    def outputs(self) -> zarr.Array:
        """Return `f(x; θ)` on the train examples, (n, C)."""
        return self.array("train/outputs")

    @property
    def test_outputs(self) -> zarr.Array:
        """Return `f(x; θ)` on the test examples, (m, C)."""
        return self.array("test/outputs")

    @property
    def targets(self) -> zarr.Array:
        """Return train targets: integer labels (n,), or floats (n, columns)."""
        return self.array("train/targets")

    @property
    def test_targets(self) -> zarr.Array:
        """Return test targets: integer labels (m,), or floats (m, columns)."""
        return self.array("test/targets")

    @property
    def ids(self) -> zarr.Array:
        """Return ids of the train examples in their source, (n,)."""
        return self.array("train/id")

    @property
    def test_ids(self) -> zarr.Array:
        """Return ids of the test examples in their source, (m,)."""
        return self.array("test/id")

    @property
    def complete(self) -> bool:
        """Return whether the manifest says that the kernel, train and test, is finished; without tiles, its factor.

        Without a manifest, return False: nothing says that the entries are complete.
        """
        stages = self.manifest.get("stages", {})
        needed = _KERNEL_STAGES if self.has_tiles else _FACTOR_STAGES
        return all((stages.get(name) or {}).get("finished") for name in needed)

    @property
    def has_tiles(self) -> bool:
        """Return whether Gram matrices are stored: not if the run had `compute.write_tiles: false`."""
        return bool(self.group.attrs.get("tiles", True))

    def array(self, path: str) -> zarr.Array:
        """Return the array at `path` inside the store, such as `train/gram`.

        Raises:
            StoreError: there is none; the message lists all arrays and the nearest name.
        """
        found = self.group.get(path)
        if not isinstance(found, zarr.Array):
            held = self._array_paths()
            if not self.has_tiles and path.partition("/")[2].startswith("gram"):
                raise StoreError(
                    f"the kernel at '{self.location}' holds no '{path}': it was run with 'compute.write_tiles: false'; "
                    "factor() gives Φ and M of it, linear_operator() its products with vectors"
                )
            raise StoreError(
                f"the kernel at '{self.location}' holds no array '{path}'{nearest_name(path, held)}; it holds: "
                f"{', '.join(held)}; 'kernel.statistic: both' and 'compute.stderr: entry' store every companion"
            )
        return found

    @property
    def spectrum(self) -> "pandas.DataFrame":
        """Return the table `eigenvalues`: one row for each eigenvalue, largest first. Raises as `table` does."""
        return self.table("eigenvalues")

    @property
    def regression(self) -> "pandas.DataFrame":
        """Return the table `regression`: one row for each ridge, with its errors. Raises as `table` does."""
        return self.table("regression")

    @property
    def predictions(self) -> "pandas.DataFrame":
        """Return the table `predictions`: one row for each test example. Raises as `table` does."""
        return self.table("predictions")

    @property
    def tables(self) -> tuple[str, ...]:
        """Return the names of all tables that the run holds so far."""
        return table_names(self.files)

    def table(self, name: str) -> "pandas.DataFrame":
        """Return a table of the run as a pandas data frame; `docs/store.md` describes the columns of each.

        Args:
            name: of the table, one of `tables`.

        Raises:
            StoreError: there is no such table (the message lists all), or it cannot be read.
            Unavailable: pandas or pyarrow is not installed.
        """
        return read_table(self.files, self.location, name)

    def to_dask(self, path: str = "train/gram") -> "dask.array.Array":
        """Return an array as a dask array with one chunk for each shard, the unit of reading and writing.

        Raises:
            StoreError: there is no such array.
            Unavailable: dask is not installed.
        """
        try:
            import dask.array
        except ImportError as error:
            raise Unavailable("to_dask needs dask; pip install it, or this project's extra 'analysis'") from error
        array = self.array(path)
        return dask.array.from_zarr(array, chunks=_unit(array))

    def to_xarray(self, split: str = "train") -> "xarray.Dataset":
        """Return the arrays of a split as one lazy xarray data set, labelled with example ids.

        Chunks are shards, as in `to_dask`. In form `full` a row is a pair (example, output), and Gram matrices have no
        labels.

        Args:
            split: `train` or `test`.

        Raises:
            ArgumentError: there is no such split.
            Unavailable: xarray or dask is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise Unavailable("to_xarray needs xarray, dask; pip install them or the extra 'analysis'") from error
        group = self.group.get(split)
        if not isinstance(group, zarr.Group):
            raise ArgumentError(f"split is '{split}'; allowed: {', '.join(sorted(self.group.group_keys()))}")
        variables: dict[str, tuple[tuple[str, ...], dask.array.Array]] = {}
        for name in sorted(set(group.array_keys()) - {"id"}):
            path = f"{split}/{name}"
            variables[name] = (cast(Any, self.array(path).metadata).dimension_names, self.to_dask(path))
        dimensions = {axis for axes, _ in variables.values() for axis in axes}
        labels = {"row": f"{split}/id", "col": "train/id"}
        coordinates = {axis: self.array(path)[...] for axis, path in labels.items() if axis in dimensions}
        return xarray.Dataset(variables, coordinates, attrs=dict(self.group.attrs))

    def linear_operator(self, path: str = "train/gram") -> LinearOperator:
        """Return a symmetric kernel as a scipy operator that streams over the store, in float64.

        Each product reads the shards on and above the diagonal once, so multiply all vectors together with `matmat`:
        ten vectors cost one pass, as one does. Cost: n²/2 entries read and 2n² operations for each vector. Without
        tiles, products use the factor: two passes over the features and 4·n·F operations for each vector.

        Raises:
            StoreError: there is no such array; or, from a product, a shard cannot be read or holds NaN.
            ArgumentError: the array is not square.
        """
        rows = self._factor_rows() if path == "train/gram" and not self.has_tiles else self._tiles(path)

        def multiply_one(vector: np.ndarray) -> np.ndarray:
            return rows.product(vector.reshape(-1, 1)).reshape(vector.shape)

        shape, both = (rows.num_rows, rows.num_rows), {"matmat": rows.product, "rmatmat": rows.product}
        return LinearOperator(shape, matvec=multiply_one, rmatvec=multiply_one, dtype=np.float64, **both)

    def _tiles(self, path: str) -> StreamedKernel:
        """A square array in tiles that are its shards."""
        array = self.array(path)
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise ArgumentError(
                f"'{path}' has shape {array.shape}; a linear operator needs a square kernel: train/gram…"
            )
        return StreamedKernel(array.shape[0], max(_unit(array)), lambda *place: self._read(path, array, place))

    def factor(self) -> tuple[Float[np.ndarray, "rows F"], Float[np.ndarray, "F F"]]:
        """Return `(Φ, M)` in float64 with `gram = Φ M Φᵀ`, up to the rounding of the stored dtype.

        The estimator `weight` and the covariance kernel store output differences: Φ is (n, S·C) with column `s·C + c`,
        and M is `M ⊗ I_C`; in form `full`, Φ is (n·C, S). Kernels that are sketched as a whole store sketches of
        gradients: Φ is their sum over blocks, (n, k), or (n·C, k) in form `full`, and M a multiple of the identity.
        Memory: n·F + F² float64 values.

        Raises:
            StoreError: the kernel has no stored factor, `gram` is not `plugin`, or the factor is not complete.
        """
        features = self._features()
        if _axes(features)[1] == SKETCHES:
            return self._sketched_factor(features)
        values = self._read("train/features", features, ...)
        metric = self._read("metric", self.array("metric"), ...)
        num_rows, num_draws, num_outputs = values.shape
        if self.group.attrs.get("outputs") == Outputs.FULL:
            return values.transpose(0, 2, 1).reshape(num_rows * num_outputs, num_draws), metric
        return values.reshape(num_rows, num_draws * num_outputs), np.kron(metric, np.eye(num_outputs))

    def _features(self) -> zarr.Array:
        """The features of the train examples, if they are a factor of `gram`."""
        features = self.group.get("train/features")
        if not isinstance(features, zarr.Array) or "metric" not in self.group:
            raise StoreError(
                f"the kernel at '{self.location}' has no stored factor; {WITH_FACTOR}; use gram or linear_operator() "
                "instead"
            )
        attributes = self.group.attrs
        if attributes.get("kind") == Kind.NONLOCAL and attributes.get("statistic") == Statistic.UNBIASED:
            raise StoreError(
                f"the kernel at '{self.location}' was stored with 'statistic: unbiased' alone, which the factor "
                "does not give; run it with 'statistic: both' or 'plugin'"
            )
        return features

    def _factor_rows(self) -> FactorRows:
        """The train rows of W, `gram = W Wᵀ`, one row of shards at a time."""
        features = self._features()
        form = FactorForm(_axes(features)[1:], features.shape[1:], self.group.attrs.get("outputs") == Outputs.FULL)
        root = form.root(self._read("metric", self.array("metric"), ...))
        shard, num_rows = _unit(features)[0], features.shape[0]

        def read(interval: tuple[int, int]) -> Float[np.ndarray, "rows F"]:
            return form.rows(self._read("train/features", features, (slice(*interval),)), root)

        intervals = tuple((start, min(start + shard, num_rows)) for start in range(0, num_rows, shard))
        return FactorRows(num_rows * form.rows_per_example, form.num_columns_with(root), intervals, read)

    def _sketched_factor(self, features: zarr.Array) -> tuple[np.ndarray, np.ndarray]:
        """Read block by block: one block's sketches are in memory at a time."""
        num_rows, num_blocks, *_, num_columns = features.shape
        total = sum(
            self._read("train/features", features, (slice(None), slice(r, r + 1)))[:, 0] for r in range(num_blocks)
        )
        metric = self._read("metric", self.array("metric"), (slice(0, 1), slice(0, 1)))[0, 0]
        full = self.group.attrs.get("outputs") == Outputs.FULL
        columns = np.reshape(total, (-1, num_columns) if full else (num_rows, -1))
        return columns, metric * np.eye(columns.shape[1])

    def _read(self, path: str, array: zarr.Array, selection: Any) -> np.ndarray:
        """Entries in float64; refuses damaged shards and NaN."""
        try:
            values = np.asarray(array[selection], dtype=np.float64)
        # what checksum codecs, decompressors and stores raise
        except (ValueError, RuntimeError, OSError, BaseError) as error:
            raise StoreError(
                f"'{path}' of the kernel at '{self.location}' cannot be read at {_spans(selection)} "
                f"({first_line(error)}); run 'nntk verify' and repeat the run with --resume"
            ) from error
        if np.isnan(values).any():
            reason = (
                "entries there are not resolved: more draws or a larger gamma would resolve them"
                if self.complete and path.endswith("stderr")
                else "the run has not finished; complete it with 'nntk run … --resume'"
            )
            raise StoreError(f"'{path}' of the kernel at '{self.location}' holds NaN at {_spans(selection)}: {reason}")
        return values

    def _array_paths(self) -> list[str]:
        groups = {"": self.group} | {f"{name}/": group for name, group in self.group.groups()}
        return sorted(prefix + name for prefix, group in groups.items() for name in group.array_keys())


def _axes(array: zarr.Array) -> tuple[str, ...]:
    return tuple(cast(Any, array.metadata).dimension_names)


def _unit(array: zarr.Array) -> tuple[int, ...]:
    """The unit of writing: the shard, or the chunk of an array without shards."""
    return tuple(array.shards or array.chunks)


def _spans(selection: Any) -> str:
    """A selection as one writes it, `[0:4, 4:8]`."""

    def shown(part: Any) -> str:
        if isinstance(part, slice):
            return ":".join("" if end is None else str(end) for end in (part.start, part.stop))
        return "..." if part is ... else str(part)

    return f"[{', '.join(map(shown, selection if isinstance(selection, tuple) else (selection,)))}]"
