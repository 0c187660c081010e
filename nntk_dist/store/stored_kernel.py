"""Reading a stored kernel: lazy arrays, xarray, dask, a streaming matrix product, the kernel's explicit factor.

`open_kernel` takes a run directory, or the `kernel.zarr` inside it, on a local disk or in an object store, and opens it
read-only. It reads metadata only until entries are asked for, never holds an n×n matrix that was not asked for, and
writes nothing. It is the one module of the library that knows zarr.

Axes: n train examples, m test examples, S draws, C outputs, F feature columns.
Kernels of form `full` have n·C (m·C) rows, with index `i·C + c`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import obstore
import zarr
from jaxtyping import Float
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url
from scipy.sparse.linalg import LinearOperator
from zarr.storage import ObjectStore

from nntk_dist.analysis.factor_rows import FactorRows
from nntk_dist.analysis.streamed_kernel import TiledKernel
from nntk_dist.errors import NNTKError, nearest_name
from nntk_dist.products.factor_form import SKETCHES, WITH_FACTOR, FactorForm

if TYPE_CHECKING:  # both come with the extra `analysis`
    import dask.array
    import xarray

SCHEMA = "nntk-kernel"
VERSION = 1
STORE_NAME = "kernel.zarr"
MANIFEST_NAME = "manifest.json"
_KERNEL_STAGES = ("gram", "test")
_FACTOR_STAGES = ("features", "metric", "test")  # of a run that writes no tiles


@dataclass(frozen=True)
class StoredKernel:
    """A kernel in its store. Arrays are lazy zarr arrays: index them to read (`kernel.gram[:100, :100]`).

    An array of an unfinished run holds NaN where nothing was written yet: ask `complete`, or let the methods here find
    out, which refuse NaN.
    """

    location: str
    group: zarr.Group
    manifest: Mapping[str, Any]  # the run's manifest.json; empty where the store lies alone

    @property
    def gram(self) -> zarr.Array:
        """The kernel, train by train: `plugin` (PSD, for solves) unless the run asked for `unbiased` alone."""
        return self.array("train/gram")

    @property
    def gram_unbiased(self) -> zarr.Array:
        """The kernel without the inflation by noise, train by train: for entries and comparisons; not PSD."""
        return self.array("train/gram_unbiased")

    @property
    def gram_stderr(self) -> zarr.Array:
        """Standard errors of the unbiased entries, train by train; NaN where no draw changed the output."""
        return self.array("train/gram_stderr")

    @property
    def test_gram(self) -> zarr.Array:
        """As `gram`, test rows by train columns."""
        return self.array("test/gram")

    @property
    def test_gram_unbiased(self) -> zarr.Array:
        """As `gram_unbiased`, test rows by train columns."""
        return self.array("test/gram_unbiased")

    @property
    def test_gram_stderr(self) -> zarr.Array:
        """As `gram_stderr`, test rows by train columns."""
        return self.array("test/gram_stderr")

    @property
    def test_diagonal(self) -> zarr.Array:
        """`k(x, x)` of the test examples, (m,) or (m, C, C) in form `full`."""
        return self.array("test/diagonal")

    @property
    def test_diagonal_unbiased(self) -> zarr.Array:
        """As `test_diagonal`, of the unbiased statistic."""
        return self.array("test/diagonal_unbiased")

    @property
    def test_diagonal_stderr(self) -> zarr.Array:
        """Standard errors of the unbiased test diagonal."""
        return self.array("test/diagonal_stderr")

    @property
    def outputs(self) -> zarr.Array:
        """`f(x; θ)` on the train examples, (n, C)."""
        return self.array("train/outputs")

    @property
    def test_outputs(self) -> zarr.Array:
        """`f(x; θ)` on the test examples, (m, C)."""
        return self.array("test/outputs")

    @property
    def targets(self) -> zarr.Array:
        """Train targets: integer labels (n,), or floats (n, columns)."""
        return self.array("train/targets")

    @property
    def test_targets(self) -> zarr.Array:
        """Test targets: integer labels (m,), or floats (m, columns)."""
        return self.array("test/targets")

    @property
    def ids(self) -> zarr.Array:
        """Ids of the train examples in their source, (n,)."""
        return self.array("train/id")

    @property
    def test_ids(self) -> zarr.Array:
        """Ids of the test examples in their source, (m,)."""
        return self.array("test/id")

    @property
    def complete(self) -> bool:
        """Whether the run finished the stages that fill the kernel, train and test, by its manifest; of a run without
        tiles, those that fill its factor.

        False too where there is no manifest: nothing then vouches for the entries.
        """
        stages = self.manifest.get("stages", {})
        needed = _KERNEL_STAGES if self.has_tiles else _FACTOR_STAGES
        return all((stages.get(name) or {}).get("finished") for name in needed)

    @property
    def has_tiles(self) -> bool:
        """Whether Gram matrices are stored, as they are unless the run was told `compute.write_tiles: false`."""
        return bool(self.group.attrs.get("tiles", True))

    def array(self, path: str) -> zarr.Array:
        """The array at `path` inside the store, such as `train/gram`.

        Raises:
            NNTKError: there is none; the message names the nearest one and all that there are.
        """
        found = self.group.get(path)
        if not isinstance(found, zarr.Array):
            held = self._array_paths()
            if not self.has_tiles and path.partition("/")[2].startswith("gram"):
                raise NNTKError(
                    f"the kernel at '{self.location}' holds no '{path}': it was run with 'compute.write_tiles: false'; "
                    "factor() gives Φ and M of it, linear_operator() its products with vectors"
                )
            raise NNTKError(
                f"the kernel at '{self.location}' holds no array '{path}'{nearest_name(path, held)}; it holds: "
                f"{', '.join(held)}; 'kernel.statistic: both' and 'compute.stderr: entry' store every companion"
            )
        return found

    def to_dask(self, path: str = "train/gram") -> "dask.array.Array":
        """An array as a dask array with one dask chunk for each shard, the unit that is read and written.

        Raises:
            NNTKError: no such array, or dask is not installed.
        """
        try:
            import dask.array
        except ImportError as error:
            raise NNTKError("to_dask needs dask; pip install it, or this project's extra 'analysis'") from error
        array = self.array(path)
        return dask.array.from_zarr(array, chunks=_unit(array))

    def to_xarray(self, split: str = "train") -> "xarray.Dataset":
        """The arrays directly in `train` or `test` as one lazy xarray data set, labelled with example ids.

        Chunks are shards, as in `to_dask`. In form `full`, where a row is a pair (example, output), Gram matrices carry
        no labels.

        Raises:
            NNTKError: no such split, or xarray or dask is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise NNTKError("to_xarray needs xarray, dask; pip install them or the extra 'analysis'") from error
        group = self.group.get(split)
        if not isinstance(group, zarr.Group):
            raise NNTKError(f"split is '{split}'; allowed: {', '.join(sorted(self.group.group_keys()))}")
        variables: dict[str, tuple[tuple[str, ...], dask.array.Array]] = {}
        for name in sorted(set(group.array_keys()) - {"id"}):
            path = f"{split}/{name}"
            variables[name] = (cast(Any, self.array(path).metadata).dimension_names, self.to_dask(path))
        dimensions = {axis for axes, _ in variables.values() for axis in axes}
        labels = {"row": f"{split}/id", "col": "train/id"}
        coordinates = {axis: self.array(path)[...] for axis, path in labels.items() if axis in dimensions}
        return xarray.Dataset(variables, coordinates, attrs=dict(self.group.attrs))

    def linear_operator(self, path: str = "train/gram") -> LinearOperator:
        """A symmetric kernel as a scipy operator that streams over the store: float64 products, a few shards in memory.

        Each product reads the shards on and above the diagonal once, so give `matmat` all vectors together: ten cost
        one pass, as one does. Cost: n²/2 entries read, 2n² operations a vector. The gram of a run without tiles is
        multiplied by its factor: two passes over the features, 4·n·F operations a vector.

        Raises:
            NNTKError: no such array, or not a square one; and from a product: a shard that cannot be read or holds NaN.
        """
        rows = self._factor_rows() if path == "train/gram" and not self.has_tiles else self._tiles(path)

        def multiply_one(vector: np.ndarray) -> np.ndarray:
            return rows.product(vector.reshape(-1, 1)).reshape(vector.shape)

        shape, both = (rows.num_rows, rows.num_rows), {"matmat": rows.product, "rmatmat": rows.product}
        return LinearOperator(shape, matvec=multiply_one, rmatvec=multiply_one, dtype=np.float64, **both)

    def _tiles(self, path: str) -> TiledKernel:
        """A square array as tiles that are its shards; an NNTKError where it is not square."""
        array = self.array(path)
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise NNTKError(f"'{path}' has shape {array.shape}; a linear operator needs a square kernel: train/gram…")
        return TiledKernel(array.shape[0], max(_unit(array)), lambda *place: self._read(path, array, place))

    def factor(self) -> tuple[Float[np.ndarray, "rows F"], Float[np.ndarray, "F F"]]:
        """`(Φ, M)` in float64 with `gram = Φ M Φᵀ` up to the rounding of the stored dtype.

        Stored by the estimator `weight` and by the covariance kernel: Φ are output differences, (n, S·C) with column
        `s·C + c` and `M ⊗ I_C`, or (n·C, S) and M in form `full`. Stored by kernels that are sketched as a whole: Φ are
        the sketches of the gradients summed over blocks, (n, k) or (n·C, k) in form `full`, and M a multiple of the
        identity, which is what M of the blocks comes to, all its entries being equal. Memory: n·F + F² float64 values.

        Raises:
            NNTKError: the kernel has no stored factor, its `gram` is not `plugin`, or the factor is not all written.
        """
        features = self._features()
        if _axes(features)[1] == SKETCHES:
            return self._sketched_factor(features)
        values = self._read("train/features", features, ...)
        metric = self._read("metric", self.array("metric"), ...)
        num_rows, num_draws, num_outputs = values.shape
        if self.group.attrs.get("outputs") == "full":
            return values.transpose(0, 2, 1).reshape(num_rows * num_outputs, num_draws), metric
        return values.reshape(num_rows, num_draws * num_outputs), np.kron(metric, np.eye(num_outputs))

    def _features(self) -> zarr.Array:
        """The features of the train examples that are a factor of `gram`; an NNTKError where there are none."""
        features = self.group.get("train/features")
        if not isinstance(features, zarr.Array) or "metric" not in self.group:
            raise NNTKError(
                f"the kernel at '{self.location}' has no stored factor; {WITH_FACTOR}; use gram or linear_operator() "
                "instead"
            )
        attributes = self.group.attrs
        if attributes.get("kind") == "nonlocal" and attributes.get("statistic") == "unbiased":
            raise NNTKError(
                f"the kernel at '{self.location}' was stored with 'statistic: unbiased' alone, which the factor "
                "does not give; run it with 'statistic: both' or 'plugin'"
            )
        return features

    def _factor_rows(self) -> FactorRows:
        """The train rows of W, `gram = W Wᵀ`, a row of shards at a time."""
        features = self._features()
        form = FactorForm(_axes(features)[1:], features.shape[1:], self.group.attrs.get("outputs") == "full")
        root = form.root(self._read("metric", self.array("metric"), ...))
        shard, num_rows = _unit(features)[0], features.shape[0]

        def read(interval: tuple[int, int]) -> Float[np.ndarray, "rows F"]:
            return form.rows(self._read("train/features", features, (slice(*interval),)), root)

        intervals = tuple((start, min(start + shard, num_rows)) for start in range(0, num_rows, shard))
        return FactorRows(num_rows * form.rows_per_example, form.num_columns_with(root), intervals, read)

    def _sketched_factor(self, features: zarr.Array) -> tuple[np.ndarray, np.ndarray]:
        """Block by block, so that one block's sketches are in memory at a time."""
        num_rows, num_blocks, *_, num_columns = features.shape
        total = sum(
            self._read("train/features", features, (slice(None), slice(r, r + 1)))[:, 0] for r in range(num_blocks)
        )
        metric = self._read("metric", self.array("metric"), (slice(0, 1), slice(0, 1)))[0, 0]
        full = self.group.attrs.get("outputs") == "full"
        columns = np.reshape(total, (-1, num_columns) if full else (num_rows, -1))
        return columns, metric * np.eye(columns.shape[1])

    def _read(self, path: str, array: zarr.Array, selection: Any) -> np.ndarray:
        """Entries as float64; refuses what cannot be read and what holds NaN."""
        try:
            values = np.asarray(array[selection], dtype=np.float64)
        # what checksum codecs, decompressors and stores raise
        except (ValueError, RuntimeError, OSError, BaseError) as error:
            reason = str(error).partition("\n")[0]
            raise NNTKError(
                f"'{path}' of the kernel at '{self.location}' cannot be read at {_spans(selection)} "
                f"({reason}); run 'nntk verify' and repeat the run with --resume"
            ) from error
        if np.isnan(values).any():
            raise NNTKError(
                f"'{path}' of the kernel at '{self.location}' holds NaN at {_spans(selection)}: the run has not "
                "finished; complete it with 'nntk run … --resume'"
            )
        return values

    def _array_paths(self) -> list[str]:
        groups = {"": self.group} | {f"{name}/": group for name, group in self.group.groups()}
        return sorted(prefix + name for prefix, group in groups.items() for name in group.array_keys())


def open_kernel(path: str | Path) -> StoredKernel:
    """Open the kernel of a run: `path` is a run directory or a `kernel.zarr`, local or `s3://bucket/prefix`.

    Credentials of object stores come from the cloud's usual environment variables. Reads the group's attributes and the
    manifest; entries stay in the store.

    Raises:
        NNTKError: nothing there, not an NNTK kernel, written by a newer version, or a broken manifest.
    """
    location = str(path).rstrip("/") or "/"
    parent, _, last = location.rpartition("/")
    candidates = ((location, STORE_NAME), (parent or ".", last)) if _object_store(location) is not None else ()
    for root, name in candidates:
        store = _object_store(root)
        if store is not None and name and _read_bytes(store, f"{name}/zarr.json") is not None:
            group = zarr.open_group(ObjectStore(store, read_only=True), path=name, mode="r", zarr_format=3)
            _check_schema(group, location)
            return StoredKernel(location, group, _read_manifest(store, root))
    raise NNTKError(
        f"no kernel at '{location}': expected a run directory that holds {STORE_NAME}, or such a store itself; "
        "'nntk run CONFIG' makes one"
    )


def _object_store(root: str) -> Any:
    """The folder or bucket `root`, or None where it cannot be one."""
    _, separator, rest = root.partition("://")
    try:
        if separator:
            return from_url(root) if rest else None
        folder = Path(root).expanduser().absolute()
        return LocalStore(folder) if folder.is_dir() else None
    except (BaseError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise NNTKError(f"cannot open '{root}' ({reason}); give a local path or s3://bucket/prefix") from error


def _read_bytes(store: Any, path: str) -> bytes | None:
    """The content of a file, None where there is none."""
    try:
        return bytes(obstore.get(store, path).bytes())
    except FileNotFoundError:
        return None
    except (BaseError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise NNTKError(
            f"cannot read '{path}' in {store} ({reason}); check the address and your access to it"
        ) from error


def _check_schema(group: zarr.Group, location: str) -> None:
    schema, version = group.attrs.get("schema"), group.attrs.get("version")
    if schema != SCHEMA or not isinstance(version, int):
        raise NNTKError(
            f"the zarr group at '{location}' is not an NNTK kernel: its attributes have schema {schema!r} and version "
            f"{version!r}, expected {SCHEMA!r} and a number; give the path of a run directory"
        )
    if version > VERSION:
        raise NNTKError(
            f"the kernel at '{location}' has store version {version}, this library reads up to {VERSION}; upgrade "
            "nntk-dist"
        )


def _read_manifest(store: Any, root: str) -> Mapping[str, Any]:
    content = _read_bytes(store, MANIFEST_NAME)
    try:
        manifest = json.loads(content) if content is not None else {}
    except ValueError as error:
        raise NNTKError(f"{MANIFEST_NAME} in '{root}' is not valid JSON ({error}); restore it or run again") from error
    if not isinstance(manifest, dict):
        raise NNTKError(f"{MANIFEST_NAME} in '{root}' is not a JSON object; restore it or run again")
    return manifest


def _axes(array: zarr.Array) -> tuple[str, ...]:
    return tuple(cast(Any, array.metadata).dimension_names)


def _unit(array: zarr.Array) -> tuple[int, ...]:
    """What one task wrote at a time: the shard, or the chunk of an array without shards."""
    return tuple(array.shards or array.chunks)


def _spans(selection: Any) -> str:
    """A selection of blocks as one writes it, `[0:4, 4:8]`."""
    return f"[{', '.join(f'{part.start}:{part.stop}' for part in selection)}]" if selection is not ... else "[...]"
