"""CSV and Arrow files, and columns of lists in every table; Parquet's own cases are in `test_parquet`."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal

from nntk_dist.errors import NNTKError
from pipeline.data import load_dataset

X = np.random.default_rng(0).standard_normal((17, 3, 2, 4))
Y = np.arange(17) % 3


def load(source, **options):
    return load_dataset(source, train=12, test=5, normalize=False, **options)


def lists(values, large=False):
    """Nested lists of any depth."""
    kind = pa.float64()
    for _ in range(values.ndim - 1):
        kind = pa.large_list(kind) if large else pa.list_(kind)
    return pa.array(values.tolist(), kind)


def fixed(values):
    array = pa.array(values.reshape(-1))
    for size in values.shape[:0:-1]:
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


@pytest.mark.parametrize("form", ["lists", "large", "fixed"])
@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_lists_become_axes(form, num_axes, tmp_path):
    values = X.reshape(17, *((24,), (6, 4), (3, 2, 4))[num_axes - 1])
    column = fixed(values) if form == "fixed" else lists(values, form == "large")
    table = pa.table({"x": column, "y": Y})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    pyarrow.feather.write_feather(table, tmp_path / "x.feather", chunksize=5)
    for source in (f"parquet:{tmp_path}/x.parquet", f"arrow:{tmp_path}/x.feather"):
        data = load(source)
        assert_array_equal(data.train.inputs, values.astype(np.float32)[data.train.ids])
        assert_array_equal(data.test.inputs, values.astype(np.float32)[data.test.ids])
        assert load(source, target_column="y").num_classes == 3


def test_lists_of_targets_are_real_targets(tmp_path):
    pq.write_table(pa.table({"x": X[:, 0, 0, 0], "y": lists(X[:, 0, 0])}), tmp_path / "x.parquet")
    data = load(f"parquet:{tmp_path}/x.parquet")
    assert_array_equal(data.train.targets, X[data.train.ids, 0, 0])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            [[1.0] * (1 + row % 4) for row in range(17)],
            r"column 'x' has lists of 1 to 4 numbers; pad them",
        ),
        ([None if row == 3 else [1.0] for row in range(17)], r"column 'x' has 1 missing lists; remove these rows"),
        ([[None if row == 3 else 1.0] for row in range(17)], r"hold 1 values that are NaN, .* the first of them row 3"),
        ([[]] * 17, r"column 'x' of type list<.*null> cannot be an input"),
        ([["a"]] * 17, r"column 'x' of type list<.*string> cannot be an input"),
    ],
)
def test_lists_that_are_no_examples(column, message, tmp_path):
    pq.write_table(pa.table({"x": column, "y": Y}), tmp_path / "x.parquet")
    with pytest.raises(NNTKError, match=message):
        load_dataset(f"parquet:{tmp_path}/x.parquet", train=17, test=0)


def csv_text(delimiter=","):
    names = ["ant", "bee", "cat"]
    lines = [delimiter.join((repr(float(X[row, 0, 0, 0])), str(row), names[Y[row]])) for row in range(17)]
    return "\n".join([delimiter.join(("a", "b", "class")), *lines]) + "\n"


@pytest.mark.parametrize(("delimiter", "compressed"), [(",", False), (";", False), ("\t", True)])
def test_csv(delimiter, compressed, tmp_path):
    path = tmp_path / ("x.csv.gz" if compressed else "x.csv")
    content = csv_text(delimiter).encode()
    path.write_bytes(gzip.compress(content) if compressed else content)
    data = load(f"csv:{path}", args={} if delimiter == "," else {"delimiter": delimiter})
    expected = np.stack([X[:, 0, 0, 0], np.arange(17)], axis=1).astype(np.float32)
    assert_array_equal(data.train.inputs, expected[data.train.ids])
    assert_array_equal(data.test.targets, Y[data.test.ids])


def test_types_of_a_csv_file_follow_from_all_its_lines(tmp_path):
    """Whole numbers for more than a block of two megabytes, then one that is not."""
    rows = 400_000
    lines = [f"{row},0" for row in range(rows - 1)]
    (tmp_path / "x.csv").write_text("x,y\n" + "\n".join([*lines, "0.5,1"]) + "\n")
    data = load_dataset(f"csv:{tmp_path}/x.csv", train=rows, test=0, normalize=False)
    assert data.train.inputs.dtype == np.float32
    assert data.train.inputs[data.train.ids == rows - 1, 0] == np.float32(0.5)


def test_whole_numbers_that_are_no_ids(tmp_path):
    (tmp_path / "x.csv").write_text("x,y\n" + "".join(f"{row},{row % 2}\n" for row in range(17)))
    assert load(f"csv:{tmp_path}/x.csv").train.inputs.dtype == np.int64
    data = load_dataset(f"csv:{tmp_path}/x.csv", train=17, test=0, args={"dtype": "float32"})
    np.testing.assert_allclose(data.train.inputs.mean(), 0, atol=1e-6)


def test_two_files_and_folders(tmp_path):
    table = pa.table({"x": X[:, 0, 0, 0], "y": Y})
    for name, part in (("train-0", table[:6]), ("train-1", table[6:11]), ("test", table[11:])):
        pa.csv.write_csv(part, tmp_path / f"{name}.csv")
        pyarrow.feather.write_feather(part, tmp_path / f"{name}.arrow")
    for source in (f"csv:{tmp_path}", f"arrow:{tmp_path}"):
        data = load_dataset(source, train=None, test=None, normalize=False)
        assert_array_equal(data.train.inputs[:, 0], X.astype(np.float32)[data.train.ids, 0, 0, 0])
        assert_array_equal(data.test.inputs[:, 0], X.astype(np.float32)[11 + data.test.ids, 0, 0, 0])
    data = load_dataset(f"csv:{tmp_path}/train-0.csv,{tmp_path}/test.csv", train=None, test=None, normalize=False)
    assert_array_equal(np.sort(data.train.ids), np.arange(6))


def test_sets_of_other_types_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("x,y\n1,0\n2,1\n")
    (tmp_path / "test.csv").write_text("x,y\n1.5,0\n2,1\n")
    with pytest.raises(NNTKError, match=r"test.csv' have the type float64, the training examples int64; give both"):
        load_dataset(f"csv:{tmp_path}", train=None, test=None)


@pytest.mark.parametrize(
    ("family", "content", "options", "message"),
    [
        ("csv", b"", {}, r"x.csv' is no readable CSV file \(Empty CSV file\); write it again"),
        (
            "csv",
            b"x,y\n1,2,3\n",
            {},
            r"x.csv' is no readable CSV file \(.*Expected 2 columns, got 3.*\)",
        ),
        ("csv", b"x,y\n1,2\n", {"delimiter": "::"}, r"delimiter is '::'; give one character"),
        ("csv", b"x,y\n1,2\n", {"dtype": "float31"}, r"data.args.dtype .*'float31'.*float32"),
        ("csv", b"x,y\n1,2\n", {"separator": ";"}, r"takes no argument 'separator'; allowed: "),
        ("arrow", b"not arrow at all", {}, r"x.arrow' is no readable Arrow file \(.*\); write it again"),
        ("arrow", b"", {}, r"x.arrow' is no readable Arrow file \(.*\); write it again"),
    ],
)
def test_files_that_cannot_be_read(family, content, options, message, tmp_path):
    path = tmp_path / f"x.{family}"
    path.write_bytes(content)
    with pytest.raises(NNTKError, match=message) as caught:
        load_dataset(f"{family}:{path}", train=1, test=0, args=options)
    assert "\n" not in str(caught.value)
