"""What a Python function may return: torch data sets, and tables of pandas and Arrow."""

import sys
import textwrap

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from nntk_dist.errors import NNTKError
from nntk_dist.models.builders import build_model
from pipeline.data import load_dataset

X = np.random.default_rng(0).standard_normal((19, 4)).astype(np.float32)
Y = np.arange(19) % 3
MODULE = """
    import numpy as np, torch
    from torch.utils.data import Dataset, IterableDataset, TensorDataset
    X = np.random.default_rng(0).standard_normal((19, 4)).astype(np.float32)
    Y = np.arange(19) % 3

    class Items(Dataset):
        def __init__(self, make, count=19):
            self.make, self.count = make, count

        def __len__(self):
            return self.count

        def __getitem__(self, row):
            return self.make(row)

    class Endless(IterableDataset):
        def __iter__(self):
            yield 0, 0

    def fail(row):
        raise OSError("no\\nnetwork")

    MAKE = {
        "tensors": lambda row: (torch.tensor(X[row]), torch.tensor(Y[row])),
        "arrays": lambda row: (X[row], int(Y[row])),
        "names": lambda row: (X[row], "abc"[Y[row]]),
        "numbers": lambda row: (float(row), float(X[row, 0])),
        "parts": lambda row: ({"x": X[row], "row": row}, Y[row]),
        "pairs": lambda row: ((X[row], row), Y[row]),
        "triples": lambda row: (X[row], Y[row], 0),
        "ragged": lambda row: (X[row, : 1 + row % 3], Y[row]),
        "objects": lambda row: (object(), Y[row]),
        "failing": fail,
    }

    def items(kind):
        return Items(MAKE[kind])

    def tensors():
        return TensorDataset(torch.tensor(X), torch.tensor(Y))

    def two():
        return {"train": Items(MAKE["arrays"], 11), "test": Items(lambda row: MAKE["arrays"](11 + row), 8)}

    def endless():
        return Endless()

    def frame():
        import pandas
        columns = {name: X[:, place] for place, name in enumerate("abcd")}
        return pandas.DataFrame(columns | {"label": np.array(["p", "q", "r"])[Y]}, index=range(100, 119))

    def frames():
        return {"train": frame()[:11], "test": frame()[11:]}

    def frame_and_series():
        return frame()[list("abcd")], frame()["label"]

    def categories():
        return frame()[list("abcd")], frame()["label"].astype("category")

    def mixed():
        import pandas
        return pandas.DataFrame({"flag": Y == 1, "count": Y, "a": X[:, 0]}), frame()["label"]

    def words():
        return frame(), Y

    def arrow():
        import pyarrow
        return pyarrow.table({"a": X[:, 0], "b": X[:, 1], "y": Y})

    class Stream:  # a table of another package
        def __init__(self, table):
            self.__arrow_c_stream__ = table.__arrow_c_stream__

    class HuggingFace:  # what datasets.Dataset offers
        def __init__(self, table, rows, form=None):
            self.table, self.rows, self.form, self.column_names = table, rows, form, table.column_names

        def __len__(self):
            return len(self.rows)

        def with_format(self, form):
            return HuggingFace(self.table, self.rows, form)

        def __getitem__(self, rows):
            assert self.form == "arrow"
            return self.table.take(self.rows[rows])

    def stream(kind):
        if kind == "reader":
            return arrow().to_reader(max_chunksize=5)
        if kind == "sets":
            return {"train": Stream(arrow()[:11]), "test": Stream(arrow()[11:])}
        return Stream(arrow()) if kind == "stream" else HuggingFace(arrow(), list(range(19)))

    def broken():
        class Broken:
            def __arrow_c_stream__(self, requested_schema=None):
                raise ValueError("closed")
        return Broken()

    def build(input_shapes, num_outputs):
        return torch.nn.Linear(sum(sum(shape) or 1 for shape in input_shapes.values()), num_outputs)

    def wanting(input_columns):
        return X[:, [int(each) for each in input_columns]], Y
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "own_sets.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_sets", None)


def load(function, train=12, test=7, **options):
    return load_dataset(f"python:own_sets:{function}", train=train, test=test, normalize=False, **options)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "names"])
def test_items_of_a_torch_data_set(kind):
    data = load("items", args={"kind": kind})
    for split in (data.train, data.test):
        assert_array_equal(split.inputs, X[split.ids])
        assert_array_equal(split.targets, Y[split.ids])


def test_a_tensor_data_set_and_two_sets():
    data = load("tensors")
    assert_array_equal(data.train.inputs, X[data.train.ids])
    data = load("two", train=None, test=5)
    assert_array_equal(data.train.inputs, X[data.train.ids])
    assert_array_equal(data.test.inputs, X[11 + data.test.ids])
    assert_array_equal(data.test.targets, Y[11 + data.test.ids])


def test_numbers_and_real_targets():
    data = load("items", args={"kind": "numbers"})
    assert_array_equal(data.train.inputs[:, 0], data.train.ids)
    assert_array_equal(data.train.targets[:, 0], X[data.train.ids, 0])


@pytest.mark.parametrize(("kind", "names"), [("parts", ["x", "row"]), ("pairs", ["0", "1"])])
def test_items_of_several_parts(kind, names):
    data = load("items", args={"kind": kind})
    parts = data.layout.unpack(torch.from_numpy(data.train.inputs), torch.float32)
    assert list(parts) == names
    assert_array_equal(parts[names[0]].numpy(), X[data.train.ids])
    assert_array_equal(parts[names[1]].numpy(), data.train.ids)


@pytest.mark.parametrize("function", ["frame", "frame_and_series", "categories"])
def test_frames_of_pandas(function):
    data = load(function)
    for split in (data.train, data.test):
        assert_array_equal(split.inputs, X[split.ids])
        assert_array_equal(split.targets, Y[split.ids])


def test_tables_by_their_columns():
    data = load("frame", input_columns=["c", "a"], target_column="b")
    assert_array_equal(data.train.inputs, X[data.train.ids][:, [2, 0]])
    assert_array_equal(data.train.targets[:, 0], X[data.train.ids, 1])
    data = load("frames", train=None, test=5)
    assert_array_equal(data.train.inputs, X[data.train.ids])
    assert_array_equal(data.test.inputs, X[11 + data.test.ids])
    data = load("arrow")
    assert_array_equal(data.train.inputs, X[data.train.ids, :2])
    data = load("mixed")
    assert_array_equal(data.train.inputs, np.stack([Y == 1, Y, X[:, 0]], 1)[data.train.ids])


@pytest.mark.parametrize("kind", ["stream", "reader", "sets", "hugging face"])
def test_tables_of_other_packages_by_what_they_offer(kind):
    options = {"input_columns": ["b", "a"], "target_column": "y"}
    sizes = {"train": 11, "test": 8} if kind == "sets" else {}
    ours = load("stream", args={"kind": kind}, **options, **sizes)
    expected = load("arrow", **options, **sizes)
    if kind == "sets":
        assert_array_equal(ours.train.inputs, X[ours.train.ids][:, [1, 0]])
        assert_array_equal(ours.test.inputs, X[11 + ours.test.ids][:, [1, 0]])
        return
    for split, other in ((ours.train, expected.train), (ours.test, expected.test)):
        assert_array_equal(split.inputs, other.inputs)
        assert_array_equal(split.targets, other.targets)


def test_a_builder_gets_the_shapes_of_all_parts():
    data = load("items", args={"kind": "parts"})
    assert (data.input_shape, data.input_shapes) == ((4,), {"x": (4,), "row": ()})
    assert load("tensors").input_shapes is None
    shapes = {"input_shape": data.input_shape, "input_shapes": data.input_shapes}
    model = build_model("python:own_sets:build", {}, num_outputs=2, seed=0, **shapes)
    assert model.in_features == 5


def test_columns_are_passed_to_a_function_that_takes_them():
    data = load("wanting", input_columns=["3", "1"])
    assert_array_equal(data.train.inputs, X[data.train.ids][:, [3, 1]])


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("items", {"args": {"kind": "triples"}}, r"items: item 0 is a tuple; give pairs \(x, y\)"),
        ("items", {"args": {"kind": "ragged"}}, r"inputs have different shapes, such as \(1,\) and \(2,\); .*pad seq"),
        ("items", {"args": {"kind": "objects"}}, r"inputs are object objects; give numbers, tensors or NumPy arrays"),
        ("items", {"args": {"kind": "failing"}}, r"item 0 cannot be read: OSError: no network"),
        ("items", {"args": {"kinds": "x"}}, r"takes no argument 'kinds'; allowed: kind; did you mean 'kind'\?"),
        ("broken", {}, r"broken cannot be read as a table: closed"),
        ("endless", {}, r"endless is a data set without a length; give one with __len__ and __getitem__"),
        ("words", {}, r"words x: column 'label' has the type .*; give numbers without gaps"),
        ("frame", {"input_columns": ["z"]}, r"data source python:own_sets:frame has no column 'z'; it has a, b, c, d"),
        ("tensors", {"input_columns": ["a"]}, r"data.input_columns names columns, but .*tensors returned no table"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(function, options, message):
    with pytest.raises(NNTKError, match=message) as caught:
        load(function, **options)
    assert "\n" not in str(caught.value)
