"""Reading stored kernels: whole, unfinished, torn."""

import json
import pickle
import sys

import dask.array
import numpy as np
import pytest
import xarray
import zarr
from obstore.store import MemoryStore
from zarr.storage import ObjectStore

from nntk_dist.errors import NNTKError, StoreError
from nntk_dist.store.opening import open_kernel
from tests.library.store.stores import (
    FINISHED,
    MANIFEST,
    NUM_DRAWS,
    NUM_OUTPUTS,
    NUM_TRAIN,
    TILE,
    make_run,
    make_store,
    write,
)


def test_opens_a_run_directory_and_the_store_in_it_alike(tmp_path, monkeypatch):
    grams = make_run(tmp_path / "my run")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "my run", f"{tmp_path}/my run/", tmp_path / "my run" / "kernel.zarr", "my run"):
        kernel = open_kernel(path)
        np.testing.assert_array_equal(kernel.gram[:], grams["train"].astype(np.float32))
        assert kernel.manifest == MANIFEST
        assert kernel.complete
    monkeypatch.chdir(tmp_path / "my run")
    assert open_kernel("kernel.zarr").manifest == MANIFEST


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A finished run that tests only read."""
    place = tmp_path_factory.mktemp("whole")
    make_run(place)
    return place


@pytest.mark.parametrize(
    ("attribute", "path"),
    [
        ("gram", "train/gram"),
        ("gram_unbiased", "train/gram_unbiased"),
        ("gram_stderr", "train/gram_stderr"),
        ("test_gram", "test/gram"),
        ("test_gram_unbiased", "test/gram_unbiased"),
        ("test_gram_stderr", "test/gram_stderr"),
        ("test_diagonal", "test/diagonal"),
        ("test_diagonal_unbiased", "test/diagonal_unbiased"),
        ("test_diagonal_stderr", "test/diagonal_stderr"),
        ("outputs", "train/outputs"),
        ("test_outputs", "test/outputs"),
        ("targets", "train/targets"),
        ("test_targets", "test/targets"),
        ("ids", "train/id"),
        ("test_ids", "test/id"),
    ],
)
def test_every_attribute_is_the_lazy_read_only_array_of_its_path(whole_run, attribute, path):
    array = getattr(open_kernel(whole_run), attribute)
    assert isinstance(array, zarr.Array)
    assert array.path == f"kernel.zarr/{path}"
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 0


def test_an_object_store_is_read_like_a_disk(monkeypatch):
    bucket = MemoryStore()
    grams = make_store(ObjectStore(bucket))
    bucket.put("manifest.json", json.dumps(MANIFEST).encode())
    monkeypatch.setattr("obstore.store.from_url", {"s3://bucket/run": bucket}.__getitem__)
    kernel = open_kernel("s3://bucket/run")
    np.testing.assert_array_equal(kernel.test_gram[:], grams["test"].astype(np.float32))
    assert kernel.complete


@pytest.mark.parametrize("form", ["trace", "full"])
def test_the_factor_gives_the_gram(tmp_path, form):
    grams = make_run(tmp_path, form=form)
    features, metric = open_kernel(tmp_path).factor()
    assert features.dtype == metric.dtype == np.float64
    np.testing.assert_allclose(features @ metric @ features.T, grams["train"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["trace", "full"])
def test_the_linear_operator_multiplies_by_the_stored_gram_from_its_upper_shards(tmp_path, form, monkeypatch):
    make_run(tmp_path, form=form)
    kernel = open_kernel(tmp_path)
    dense = kernel.gram[:].astype(np.float64)
    vectors = np.random.default_rng(1).standard_normal((len(dense), 4))
    reads = []
    read = zarr.Array.__getitem__

    def noted(array, where):
        reads.append(where)
        return read(array, where)

    monkeypatch.setattr(zarr.Array, "__getitem__", noted)
    operator = kernel.linear_operator()
    np.testing.assert_allclose(operator @ vectors, dense @ vectors, rtol=1e-12, atol=1e-12)
    assert len(reads) == 6  # three stripes: 3 diagonal shards and 3 above the diagonal
    largest = TILE * (NUM_OUTPUTS if form == "full" else 1)
    assert all(part.stop - part.start <= largest for where in reads for part in where)
    np.testing.assert_allclose(operator @ vectors[:, 0], dense @ vectors[:, 0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(operator.T @ vectors, dense.T @ vectors, rtol=1e-12, atol=1e-12)
    assert operator.dtype == np.float64


@pytest.mark.parametrize("form", ["trace", "full"])
def test_a_store_without_tiles_multiplies_by_its_factor(tmp_path, form):
    grams = make_run(tmp_path, {**MANIFEST, "stages": {**MANIFEST["stages"], "metric": FINISHED}}, form=form)
    group = zarr.open_group(tmp_path / "kernel.zarr")
    for path in ("train/gram", "test/gram", "train/gram_unbiased"):
        del group[path]
    group.attrs["tiles"] = False
    kernel = open_kernel(tmp_path)
    assert kernel.complete
    assert not kernel.has_tiles
    vectors = np.random.default_rng(1).standard_normal((len(grams["train"]), 4))
    operator = kernel.linear_operator()
    np.testing.assert_allclose(operator @ vectors, grams["train"] @ vectors, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(operator @ vectors[:, 0], grams["train"] @ vectors[:, 0], rtol=1e-11, atol=1e-11)
    with pytest.raises(NNTKError, match=r"holds no 'train/gram': it was run with 'compute.write_tiles: false'; factor"):
        _ = kernel.gram
    with pytest.raises(NNTKError, match=r"holds no 'test/gram'"):
        _ = kernel.test_gram
    with pytest.raises(NNTKError, match=r"holds no 'train/gram_unbiased'"):
        kernel.linear_operator("train/gram_unbiased")
    with pytest.raises(NNTKError, match=r"no array 'train/features2'"):
        kernel.array("train/features2")


def test_without_tiles_the_factor_has_to_be_finished(tmp_path):
    make_run(tmp_path)
    zarr.open_group(tmp_path / "kernel.zarr").attrs["tiles"] = False
    assert not open_kernel(tmp_path).complete  # the manifest knows of no metric


@pytest.mark.parametrize("shared", [False, True], ids=["a sketch an output", "one sketch"])
def test_the_factor_of_sketches_is_their_sum_over_blocks(tmp_path, shared):
    make_run(tmp_path, factor=False)
    generator = np.random.default_rng(0)
    group = zarr.open_group(tmp_path / "kernel.zarr")
    del group["train/features"]
    shape, axes = ((4, 5), ("block", "column")) if shared else ((4, NUM_OUTPUTS, 5), ("block", "output", "column"))
    sketches = generator.standard_normal((NUM_TRAIN, *shape))
    write(group, "train/features", sketches, ("row", *axes), shards=(TILE, 2, *shape[1:]))
    write(group, "metric", np.full((4, 4), 1 / 16), ("block", "block_col"))
    means = sketches.mean(axis=1).reshape(NUM_TRAIN, -1)
    kernel = open_kernel(tmp_path)
    features, metric = kernel.factor()
    np.testing.assert_allclose(features @ metric @ features.T, means @ means.T, rtol=1e-12, atol=1e-12)
    group.attrs["tiles"] = False
    vectors = generator.standard_normal((NUM_TRAIN, 2))
    found = open_kernel(tmp_path).linear_operator() @ vectors
    np.testing.assert_allclose(found, means @ (means.T @ vectors), rtol=1e-11, atol=1e-11)


def test_dask_chunks_are_shards_and_survive_pickling(tmp_path):
    grams = make_run(tmp_path)
    lazy = open_kernel(tmp_path).to_dask()
    assert isinstance(lazy, dask.array.Array)
    assert lazy.chunks == ((4, 4, 3), (4, 4, 3))
    total = pickle.loads(pickle.dumps(lazy.sum())).compute(scheduler="synchronous")
    assert total == pytest.approx(grams["train"].sum(), rel=1e-5)


def test_xarray_labels_rows_and_columns_with_ids(tmp_path):
    grams = make_run(tmp_path)
    test = open_kernel(tmp_path).to_xarray("test")
    assert test.gram.dims == ("row", "col")
    assert float(test.gram.sel(row=103, col=7)) == pytest.approx(grams["test"][3, 7], rel=1e-6)
    assert test.gram.chunks == ((4, 1), (4, 4, 3))
    assert test.features.dims == ("row", "draw", "output")
    assert test.attrs["fingerprint"] == "ab12"
    assert open_kernel(tmp_path).to_xarray().sizes["row"] == NUM_TRAIN


def test_xarray_of_a_full_kernel_keeps_examples_and_kernel_rows_apart(tmp_path):
    make_run(tmp_path, form="full")
    train = open_kernel(tmp_path).to_xarray()
    assert train.gram.shape == (NUM_TRAIN * NUM_OUTPUTS, NUM_TRAIN * NUM_OUTPUTS)
    assert train.outputs.sizes == {"row": NUM_TRAIN, "output": NUM_OUTPUTS}


def test_the_fixture_opens_in_plain_xarray_too(tmp_path):
    make_run(tmp_path)
    plain = xarray.open_zarr(tmp_path / "kernel.zarr", group="train", consolidated=False)
    labelled = open_kernel(tmp_path).to_xarray()
    xarray.testing.assert_equal(plain.gram, labelled.gram.drop_vars(["row", "col"]))
    np.testing.assert_array_equal(plain.id, labelled.row)


@pytest.mark.parametrize(
    "stages", [None, {}, {"gram": FINISHED}, {"gram": {"finished": None}, "test": FINISHED}, {"features": FINISHED}]
)
def test_a_run_that_has_not_finished_its_kernel_is_not_complete(tmp_path, stages):
    make_run(tmp_path, manifest=None if stages is None else {"stages": stages})
    assert not open_kernel(tmp_path).complete


def test_unwritten_tiles_are_refused_by_what_would_use_them(tmp_path):
    make_run(tmp_path, gram_rows=slice(0, 4))
    operator = open_kernel(tmp_path).linear_operator()
    with pytest.raises(NNTKError, match=r"'train/gram' .* holds NaN at \[4:8, 4:8\]: the run has not finished"):
        operator @ np.ones(NUM_TRAIN)
    zarr.open_group(tmp_path / "kernel.zarr")["metric"][0, 0] = np.nan
    with pytest.raises(NNTKError, match=r"'metric' .* holds NaN at \[\.\.\.\]"):
        open_kernel(tmp_path).factor()


def test_a_flipped_byte_is_refused(tmp_path):
    make_run(tmp_path)
    shard = tmp_path / "kernel.zarr" / "train" / "gram" / "c" / "0" / "1"
    damaged = bytearray(shard.read_bytes())
    damaged[20] ^= 1
    shard.write_bytes(damaged)
    operator = open_kernel(tmp_path).linear_operator()
    with pytest.raises(NNTKError, match=r"'train/gram' .* cannot be read at \[0:4, 4:8\].*nntk verify"):
        operator @ np.ones(NUM_TRAIN)


def test_a_kernel_without_a_stored_factor_says_which_have_one(tmp_path):
    make_run(tmp_path, factor=False)
    with pytest.raises(NNTKError, match="no stored factor; kernels of 'kind: covariance' of up to 4,096 draws, of"):
        open_kernel(tmp_path).factor()


def test_the_factor_of_an_unbiased_gram_is_refused(tmp_path):
    make_run(tmp_path)
    group = zarr.open_group(tmp_path / "kernel.zarr")
    group.attrs.update({"kind": "nonlocal", "statistic": "unbiased"})
    with pytest.raises(NNTKError, match="'statistic: unbiased' alone"):
        open_kernel(tmp_path).factor()
    group.attrs["kind"] = "covariance"  # has only one statistic, regardless of the options
    assert open_kernel(tmp_path).factor()[0].shape == (NUM_TRAIN, NUM_DRAWS * NUM_OUTPUTS)


@pytest.mark.parametrize("missing", ["nothing", "nothing/kernel.zarr", ""])
def test_nothing_there(tmp_path, missing):
    with pytest.raises(NNTKError, match=r"no kernel at .*expected a run directory that holds kernel.zarr"):
        open_kernel(tmp_path / missing)


def test_a_file_instead_of_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("no kernel")
    with pytest.raises(NNTKError, match="no kernel at"):
        open_kernel(tmp_path / "notes.txt")


def test_an_address_that_cannot_be_opened():
    with pytest.raises(NNTKError, match=r"cannot open 'ftp://host/run'.*give a local path or s3://bucket/prefix"):
        open_kernel("ftp://host/run")


@pytest.mark.parametrize("attributes", [{"title": "other"}, {"schema": "nntk-kernel"}, {"schema": "x", "version": 1}])
def test_another_zarr_group_is_not_taken_for_a_kernel(tmp_path, attributes):
    make_run(tmp_path, attributes=attributes)
    with pytest.raises(NNTKError, match="is not an NNTK kernel: its attributes have schema"):
        open_kernel(tmp_path)


def test_a_newer_store_asks_for_an_upgrade(tmp_path):
    make_run(tmp_path, attributes={"schema": "nntk-kernel", "version": 2})
    with pytest.raises(NNTKError, match="store version 2, this library reads up to 1; upgrade"):
        open_kernel(tmp_path)


@pytest.mark.parametrize(("manifest", "message"), [("{", "is not valid JSON"), ("[1]", "is not a JSON object")])
def test_a_broken_manifest(tmp_path, manifest, message):
    make_run(tmp_path, manifest=manifest)
    with pytest.raises(NNTKError, match=message):
        open_kernel(tmp_path)


def test_a_missing_array_names_the_nearest_and_all_there_are(tmp_path):
    make_run(tmp_path)
    with pytest.raises(
        NNTKError, match=r"no array 'train/gram_unbias'; did you mean 'train/gram_unbiased'\?; it holds: metric, "
    ):
        open_kernel(tmp_path).array("train/gram_unbias")


def test_only_a_square_kernel_is_an_operator(tmp_path):
    make_run(tmp_path)
    with pytest.raises(NNTKError, match=r"'test/gram' has shape \(5, 11\); a linear operator needs a square kernel"):
        open_kernel(tmp_path).linear_operator("test/gram")


def test_an_unknown_split(tmp_path):
    make_run(tmp_path)
    with pytest.raises(NNTKError, match="split is 'validation'; allowed: test, train"):
        open_kernel(tmp_path).to_xarray("validation")


@pytest.mark.parametrize(("package", "method"), [("dask.array", "to_dask"), ("xarray", "to_xarray")])
def test_optional_packages_are_asked_for_by_name(tmp_path, monkeypatch, package, method):
    make_run(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NNTKError, match=rf"{method} needs .* extra 'analysis'"):
        getattr(open_kernel(tmp_path), method)()


@pytest.mark.parametrize(("form", "rows"), [("trace", NUM_TRAIN), ("full", NUM_TRAIN * NUM_OUTPUTS)])
def test_the_repr_is_short_and_entries_are_read_by_index(tmp_path, form, rows):
    grams = make_run(tmp_path, form=form)
    kernel = open_kernel(tmp_path)
    assert kernel.shape == (rows, rows)
    assert repr(kernel) == f"StoredKernel('{tmp_path}', {rows} × {rows}, statistic both, complete)"
    assert kernel[1, 2] == grams["train"].astype(np.float32)[1, 2]
    assert isinstance(kernel[1, 2], float)
    np.testing.assert_array_equal(kernel[:3, 2:5], grams["train"].astype(np.float32)[:3, 2:5])
    np.testing.assert_array_equal(kernel[3], grams["train"].astype(np.float32)[3])


def test_entries_that_are_not_written_are_refused_by_index(tmp_path):
    make_run(tmp_path, {"stages": {}}, gram_rows=slice(0, 4))
    kernel = open_kernel(tmp_path)
    assert repr(kernel).endswith("statistic both, not complete)")
    with pytest.raises(StoreError, match=r"'train/gram' .* holds NaN at \[5, :\]: the run has not finished"):
        kernel[5, :]
