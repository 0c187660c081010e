"""Shards from `write_block` against zarr's shards of the same values, chunk by chunk.

Zarr stores the chunks of a file in another order; the chunks that the index lists are compared.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import google_crc32c
import numpy as np
import obstore.store
import pytest
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from nntk_dist.errors import StoreError
from pipeline.storage import kernel_store, shards
from pipeline.storage.array_table import StoredArray
from pipeline.storage.kernel_arrays import KernelArrays
from pipeline.storage.kernel_store import checksum, read_block, write_block
from pipeline.storage.run_storage import RunStorage

ABSENT = (2**64 - 1, 2**64 - 1)


def make(shape, shard, chunk, dtype="f4", *, store=None, **changes):
    itemsize = np.dtype(dtype).itemsize
    blosc = BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=itemsize)
    settings = {
        "compressors": [blosc, Crc32cCodec()],
        "fill_value": np.nan if np.dtype(dtype).kind == "f" else None,
        "config": {"write_empty_chunks": True},
    }
    store = MemoryStore() if store is None else store
    return zarr.create_array(
        store, name="a", shape=shape, dtype=dtype, chunks=chunk, shards=shard, **(settings | changes)
    )


def content(array):
    """Map the key of each file to its chunks in the order of the index."""
    files = {}
    num_chunks = math.prod(edge // part for edge, part in zip(array.shards, array.chunks, strict=True))
    for key, value in array.store._store_dict.items():
        if "/c/" in key:
            data = value.to_bytes()
            index = np.frombuffer(data[-16 * num_chunks - 4 : -4], "<u8").reshape(-1, 2).tolist()
            files[key] = [None if (o, n) == ABSENT else data[o : o + n] for o, n in index]
            assert sum(n for o, n in index if (o, n) != ABSENT) + 16 * num_chunks + 4 == len(data)
    return files


def random(shape, dtype, seed=0):
    generator = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2 if dtype == "?" else 100, shape).astype(dtype)


def forms(values):
    """The same values in several orders in memory."""
    yield values
    yield np.asfortranarray(values)
    yield np.stack([values, values], axis=-1)[..., 1]
    backwards = tuple(slice(None, None, -1) for _ in values.shape)
    yield values[backwards].copy()[backwards]
    frozen = np.asfortranarray(values)
    frozen.flags.writeable = False
    yield frozen


LAYOUTS = {
    "1-D": ((10,), (4,), (2,)),
    "1-D in one": ((7,), (7,), (7,)),
    "2-D": ((8, 12), (4, 6), (2, 3)),
    "2-D ragged": ((9, 13), (8, 12), (4, 3)),
    "2-D of one chunk": ((7, 5), (4, 3), (4, 3)),
    "2-D wide": ((70, 300), (64, 300), (32, 150)),
    "3-D": ((5, 7, 3), (4, 4, 3), (2, 4, 1)),
    "4-D": ((3, 5, 2, 4), (2, 4, 2, 4), (1, 2, 2, 2)),
}


# Every layout with the dtype of kernels and with one other; every dtype at least once.
LAYOUTS_AND_TYPES = [(*layout, "f4") for layout in LAYOUTS.values()] + [
    (*layout, dtype)
    for layout, dtype in zip(LAYOUTS.values(), cycle(["f8", "i8", "i4", "u1", "u2", "?"]), strict=False)
]


@pytest.mark.parametrize(("shape", "shard", "chunk", "dtype"), LAYOUTS_AND_TYPES)
def test_every_chunk_is_what_zarr_writes(shape, shard, chunk, dtype, monkeypatch, recwarn):
    values = random(shape, dtype)
    expected = make(shape, shard, chunk, dtype)
    expected[...] = values
    everything = tuple(map(slice, shape))
    monkeypatch.setattr(zarr.Array, "__setitem__", None)  # the slow way would raise
    for form in forms(values):
        array = make(shape, shard, chunk, dtype)
        assert write_block(array, everything, form) == (values.nbytes, google_crc32c.value(values.tobytes()))
        assert content(array) == content(expected)
        assert array[...].tobytes() == values.tobytes()
    # Files that other tests left open may be collected during this one; they have nothing to do with zarr.
    assert [str(warning.message) for warning in recwarn if warning.category is not ResourceWarning] == []


@pytest.mark.parametrize("store", [MemoryStore, lambda: ObjectStore(obstore.store.MemoryStore())])
def test_shards_one_by_one_and_several_at_once(store):
    values = random((9, 13), "f4")
    array = make(values.shape, (4, 6), (2, 3), store=store())
    for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
        for columns in (slice(0, 6), slice(6, 13)):  # one shard, then two beside each other
            part = values[rows, columns]
            assert write_block(array, (rows, columns), part.copy(order="F"))[1] == google_crc32c.value(part.tobytes())
    np.testing.assert_array_equal(zarr.open_array(array.store, path="a", mode="r")[...], values)


@pytest.mark.parametrize(("shape", "shard", "chunk", "dtype"), LAYOUTS_AND_TYPES)
def test_what_zarr_writes_is_read_back(shape, shard, chunk, dtype, tmp_path, monkeypatch):
    values = random(shape, dtype)
    array = make(shape, shard, chunk, dtype, store=LocalStore(tmp_path))
    array[...] = values
    parts = [tuple(map(slice, shape)), tuple(slice(0, edge) for edge in shard)]
    parts.append(tuple(slice((length - 1) // edge * edge, None) for length, edge in zip(shape, shard, strict=True)))
    monkeypatch.setattr(zarr.Array, "__getitem__", None)  # the slow way would raise
    for part in parts:
        found = read_block(array, part)
        assert found.dtype == dtype
        assert found.tobytes() == values[part].tobytes()
        cast = read_block(array, part, dtype="f8")
        assert cast.dtype == "f8"
        assert cast.tobytes() == values[part].astype("f8").tobytes()


PARTS = [np.s_[1:3, :], np.s_[:, 0:5], np.s_[4:9, 6:12], np.s_[8:9, 2:13], np.s_[0:1, 0:1], np.s_[5:7, 7:10]]


@pytest.mark.parametrize("local", [True, False])
def test_parts_of_shards_are_read_and_cast(local, tmp_path, monkeypatch):
    """By our reader on a local disk, elsewhere by zarr."""
    values = random((9, 13), "f4")
    values[4:6, 6:9] = np.nan
    store = LocalStore(tmp_path) if local else ObjectStore(obstore.store.MemoryStore())
    array = make(values.shape, (4, 6), (2, 3), store=store, config={"write_empty_chunks": False})
    array[...] = values
    if local:
        monkeypatch.setattr(zarr.Array, "__getitem__", None)  # the slow way would raise
    for part in PARTS:
        np.testing.assert_array_equal(read_block(array, part), values[part])
        np.testing.assert_array_equal(read_block(array, part, dtype="f8"), values[part].astype("f8"))


def test_every_part_of_a_block_of_three_axes(tmp_path):
    values = random((5, 5, 2), "f4")
    array = make(values.shape, (4, 4, 2), (2, 4, 1), store=LocalStore(tmp_path))
    array[...] = values
    for first in np.ndindex(values.shape):
        for last in np.ndindex(values.shape):
            if all(a <= b for a, b in zip(first, last, strict=True)):
                part = tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))
                np.testing.assert_array_equal(read_block(array, part), values[part])


def test_of_a_part_only_its_chunks_are_looked_at(tmp_path):
    array = make((64, 64), (64, 64), (16, 16), store=LocalStore(tmp_path))
    values = random((64, 64), "f4")
    write_block(array, np.s_[:, :], values)
    file = tmp_path / "a/c/0/0"
    data = bytearray(file.read_bytes())
    data[10] ^= 0x10  # of the first chunk
    file.write_bytes(data)
    np.testing.assert_array_equal(read_block(array, np.s_[16:, :]), values[16:])
    with pytest.raises(StoreError, match=r"is damaged"):
        read_block(array, np.s_[15:, :])


def test_chunks_that_zarr_left_out_hold_the_fill_value():
    array = make((8, 8), (4, 4), (2, 2), config={"write_empty_chunks": False})
    values = random((8, 8), "f4")
    values[0:2, 2:4] = np.nan
    array[...] = values
    np.testing.assert_array_equal(read_block(array, np.s_[:, :]), values)


def test_threads_that_read_do_not_share_their_memory(tmp_path):
    values = random((256, 256), "f4")
    array = make(values.shape, (64, 64), (32, 32), store=LocalStore(tmp_path))
    array[...] = values
    places = [np.s_[i : i + 64, j : j + 64] for i in range(0, 256, 64) for j in range(0, 256, 64)] * 20
    with ThreadPoolExecutor(4) as pool:
        for place, found in zip(places, pool.map(lambda place: read_block(array, place), places), strict=True):
            np.testing.assert_array_equal(found, values[place])


def test_a_block_is_read_by_several_threads(tmp_path):
    store = KernelArrays(RunStorage(tmp_path))
    store.create([StoredArray("train/features", (3000, 300), (1500, 300), ("row", "unit"), "float32")], {})
    values, chunk = random((3000, 300), "f4"), store.array("train/features").chunks[0]
    for start in (0, 1500):
        store.write("train/features", (start, 0), values[start : start + 1500])
    for rows in (slice(None), slice(7, 9), slice(chunk - 1, chunk + 1), slice(1499, 2999), slice(2000, 3000)):
        for dtype in ("f4", "f8"):
            found = store.read("train/features", rows, dtype=dtype, threads=2)
            np.testing.assert_array_equal(found, values[rows].astype(dtype))
    assert len(store._readers._threads) == 2
    file = tmp_path / "kernel.zarr/train/features/c/1/0"
    data = bytearray(file.read_bytes())
    data[10] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"is damaged"):
        store.read("train/features", threads=2)


def test_a_thread_that_compresses_is_one():
    """Also the main thread, in which Blosc would use up to eight."""
    assert threading.current_thread() is threading.main_thread()
    assert not blosc._get_use_threads()


def test_threads_that_write_do_not_share_their_memory(tmp_path):
    values = random((256, 256), "f4")
    array = make(values.shape, (64, 64), (32, 32), store=LocalStore(tmp_path))
    places = [np.s_[i : i + 64, j : j + 64] for i in range(0, 256, 64) for j in range(0, 256, 64)]
    for _ in range(10):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda place: write_block(array, place, values[place]), places))
        np.testing.assert_array_equal(array[...], values)


@pytest.mark.parametrize("fill", [np.nan, 0.0, -0.0])
def test_tiles_of_one_value_leave_their_files(fill):
    expected, array = (make((5, 7), (4, 4), (2, 2), fill_value=0.0) for _ in range(2))
    expected[...] = np.full((5, 7), fill)
    write_block(array, np.s_[:, :], np.full((5, 7), fill, np.float32))
    files = content(array)
    assert len(files) == 4
    assert files == content(expected)
    assert files["a/c/1/0"][2:] == [None, None]  # entirely outside the array


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_byte_shows(place, tmp_path):
    array = make((64, 64), (64, 64), (16, 16), store=LocalStore(tmp_path))
    write_block(array, np.s_[:, :], random((64, 64), "f4").T)
    file = tmp_path / "a/c/0/0"
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    file.write_bytes(data)
    for selection in (np.s_[:, :], np.s_[:63, :]):
        with pytest.raises(StoreError, match=r"is damaged"):
            read_block(array, selection)


@pytest.mark.parametrize("length", [0.001, 0.2, 0.9])
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_part_of_a_file_shows(length, end, tmp_path):
    array = make((64, 64), (64, 64), (16, 16), store=LocalStore(tmp_path))
    write_block(array, np.s_[:, :], random((64, 64), "f4"))
    file = tmp_path / "a/c/0/0"
    data = file.read_bytes()
    count = int(length * len(data))
    file.write_bytes(data[:count] if end == "first" else data[-count:])
    with pytest.raises(StoreError, match=r"is damaged"):
        read_block(array, np.s_[:, :])


@pytest.mark.parametrize("other", [{"dtype": "f8"}, {"dtype": "f4", "chunk": (8, 8), "shard": (32, 32)}])
def test_a_file_of_another_array_shows(other, tmp_path):
    """With as many chunks, of another size, and correct checksums."""
    settings = {"shard": (64, 64), "chunk": (16, 16), "dtype": "f4"}
    array = make((64, 64), **settings, store=LocalStore(tmp_path / "own"))
    foreign = make((64, 64), **settings | other, store=LocalStore(tmp_path / "foreign"))
    for each in (array, foreign):
        each[...] = random((64, 64), each.dtype)
    (tmp_path / "own/a/c/0/0").write_bytes((tmp_path / "foreign/a/c/0/0").read_bytes())
    with pytest.raises(StoreError, match="is of another size than the chunks of 'a'"):
        read_block(array, np.s_[:, :])


@pytest.mark.parametrize("length", [1, 14, 200])
def test_a_chunk_that_was_cut_short_before_its_checksum_was_made_shows(length, tmp_path):
    """The decompressor alone would read beyond its end in memory."""
    array = make((16, 16), (16, 16), (16, 16), store=LocalStore(tmp_path))
    write_block(array, np.s_[:, :], random((16, 16), "f4"))
    file = tmp_path / "a/c/0/0"
    chunk, index = file.read_bytes()[:length], np.array([0, length + 4], "<u8").tobytes()
    file.write_bytes(b"".join(part + google_crc32c.value(part).to_bytes(4, "little") for part in (chunk, index)))
    with pytest.raises(StoreError, match="is of another size than the chunks of 'a'"):
        read_block(array, np.s_[:, :])


def test_several_shards_of_an_object_store_are_left_to_zarr_and_one_is_not(monkeypatch):
    values = random((9, 13), "f4")
    array = make(values.shape, (4, 6), (2, 3), store=ObjectStore(obstore.store.MemoryStore()))
    array[...] = values
    np.testing.assert_array_equal(read_block(array, np.s_[:, :]), values)
    monkeypatch.setattr(zarr.Array, "__getitem__", None)  # would raise
    np.testing.assert_array_equal(read_block(array, np.s_[4:8, 12:13], dtype="f8"), values[4:8, 12:13])


OTHERS = {
    "zstd": {"compressors": ZstdCodec(level=-1, checksum=True)},
    "no checksum": {"compressors": BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=4)},
    "level": {"compressors": [BloscCodec(cname="lz4", clevel=2, shuffle="bitshuffle", typesize=4), Crc32cCodec()]},
    "typesize": {"compressors": [BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=2), Crc32cCodec()]},
    "no shards": {"shard": None},
    "transposed": {"filters": zarr.codecs.TransposeCodec(order=(1, 0))},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_arrays_with_other_codecs_are_refused(changes, tmp_path):
    storage = RunStorage(tmp_path)
    kernel_store.create_store(storage, {})
    settings = {"shard": (4, 6), "chunk": (2, 3)} | changes
    assert not shards.has_our_codecs(make((8, 12), **settings, store=storage.zarr_store(read_only=False)))
    with pytest.raises(StoreError, match="'a' has codecs of another program; check run_dir"):
        kernel_store.open_array(storage, "a")


def test_arrays_of_the_store_are_encoded_here_also_when_opened_again(tmp_path):
    storage = RunStorage(tmp_path)
    kernel_store.create_store(storage, {})
    for dtype in ("float32", "float64", "int64", "uint8", ">f4"):
        made = kernel_store.create_array(storage, dtype, shape=(9,), dtype=dtype, shard=(4,), dimension_names=("row",))
        assert shards.has_our_codecs(made)
        assert shards.has_our_codecs(kernel_store.open_array(storage, dtype, read_only=False))


def test_checksums_go_by_the_values_and_not_by_their_order_in_memory(monkeypatch):
    values = random((37, 11, 3), "f8")
    monkeypatch.setattr(kernel_store, "_STRIPE_BYTES", 1000)
    for form in (*forms(values), values[:0]):
        assert checksum(form) == google_crc32c.value(form.tobytes())


def test_threads_that_read_and_write_are_ended(tmp_path):
    store = KernelArrays(RunStorage(tmp_path))
    store.create([StoredArray("train/gram", (8, 4), (4, 4), ("row", "col"), "float32")], {})
    pieces = [("train/gram", (4 * i, 0), np.full((4, 4), i, np.float32)) for i in range(2)]
    for _ in range(2):
        store.write_all(pieces, threads=2)
        values = store.read("train/gram", threads=2)
        threads = [thread for pool in (store._writers, store._readers) for thread in pool._threads]
        store.forget()
        assert not any(thread.is_alive() for thread in threads)
        assert values.tolist() == [[i] * 4 for i in (0, 1) for _ in range(4)]


def test_an_interrupted_write_leaves_what_there_was(tmp_path, monkeypatch):
    array = make((4, 4), (4, 4), (2, 2), store=LocalStore(tmp_path))
    values = random((4, 4), "f4")
    write_block(array, np.s_[:, :], values)

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_crc", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_block(array, np.s_[:, :], random((4, 4), "f4", seed=1))
    np.testing.assert_array_equal(array[...], values)
    assert [path.name for path in (tmp_path / "a/c").rglob("*") if path.is_file()] == ["0"]


def test_a_shard_that_cannot_be_written_is_told_of_and_leaves_nothing(tmp_path, monkeypatch):
    store = KernelArrays(RunStorage(tmp_path))
    store.create([StoredArray("train/gram", (8, 4), (4, 4), ("row", "col"), "float32")], {})
    store.write("train/gram", (0, 0), np.ones((4, 4), np.float32))

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)  # as the last step of an atomic write
    with pytest.raises(StoreError, match=r"train/gram in run_dir .* cannot be written \(No space left on device\)"):
        store.write("train/gram", (0, 0), np.zeros((4, 4), np.float32))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "kernel.zarr/train/gram/c").rglob("*") if path.is_file()] == ["0"]
    assert (store.read("train/gram", slice(4)) == 1).all()
