"""The arrays of kernel.zarr: written values are read back, damage and gaps are detected, other tools can open them."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask.array
import google_crc32c
import numpy as np
import pytest
import xarray
import zarr

from nntk_dist.errors import StoreError
from pipeline.storage import kernel_store
from pipeline.storage.kernel_store import (
    chunk_edge,
    create_array,
    create_store,
    open_array,
    open_store,
    read_block,
    write_block,
)
from pipeline.storage.run_storage import RunStorage, StorageRefusal

ROWS, TILE = 150, 64


@pytest.fixture
def storage(tmp_path):
    storage = RunStorage(tmp_path / "run")
    create_store(storage, {"fingerprint": "ab12"})
    return storage


@pytest.fixture
def matrix():
    return np.random.default_rng(0).standard_normal((ROWS, ROWS)).astype("f4")


def blocks(length=ROWS, tile=TILE):
    edges = [slice(start, min(start + tile, length)) for start in range(0, length, tile)]
    return [(rows, columns) for rows in edges for columns in edges]


def make_gram(storage, **changes):
    settings = {"shape": (ROWS, ROWS), "dtype": "f4", "shard": (TILE, TILE), "dimension_names": ("row", "col")}
    return create_array(storage, "train/gram", **(settings | changes))


def fill(array, values):
    for selection in blocks():
        write_block(array, selection, values[selection])


def shard_file(storage, row, column):
    return storage.local_path / f"kernel.zarr/train/gram/c/{row}/{column}"


def test_blocks_come_back_and_one_file_holds_each(storage, matrix):
    array = make_gram(storage)
    for selection in blocks():
        block = matrix[selection]
        assert write_block(array, selection, block) == (block.nbytes, google_crc32c.value(block.tobytes()))
    again = open_array(storage, "train/gram")
    np.testing.assert_array_equal(read_block(again, np.s_[:, :]), matrix)
    np.testing.assert_array_equal(read_block(again, np.s_[5:70, 100:]), matrix[5:70, 100:])
    files = [path for path in storage.list("kernel.zarr") if "/c/" in path]
    assert len(files) == len(blocks())
    assert dict(open_store(storage).attrs) == {"fingerprint": "ab12", "schema": "nntk-kernel", "version": 1}


def test_reopened_for_writing_a_block_of_fill_values_still_leaves_its_file(storage):
    make_gram(storage)
    array = open_array(storage, "train/gram", read_only=False)
    write_block(array, np.s_[:64, :64], np.full((64, 64), np.nan))
    assert np.isnan(read_block(array, np.s_[:64, :64])).all()
    ids = create_array(storage, "train/id", shape=(ROWS,), dtype="i8", shard=(TILE,), dimension_names=("row",))
    write_block(ids, (slice(64),), np.zeros(64))
    assert (read_block(ids, (slice(64),)) == 0).all()


def test_values_are_stored_little_endian_in_the_dtype_of_the_array(storage, matrix):
    array = make_gram(storage, dtype=">f4")
    wide = np.asfortranarray(matrix[:64, :64].astype(">f8"))
    assert write_block(array, np.s_[:64, :64], wide) == (
        64 * 64 * 4,
        google_crc32c.value(matrix[:64, :64].astype("<f4").tobytes()),
    )
    assert array.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(read_block(array, np.s_[:64, :64]), matrix[:64, :64])


def test_the_policy_is_in_the_metadata(storage):
    make_gram(storage, shape=(5000, 5000), shard=(4096, 4096), attributes={"unit": "kernel"})
    metadata = json.loads((storage.local_path / "kernel.zarr/train/gram/zarr.json").read_text())
    assert metadata["dimension_names"] == ["row", "col"]
    assert metadata["fill_value"] == "NaN"
    assert metadata["attributes"] == {"unit": "kernel"}
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [4096, 4096]
    (sharding,) = metadata["codecs"]
    assert sharding["configuration"]["chunk_shape"] == [1024, 1024]
    assert sharding["configuration"]["codecs"] == [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {
            "name": "blosc",
            "configuration": {"typesize": 4, "cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 0},
        },
        {"name": "crc32c"},
    ]
    for file in storage.local_path.rglob("zarr.json"):
        assert "consolidated_metadata" not in json.loads(file.read_text())


@pytest.mark.parametrize(
    ("shard", "chunk"), [(1, 1), (360, 360), (1024, 1024), (1437, 479), (4096, 1024), (6000, 1000), (1439, 1439)]
)
def test_inner_chunks_divide_the_shard(shard, chunk):
    assert chunk_edge(shard) == chunk


def test_no_inner_chunk_is_more_than_its_codec_takes(storage):
    """Tens of thousands of outputs: axes that are each small enough, and 50,257 = 29 · 1,733."""
    shape, names = (400, 256, 50257), ("row", "draw", "output")
    array = create_array(storage, "large", shape=shape, dtype="f4", shard=(1024, 32, 50257), dimension_names=names)
    assert array.chunks == (100, 32, 50257)
    assert array.shards == (400, 32, 50257)


def test_shards_of_chunks_that_were_cut_smaller_are_read_back(storage, monkeypatch):
    monkeypatch.setattr(kernel_store, "_CHUNK_BYTES", 1000)
    values = np.random.default_rng(2).standard_normal((24, 6, 59)).astype("f4")
    names = ("row", "draw", "output")
    array = create_array(storage, "small", shape=values.shape, dtype="f4", shard=(12, 6, 59), dimension_names=names)
    assert array.chunks == (1, 3, 59)
    write_block(array, np.s_[:, :, :], values)
    np.testing.assert_array_equal(read_block(array, np.s_[5:20, 1:5, :]), values[5:20, 1:5])
    np.testing.assert_array_equal(array[...], values)


def test_a_ragged_last_shard_costs_no_padding_on_disk(storage):
    values = np.random.default_rng(1).standard_normal((ROWS, ROWS)).astype("f4")
    array = make_gram(storage, shard=(128, 128))
    for selection in blocks(tile=128):
        write_block(array, selection, values[selection])
    size = sum(len(storage.read_bytes(path)) for path in storage.list("kernel.zarr/train/gram/c"))
    assert size < 1.05 * values.nbytes


@pytest.mark.parametrize(
    "selection", [np.s_[0:63, 0:64], np.s_[1:64, 0:64], np.s_[0:64, 32:96], np.s_[100:150, 0:64], np.s_[0:150, 0:149]]
)
def test_part_of_a_shard_is_not_written(storage, matrix, selection):
    array = make_gram(storage)
    with pytest.raises(ValueError, match=r"train/gram: \[.*\] does not consist of whole shards of \(64, 64\)"):
        write_block(array, selection, matrix[selection])
    assert storage.list("kernel.zarr/train/gram/c") == []


def test_selections_and_values_must_fit(storage):
    array = make_gram(storage)
    with pytest.raises(ValueError, match=r"values of shape \(64, 1\) for \[0:64, 0:64\]"):
        write_block(array, np.s_[:64, :64], np.zeros((64, 1)))
    with pytest.raises(ValueError, match="is empty or has steps"):
        write_block(array, np.s_[0:64:2, :64], np.zeros((32, 64)))
    with pytest.raises(ValueError, match="1 slices for 2 axes"):
        read_block(array, (slice(None),))


def test_several_whole_shards_at_once(storage, matrix):
    array = make_gram(storage)
    write_block(array, np.s_[64:, :], matrix[64:])
    np.testing.assert_array_equal(read_block(array, np.s_[64:, :]), matrix[64:])


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_byte_shows(storage, matrix, place):
    array = make_gram(storage)
    fill(array, matrix)
    file = shard_file(storage, 1, 0)
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(
        StoreError, match=r"train/gram\[64:128, 0:64\] of '.*' is damaged \(.*\); run `nntk verify --forget`"
    ):
        read_block(array, np.s_[64:128, :64])
    np.testing.assert_array_equal(read_block(array, np.s_[:64, :]), matrix[:64])


def test_threads_that_cannot_be_had_are_no_damage(storage, matrix):
    array = make_gram(storage)
    fill(array, matrix)
    pool = ThreadPoolExecutor(2)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures"):
        read_block(array, np.s_[:, :], each=pool.map)


def test_a_truncated_file_shows(storage, matrix):
    array = make_gram(storage)
    fill(array, matrix)
    file = shard_file(storage, 2, 2)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"train/gram\[128:150, 128:150\] of '.*' is damaged"):
        read_block(array, np.s_[128:, 128:])


@pytest.mark.parametrize("empty", [False, True])
def test_a_missing_or_empty_shard_shows_where_it_is_required(storage, matrix, empty):
    array = make_gram(storage)
    fill(array, matrix)
    file = shard_file(storage, 1, 2)
    file.unlink()
    if empty:
        file.touch()
    with pytest.raises(
        StoreError,
        match=r"train/gram\[100:150, 0:150\] is incomplete: '.*/c/1/2' is missing; run `nntk verify --forget`",
    ):
        read_block(array, np.s_[100:, :])
    hole = read_block(array, np.s_[:, :], required=False)
    assert np.isnan(hole[64:128, 128:]).all()
    assert np.isnan(hole).sum() == 64 * 22
    np.testing.assert_array_equal(read_block(array, np.s_[:, :128]), matrix[:, :128])


def test_others_open_it_as_it_is(storage, matrix, recwarn):
    fill(make_gram(storage), matrix)
    ids = create_array(storage, "train/id", shape=(ROWS,), dtype="i8", shard=(TILE,), dimension_names=("row",))
    write_block(ids, (slice(None),), np.arange(ROWS))
    path = storage.local_path / "kernel.zarr"
    plain = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(plain["train/gram"][:], matrix)
    dataset = xarray.open_zarr(path, group="train", consolidated=False)
    assert dataset["gram"].dims == ("row", "col")
    np.testing.assert_array_equal(dataset["gram"].values, matrix)
    assert dataset["gram"].dtype == np.float32
    assert dataset["id"].values.tolist() == list(range(ROWS))
    lazy = dask.array.from_zarr(str(path), component="train/gram", chunks=(TILE, TILE))
    np.testing.assert_array_equal(lazy.compute(), matrix)
    assert [str(warning.message) for warning in recwarn if "zarr" in str(warning.filename)] == []


def test_arrays_are_made_once_and_fit_their_group(storage, matrix):
    fill(make_gram(storage), matrix)
    with pytest.raises(ValueError, match="train/gram exists already"):
        make_gram(storage)
    with pytest.raises(ValueError, match="train/outputs: row has length 150 in gram, not 151"):
        create_array(
            storage, "train/outputs", shape=(151, 10), dtype="f4", shard=(64, 10), dimension_names=("row", "output")
        )
    with pytest.raises(ValueError, match="differ in length"):
        make_gram(storage, shard=(64,))
    replaced = make_gram(storage, shape=(151, 151), overwrite=True)
    assert np.isnan(read_block(replaced, np.s_[:, :], required=False)).all()


def test_creating_the_store_again_keeps_its_arrays(storage, matrix):
    fill(make_gram(storage), matrix)
    create_store(storage, {"fingerprint": "cd34"})
    assert open_store(storage).attrs["fingerprint"] == "cd34"
    np.testing.assert_array_equal(read_block(open_array(storage, "train/gram"), np.s_[:, :]), matrix)


def test_stores_that_cannot_be_opened(tmp_path, storage):
    with pytest.raises(StoreError, match=r"there is no kernel store at '.*/nothing/kernel.zarr'; run `nntk run` first"):
        open_store(RunStorage(tmp_path / "nothing"))
    with pytest.raises(StoreError, match="has no array 'train/gram'; run its stage first"):
        open_array(storage, "train/gram")
    other = RunStorage(tmp_path / "other")
    zarr.open_group(other.zarr_store(read_only=False), mode="w").attrs["schema"] = "else"
    with pytest.raises(StoreError, match="is not a kernel store"):
        open_store(other)
    open_store(storage, read_only=False).attrs["version"] = 2
    with pytest.raises(StoreError, match="has version 2; this nntk reads 1: use the one that wrote it"):
        open_store(storage)
    storage.write_bytes("kernel.zarr/zarr.json", b"{")
    with pytest.raises(StoreError, match=r"kernel.zarr' is damaged"):
        open_store(storage)


@pytest.mark.parametrize("operation", ["get", "getsize", "set", "open"])
def test_a_storage_that_does_not_let_us_look_is_no_damage(operation, storage, matrix, monkeypatch):
    array = make_gram(storage)
    fill(array, matrix)
    actions = {
        "get": [
            lambda: open_store(storage),
            lambda: open_array(storage, "train/gram"),
            lambda: make_gram(storage, overwrite=True),
            lambda: read_block(array, np.s_[:, :], required=False),
        ],
        "open": [lambda: read_block(array, np.s_[:, :]), lambda: read_block(array, np.s_[:10, :])],
        "getsize": [lambda: read_block(array, np.s_[:, :])],
        "set": [lambda: create_store(storage, {}), lambda: make_gram(storage, overwrite=True)],
    }

    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path if operation == "open" else zarr.storage.LocalStore, operation, refuse)
    for action in actions[operation]:
        with pytest.raises(StorageRefusal, match=r"is out of reach \(Permission denied\); check the storage"):
            action()


def test_a_file_that_is_there_and_cannot_be_read_is_damaged(storage, matrix, monkeypatch):
    array = make_gram(storage)
    fill(array, matrix)

    def fail(*_args, **_options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(StoreError, match=r"train/gram\[.*cannot be read \(Input/output error\)") as caught:
        read_block(array, np.s_[:, :])
    assert not isinstance(caught.value, StorageRefusal)
