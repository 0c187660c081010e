"""Sources that are named arrays: NumPy archives, Zarr groups and Python functions."""

import textwrap

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

from nntk_dist.errors import NNTKError
from pipeline.data import load_dataset

X = np.random.default_rng(0).integers(0, 256, size=(15, 4, 5), dtype=np.uint8)
Y = np.arange(15) % 3


def write_zarr(path, **arrays):
    group = zarr.open_group(path, mode="w")
    for name, values in arrays.items():
        chunks = (4, *values.shape[1:])[: values.ndim]
        group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks)[...] = values
    return path


def check(name):
    data = load_dataset(name, train=10, test=5, normalize=False)
    assert data.num_classes == 3
    assert_array_equal(data.train.inputs, X[data.train.ids].astype(np.float32))
    assert_array_equal(data.test.inputs, X[data.test.ids].astype(np.float32))
    assert_array_equal(data.test.targets, Y[data.test.ids])


def check_given(name):
    data = load_dataset(name, train=None, test=3, normalize=False)
    assert_array_equal(data.train.inputs, X[:10][data.train.ids].astype(np.float32))
    assert_array_equal(data.test.inputs, X[10:][data.test.ids].astype(np.float32))
    assert_array_equal(data.test.targets, Y[10:][data.test.ids])


GIVEN = {"x_train": X[:10], "y_train": Y[:10], "x_test": X[10:], "y_test": Y[10:]}


def test_npz(tmp_path):
    np.savez_compressed(tmp_path / "one.npz", x=X, y=Y, other=np.zeros(3))
    check(f"npz:{tmp_path / 'one.npz'}")
    np.savez(tmp_path / "two.npz", **GIVEN)
    check_given(f"npz:{tmp_path / 'two.npz'}")


def test_zarr(tmp_path):
    check(f"zarr:{write_zarr(tmp_path / 'one.zarr', x=X, y=Y)}")
    check_given(f"zarr:{write_zarr(tmp_path / 'two.zarr', **GIVEN)}")


def test_zarr_reads_only_the_selected_rows(tmp_path):
    path = write_zarr(tmp_path / "one.zarr", x=X, y=Y)
    everything = load_dataset(f"zarr:{path}", train=15, test=0)
    unread = set(range(4)) - {row // 4 for row in everything.train.ids[:3]}
    for chunk in unread:
        (path / "x" / "c" / str(chunk) / "0" / "0").write_bytes(b"damaged")
    assert len(unread) > 0
    some = load_dataset(f"zarr:{path}", train=3, test=0)
    assert_array_equal(some.train.ids, everything.train.ids[:3])


@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
@pytest.mark.parametrize("dtype", [str, "U3", np.dtypes.StringDType()])
def test_zarr_class_names(tmp_path, dtype):
    group = zarr.open_group(tmp_path / "names.zarr", mode="w")
    names = np.array(["cat", "ant", "dog"])[Y]
    group.create_array("x", data=X)
    group.create_array("y", shape=names.shape, dtype=dtype)[:] = names.astype(np.asarray([], dtype=dtype).dtype)
    data = load_dataset(f"zarr:{tmp_path / 'names.zarr'}", train=15, test=0)
    assert_array_equal(data.train.targets, np.array([1, 0, 2])[Y[data.train.ids]])


MODULE = """
    import numpy as np, torch
    x, y = np.load({path!r})["x"], np.load({path!r})["y"]

    def pair():
        return torch.as_tensor(x), list(y)

    def mapping():
        return {{"x_train": x[:10], "y_train": y[:10], "x_test": x[10:], "y_test": y[10:]}}

    def nothing():
        return None

    def lacking():
        return {{"x": x}}

    def needy(path):
        return x, y

    def failing():
        raise OSError("no\\nnetwork")
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    name = f"own_data_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE).format(path=str(tmp_path / "data.npz")))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_python(module):
    check(f"python:{module}:pair")
    check_given(f"python:{module}:mapping")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("pairs", r"has no 'pairs'; did you mean 'pair'\?"),
        ("nothing", r"returned a NoneType; it must return \(x, y\), or a mapping"),
        ("lacking", r"lacking has no 'y'; it needs x and y, or x_train, y_train, x_test, y_test; found x"),
        ("needy", r"needs the argument 'path', which was not given"),
        ("failing", r"data source python:.*:failing failed: OSError: no network"),
    ],
)
def test_bad_functions(module, function, message):
    with pytest.raises(NNTKError, match=message) as caught:
        load_dataset(f"python:{module}:{function}", train=1, test=1)
    assert "\n" not in str(caught.value)


def test_missing_module():
    with pytest.raises(NNTKError, match=r"data source 'python:no_such_module:f': cannot import 'no_such_module'"):
        load_dataset("python:no_such_module:f", train=1, test=1)


@pytest.mark.parametrize("family", ["npz", "zarr", "idx", "parquet", "csv", "arrow"])
@pytest.mark.parametrize("location", ["no/such/place", ""])
def test_missing_paths(family, location):
    with pytest.raises(
        NNTKError, match=rf"{family}:{location}: '{location}' does not exist .*; give the path of the data"
    ):
        load_dataset(f"{family}:{location}", train=1, test=1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ("x_train", "y_train", "x_test"),
            r"has no 'y_test'; .*found x_test, x_train, y_train$",
        ),
        (("x",), r"has no 'y'; it needs x and y, or"),
        (("images",), r"has no 'x'; .*found images"),
    ],
)
def test_missing_keys(tmp_path, keys, message):
    arrays = {key: GIVEN.get(key, X) for key in keys}
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(NNTKError, match=message):
        load_dataset(f"npz:{tmp_path / 'data.npz'}", train=1, test=1)
    with pytest.raises(NNTKError, match=message):
        load_dataset(f"zarr:{write_zarr(tmp_path / 'data.zarr', **arrays)}", train=1, test=1)


@pytest.mark.parametrize("arrays", [{"x": np.asarray(X), "y": np.asarray(4)}, {"x": np.asarray(3.0), "y": Y}])
def test_single_values_in_a_zarr_group(tmp_path, arrays):
    path = write_zarr(tmp_path / "data.zarr", **arrays)
    with pytest.raises(NNTKError, match=r"single value.*; give (one target|an array whose first axis)"):
        load_dataset(f"zarr:{path}", train=1, test=1)


def test_unreadable_archives(tmp_path):
    np.save(tmp_path / "single.npy", X)
    with pytest.raises(
        NNTKError, match=r"is no readable .npz archive of plain arrays \(it is a single array\); write it"
    ):
        load_dataset(f"npz:{tmp_path / 'single.npy'}", train=1, test=1)
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(NNTKError, match=r"text.npz is no readable .npz archive of plain arrays"):
        load_dataset(f"npz:{tmp_path / 'text.npz'}", train=1, test=1)
    np.savez(tmp_path / "pickled.npz", x=X, y=np.array([None] * 15))
    with pytest.raises(NNTKError, match=r"pickled.npz is no readable .npz archive of plain arrays \(Object arrays"):
        load_dataset(f"npz:{tmp_path / 'pickled.npz'}", train=1, test=1)
    cut = tmp_path / "cut.npz"
    np.savez(cut, x=X, y=Y)
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(NNTKError, match=r"cut.npz is no readable .npz archive"):
        load_dataset(f"npz:{cut}", train=1, test=1)


def test_a_folder_that_is_no_group(tmp_path):
    with pytest.raises(NNTKError, match=r"is no readable Zarr group .*; give a group that holds x and y"):
        load_dataset(f"zarr:{tmp_path}", train=1, test=1)


def test_an_array_instead_of_a_group(tmp_path):
    zarr.create_array(tmp_path / "array.zarr", data=X)
    with pytest.raises(NNTKError, match=r"is no readable Zarr group .*; give a group that holds x and y"):
        load_dataset(f"zarr:{tmp_path / 'array.zarr'}", train=1, test=1)
