"""Small stores written with plain zarr, laid out as the pipeline does: whole, unfinished, torn."""

import json

import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore

NUM_TRAIN, NUM_TEST, NUM_DRAWS, NUM_OUTPUTS, TILE = 11, 5, 6, 3, 4
FINISHED = {"finished": "2025-11-03T14:22:00Z"}
MANIFEST = {"stages": {"features": FINISHED, "gram": FINISHED, "test": FINISHED}}


def write(group, path, values, axes, *, shards=None, written=None):
    """An array of the store, filled with NaN and then written (`written`: only these rows)."""
    values = np.asarray(values)
    shards = shards or values.shape
    array = group.create_array(
        path,
        shape=values.shape,
        dtype=values.dtype,
        chunks=tuple(max(1, length // 2) if length % 2 == 0 else length for length in shards),
        shards=shards,
        dimension_names=axes,
        fill_value=np.nan if values.dtype.kind == "f" else 0,
        compressors=ZstdCodec(level=1, checksum=True),
        config={"write_empty_chunks": True},
    )
    rows = slice(None) if written is None else written
    array[rows] = values[rows]


def contents(form, seed=3):
    """Features, metric and the kernel that they make, by explicit loops over examples and outputs."""
    generator = np.random.default_rng(seed)
    features = {
        name: generator.standard_normal((rows, NUM_DRAWS, NUM_OUTPUTS))
        for name, rows in (("train", NUM_TRAIN), ("test", NUM_TEST))
    }
    root = generator.standard_normal((NUM_DRAWS, NUM_DRAWS + 2))
    metric = root @ root.T

    def gram(left, right):
        entries = np.einsum("isc,st,jtd->icjd", left, metric, right)
        if form == "full":
            return entries.reshape(len(left) * NUM_OUTPUTS, len(right) * NUM_OUTPUTS)
        return np.einsum("icjc->ij", entries)

    grams = {name: gram(features[name], features["train"]) for name in features}
    grams["train"] = (grams["train"] + grams["train"].T) / 2
    return features, metric, grams


def make_store(store, *, form="trace", attributes=None, factor=True, gram_rows=None):
    """A kernel store as the pipeline writes it; `gram_rows` leaves the other rows of the train Gram unwritten."""
    features, metric, grams = contents(form)
    group = zarr.create_group(store, path="kernel.zarr", zarr_format=3)
    group.attrs.update(
        attributes
        or {"schema": "nntk-kernel", "version": 1, "fingerprint": "ab12", "statistic": "both", "outputs": form}
    )
    width = NUM_OUTPUTS if form == "full" else 1
    axes = ("row_output", "col_output") if form == "full" else ("row", "col")
    for split, rows in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        gram, shards = grams[split], (TILE * width, TILE * width)
        written = gram_rows if split == "train" else None
        write(group, f"{split}/gram", gram.astype(np.float32), axes, shards=shards, written=written)
        write(group, f"{split}/gram_unbiased", (gram - 1).astype(np.float32), axes, shards=shards)
        write(group, f"{split}/gram_stderr", np.full_like(gram, 0.1, dtype=np.float32), axes, shards=shards)
        write(group, f"{split}/outputs", np.ones((rows, NUM_OUTPUTS)), ("row", "output"))
        write(group, f"{split}/targets", np.arange(rows) % NUM_OUTPUTS, ("row",))
        write(group, f"{split}/id", 100 * (split == "test") + np.arange(rows), ("row",))
        if factor:
            write(group, f"{split}/features", features[split], ("row", "draw", "output"))
        else:
            write(group, f"{split}/features/layer0", features[split], ("row", "block", "unit"))
    diagonal = np.zeros((NUM_TEST, NUM_OUTPUTS, NUM_OUTPUTS)) if form == "full" else np.zeros(NUM_TEST)
    for suffix in ("", "_unbiased", "_stderr"):
        write(group, f"test/diagonal{suffix}", diagonal, ("row", "output", "output_col")[: diagonal.ndim])
    if factor:
        write(group, "metric", metric, ("draw", "draw_col"))
    return grams


def make_run(path, manifest=MANIFEST, **options):
    path.mkdir(parents=True, exist_ok=True)
    grams = make_store(LocalStore(path), **options)
    if manifest is not None:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        (path / "manifest.json").write_text(text)
    return grams
