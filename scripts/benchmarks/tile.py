"""Gram tiles against plain matrix products: whole tiles, all their statistics included, of features that are there.

A tile is compared with one `torch.matmul` of its rows, its columns and the features' length. If a formula needs other
products (layers, metrics), the plain product's time is scaled to their length: the result is a ratio of rates.
Features are random numbers of the shapes that a kernel's have. As in a worker, which goes through the rows of a column,
columns are ready for products and rows are made ready for every tile, in a process that keeps freed memory as workers
do (but for `--quick`). What writes also reads its rows, from the local store that it writes to: a tile of the test
kernel, or one of the train kernel and its mirror image, twice as much.

Axes: n rows and columns of a tile, k numbers of a row (all blocks or draws together), R blocks, S draws, C outputs.
"""

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.models.builders import build_model
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.block_sums import Meeting
from nntk_dist.products.features import FeatureMap, Rows
from nntk_dist.products.wanted import Wanted
from nntk_dist.runtime.reused_memory import ReusedMemory
from nntk_dist.runtime.threads import torch_threads
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.standard_errors import Calibration
from nntk_dist.statistics.tile_estimates import tile_estimates
from pipeline.storage.array_table import StoredArray
from pipeline.storage.kernel_arrays import KernelArrays
from pipeline.storage.run_storage import KERNEL_STORE, RunStorage
from pipeline.work.gram_tiles import tile_totals
from scripts.benchmarks.figures import Figure, answer, as_a_worker, best_seconds
from scripts.studies.cells import Answer, Cell

_BLOCKS = 8
_ARRAYS = {"plugin": "train/gram", "unbiased": "train/gram_unbiased"}  # what is written


@dataclass(frozen=True)
class Setting:
    """One tile: its features, its size and its target; `least` is the target ratio, `width` the width of the two hidden
    layers if features are layers.
    """

    features: str
    stderr: str
    size: int
    length: int
    threads: int
    rounds: int
    writes: bool = False
    mirrored: bool = False
    least: float | None = None
    width: int = 512


def cells(*, quick: bool, device: str = "cpu") -> list[Cell]:
    """Factored tiles of one and two threads, with and without writing; then features of other kinds. On a GPU threads
    are those that write.
    """
    size, rounds, layered, narrow = (512, 1, 128, 128) if quick else (4096, 8, 1024, 2048)
    settings = []
    for threads in (1, 2):
        for stderr, least in (("sample", 0.85), ("entry", 0.42)):
            settings.append(Setting("means", stderr, size, size, threads, rounds, least=least))
        for mirrored in (False, True):
            written: dict[str, Any] = {"writes": True, "mirrored": mirrored, "least": 0.7}
            settings.append(Setting("means", "sample", size, size, threads, rounds, **written))
    for stderr in ("sample", "entry"):
        settings.append(Setting("sketch", stderr, size, size, 1, rounds, least=0.85 if stderr == "sample" else 0.42))
        settings.append(Setting("weight", stderr, size, size, 1, rounds))
        settings.append(Setting("layered", stderr, layered, size, 1, rounds))
        asked = 0.7 if stderr == "sample" else None
        settings.append(Setting("layered", stderr, narrow, size, 1, rounds, least=asked, width=256))
    where = {} if device == "cpu" else {"device": device}
    measure = _measure if quick else partial(as_a_worker, _measure)
    return [Cell(_key(each), vars(each) | where, partial(measure, each, device)) for each in settings]


def _key(setting: Setting) -> str:
    written = (", written" if setting.writes else "") + (" twice" if setting.mirrored else "")
    layers = f" of {setting.width}" if setting.features == "layered" else ""
    return f"{setting.features}{layers}, {setting.stderr}, {setting.threads} threads{written}"


def _measure(setting: Setting, device: str) -> Answer:
    """The rate of a tile over the rate of a plain product, measured alternately."""
    n, length = setting.size, setting.length
    features = _features(setting, device)
    calibration = Calibration(1.0, 0.1, 1) if setting.stderr == "entry" else None
    generator = torch.Generator().manual_seed(0)
    rows, columns = (_random_rows(features, n, generator, device) for _ in range(2))
    needed = _length_of_products(features, setting)
    ready = features.prepare(columns, Wanted(stderr=calibration is not None))
    left, right = (torch.randn(n, length, generator=generator).to(device) for _ in range(2))
    product, memory = torch.empty(n, n, device=device), ReusedMemory()

    def tile(own: Rows) -> dict[str, Tensor]:
        options: dict[str, Any] = {"dtype": torch.float32, "empty": memory.empty}
        result = tile_estimates(features, [(own, ready)], Meeting(), calibration, "localized", **options)
        memory.give_back(result.values())  # in which the next tile is made, as in a worker
        return result

    with tempfile.TemporaryDirectory() as folder, torch_threads(setting.threads):
        store = _Store(folder, setting, features, rows, device) if setting.writes else None
        actions: dict[str, Callable[[], object]] = {
            "product": lambda: torch.mm(left, right.T, out=product),
            "tile": (lambda: tile(rows)) if store is None else lambda: store.write(tile(store.read())),
        }
        seconds = best_seconds(actions, rounds=setting.rounds)
    value = seconds["product"] * needed / length / seconds["tile"]
    details: dict[str, Any] = {
        "product": seconds["product"],
        "tile": seconds["tile"],
        "length": length,
        "length of the formula": needed,
    }
    return answer(Figure(_words(setting), value, least=setting.least, details=details))


def _words(setting: Setting) -> str:
    kinds = {
        "means": "block means",
        "sketch": "sketches in 8 groups",
        "weight": "differences and their metric",
        "layered": f"layers of 784-{setting.width}-{setting.width}-10, S = R = 8",
    }
    whose = ", with its mirror image" if setting.mirrored else ""
    end = f"{whose}, rows read, compressed and written" if setting.writes else ""
    return f"{setting.size}² of {kinds[setting.features]}, stderr {setting.stderr}, {setting.threads} thread(s){end}"


def _features(setting: Setting, device: str = "cpu") -> FeatureMap:
    """A feature map whose rows have the asked length."""
    each = setting.length // _BLOCKS
    model: nn.Module = nn.Linear(each - 1, 1)
    options: dict[str, Any] = {"draws": _BLOCKS, "estimator": "autodiff", "contraction": setting.features}
    if setting.features == "sketch":
        options["sketch"] = each
    elif setting.features == "weight":
        options = {"draws": setting.length, "estimator": "weight"}
    elif setting.features == "layered":
        model = build_model("mlp", {"widths": [setting.width] * 2}, input_shape=(784,), num_outputs=10, seed=0)
    prepared = prepare_model(model, dtype=torch.float32, device=device)
    x = torch.randn(4, each - 1 if setting.features != "layered" else 784, generator=torch.Generator().manual_seed(1))
    x = x.to(device)
    spec = KernelSpec(gamma=0.1, blocks=_BLOCKS, **options)
    return make_feature_map(prepared, x, spec, decide(prepared, x, spec, batch=len(x)))


def _random_rows(features: FeatureMap, count: int, generator: torch.Generator, device: str) -> dict[str, Tensor]:
    return {spec.name: torch.randn(count, *spec.shape, generator=generator).to(device) for spec in features.arrays}


def _length_of_products(features: FeatureMap, setting: Setting) -> float:
    """Multiply-adds of an entry in the plain products that `sample` needs: the reference for every tile.

    Layers: ⟨h̃,h̃'⟩ and ⟨δ,δ'⟩ for every pair of draws, or mean output gradients if h̃ is the same for all draws, or mean
    h̃ of the readout.
    """
    if setting.features == "weight":
        return 2.0 * setting.length  # of all pairs of blocks, and of different ones
    if setting.features != "layered":
        return float(setting.length)
    assert isinstance(features, GradientFeatures)
    total = 0.0
    for spec in features.arrays:
        kind, _, index = spec.name.rpartition("_")
        numbers, pairs = math.prod(spec.shape[1:]), float(_BLOCKS**2)
        if spec.name == "readout":
            pairs = float(_BLOCKS)
        elif int(index) in features.shared:
            pairs = 1.0 if kind == "input" else float(_BLOCKS)
        total += pairs * numbers
    return total


class _Store:
    """A local store: features of rows, laid out as a run of two tiles lays them out, and the arrays of tiles."""

    def __init__(self, folder: str, setting: Setting, features: FeatureMap, rows: Rows, device: str) -> None:
        self._folder, self._setting, self._device, n = Path(folder), setting, device, setting.size
        self._paths = {spec.name: f"train/features/{spec.name}" for spec in features.arrays}
        self._arrays = KernelArrays(RunStorage(folder))
        tiles = [StoredArray(_ARRAYS[name], (2 * n, 2 * n), (n, n), ("row", "col"), "float32") for name in _ARRAYS]
        shapes = {self._paths[spec.name]: (2 * n, *spec.shape) for spec in features.arrays}
        made = [
            StoredArray(path, shape, (2 * n, *shape[1:]), tuple(f"axis_{i}" for i in range(len(shape))), "float32")
            for path, shape in shapes.items()
        ]
        self._arrays.create([*tiles, *made], {})
        for name, path in self._paths.items():
            self._arrays.write(path, (0,), torch.cat([rows[name].cpu()] * 2).numpy())

    def read(self) -> dict[str, Tensor]:
        """The features of a tile's rows, which are half of a shard."""
        some = slice(0, self._setting.size)
        return {
            name: torch.from_numpy(self._arrays.read(path, some, threads=self._setting.threads)).to(self._device)
            for name, path in self._paths.items()
        }

    def write(self, tile: dict[str, Tensor]) -> object:
        """Write a tile and add up what the driver wants to know, as the stages `test` and `gram` do.

        Its files are new ones, as all of a run are: to put one in an old one's place, a file system may wait for disk.
        """
        setting, n = self._setting, self._setting.size
        for path in _ARRAYS.values():
            shutil.rmtree(self._folder / KERNEL_STORE / path / "c", ignore_errors=True)
        totals, values = tile_totals(tile), {name: tile[name].to("cpu").numpy() for name in _ARRAYS}
        pieces = [(_ARRAYS[name], (n, 0), values[name].T) for name in _ARRAYS] if setting.mirrored else []
        pieces += [(_ARRAYS[name], (0, n), values[name]) for name in _ARRAYS]
        return self._arrays.write_all(pieces, threads=setting.threads), totals
