"""Behaviour of every source: selection, ids, labels, normalisation, and errors."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from nntk_dist.errors import ArgumentError, NNTKError, NNTKWarning
from pipeline.data import load_dataset
from pipeline.data.selection import shuffled

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3.0, 2.0, size=(20, 4))
Y = RANDOM.integers(0, 3, size=20)


@pytest.fixture
def source(tmp_path):
    """Write arrays to an archive and name it."""

    def write(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return f"npz:{tmp_path / 'data.npz'}"

    return write


def test_types_and_shapes(source):
    data = load_dataset(source(x=X, y=Y), train=12, test=5)
    assert data.train.inputs.shape == (12, 4)
    assert data.test.inputs.shape == (5, 4)
    assert data.train.inputs.dtype == np.float32
    assert data.train.ids.dtype == data.train.targets.dtype == np.int64
    assert data.input_shape == (4,)
    assert data.num_classes == data.num_outputs == 3


def test_a_single_set_is_split_disjointly_and_ids_are_its_rows(source):
    data = load_dataset(source(x=X, y=Y), train=12, test=8, normalize=False)
    assert_array_equal(np.sort(np.concatenate([data.train.ids, data.test.ids])), np.arange(20))
    for split in (data.train, data.test):
        assert_array_equal(split.inputs, X[split.ids].astype(np.float32))
        assert_array_equal(split.targets, Y[split.ids])


def test_sizes_do_not_move_the_other_set_and_nest(source):
    name = source(x=X, y=Y)
    small, large = load_dataset(name, train=5, test=4), load_dataset(name, train=16, test=4)
    assert_array_equal(small.train.ids, large.train.ids[:5])
    assert_array_equal(small.test.ids, large.test.ids)


def test_the_seed_decides(source):
    name = source(x=X, y=Y)
    first, again, other = (load_dataset(name, train=10, test=4, seed=seed) for seed in (1, 1, 2))
    assert_array_equal(first.train.ids, again.train.ids)
    assert_array_equal(first.train.inputs, again.train.inputs)
    assert not np.array_equal(first.train.ids, other.train.ids)


def test_the_shuffle_is_the_same_for_ever():
    assert shuffled(8, 0, stream=0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert_array_equal(np.sort(shuffled(1000, 3, stream=1)), np.arange(1000))
    assert not np.array_equal(shuffled(1000, 3, stream=0), shuffled(1000, 3, stream=1))


@pytest.mark.parametrize(("train", "test", "sizes"), [(None, 6, (14, 6)), (15, None, (15, 5)), (None, 0, (20, 0))])
def test_null_sizes_of_a_single_set(source, train, test, sizes):
    data = load_dataset(source(x=X, y=Y), train=train, test=test)
    assert (len(data.train.ids), len(data.test.ids)) == sizes
    assert data.test.inputs.shape[1:] == (4,)


def test_given_sets_are_sampled_apart(source):
    name = source(x_train=X[:12], y_train=Y[:12], x_test=X[12:], y_test=Y[12:])
    whole, part = load_dataset(name, train=None, test=None), load_dataset(name, train=5, test=3)
    assert_array_equal(np.sort(whole.train.ids), np.arange(12))
    assert_array_equal(np.sort(whole.test.ids), np.arange(8))
    assert_array_equal(part.train.ids, whole.train.ids[:5])
    assert_array_equal(part.test.ids, whole.test.ids[:3])
    assert_array_equal(whole.test.targets, Y[12:][whole.test.ids])


def test_classes_are_those_of_the_whole_source_in_order(source):
    names = np.array(["dog", "ant", "cat", "bee", "ant", "cat"])
    x = np.arange(6.0)
    data = load_dataset(source(x=x, y=names), train=1, test=1)
    assert data.num_classes == 4
    assert data.train.targets[0] == ["ant", "bee", "cat", "dog"].index(names[data.train.ids[0]])
    given = load_dataset(source(x_train=x, y_train=[7, 3, 7, 3, 3, 3], x_test=x[:2], y_test=[5, 9]), train=6, test=2)
    assert given.num_classes == 4
    assert_array_equal(given.train.targets, np.array([2, 0, 2, 0, 0, 0])[given.train.ids])
    assert_array_equal(given.test.targets, np.array([1, 3])[given.test.ids])


@pytest.mark.parametrize("labels", [Y[:, None], Y.astype(np.uint8), Y == 1, Y.astype("S1")])
def test_label_types(source, labels):
    data = load_dataset(source(x=X, y=labels), train=20, test=0)
    expected = (Y == 1) if labels.dtype == bool else Y
    assert_array_equal(data.train.targets, expected[data.train.ids])


@pytest.mark.parametrize("width", [None, 1, 2])
def test_floats_are_regression_targets(source, width):
    targets = RANDOM.normal(size=20 if width is None else (20, width)).astype(np.float32)
    data = load_dataset(source(x=X, y=targets), train=10, test=5)
    assert data.num_classes is None
    assert data.num_outputs == (width or 1)
    assert data.train.targets.dtype == np.float64
    assert_array_equal(data.train.targets, targets.reshape(20, -1)[data.train.ids])


@pytest.mark.parametrize(
    ("shape", "axes"), [((4,), (0,)), ((5, 6), (0, 1, 2)), ((3, 5, 6), (0, 2, 3)), ((2, 3, 2, 2), (0, 2, 3, 4))]
)
def test_normalization_is_per_channel_and_from_the_training_set(source, shape, axes):
    x = RANDOM.normal(100.0, 7.0, size=(20, *shape))
    data = load_dataset(source(x=x, y=Y), train=12, test=8)
    train = x[data.train.ids]
    mean, deviation = train.mean(axis=axes, keepdims=True), train.std(axis=axes, keepdims=True)
    assert_allclose(data.mean, mean.ravel(), rtol=1e-13)
    assert_allclose(data.deviation, deviation.ravel(), rtol=1e-12)
    assert_allclose(data.train.inputs, (train - mean) / deviation, atol=1e-6)
    assert_allclose(data.test.inputs, (x[data.test.ids] - mean) / deviation, atol=1e-6)


def test_normalization_in_several_blocks_equals_one(source, monkeypatch):
    name = source(x=X, y=Y)
    whole = load_dataset(name, train=13, test=7)
    monkeypatch.setattr("pipeline.data.preparation.BLOCK_ELEMENTS", 12)
    parts = load_dataset(name, train=13, test=7)
    assert_allclose(parts.deviation, whole.deviation, rtol=1e-14)
    assert_allclose(parts.train.inputs, whole.train.inputs, rtol=1e-6)
    assert_allclose(parts.test.inputs, whole.test.inputs, rtol=1e-6)


def test_constant_channels_become_zero(source):
    x = X.copy()
    x[:, 2] = 0.1  # the mean of equal numbers is not always that number
    data = load_dataset(source(x=x, y=Y), train=13, test=7)
    assert data.deviation[2] == 1
    assert_array_equal(data.train.inputs[:, 2], np.zeros(13))


def test_large_offsets_keep_their_digits(source):
    x = 1e8 + X
    data = load_dataset(source(x=x, y=Y), train=13, test=7)
    train = x[data.train.ids]
    assert_allclose(data.train.inputs, (train - train.mean(0)) / train.std(0), atol=1e-6)


def test_without_normalization_values_are_untouched(source):
    data = load_dataset(source(x=X, y=Y), train=13, test=7, normalize=False)
    assert_array_equal(data.train.inputs, X[data.train.ids].astype(np.float32))
    assert_array_equal(data.mean, np.zeros(4))
    assert_array_equal(data.deviation, np.ones(4))


def spoiled(array, *values):
    array = array.astype(float).copy()
    for row, value in values:
        array[row] = value
    return array


BAD_DATA = [
    (
        {"x": spoiled(X, (7, np.nan), (3, np.inf)), "y": Y},
        r"inputs of .* hold 8 values that are NaN.* in 2 of the 20 sel.* row 3;",
    ),
    ({"x": spoiled(X, (4, 1e39)), "y": Y}, r"hold 4 values that are NaN, infinite or too large for float32.* row 4;"),
    (
        {"x": X, "y": spoiled(Y, (6, np.nan), (9, -np.inf))},
        r"targets of .* hold 2 values that are NaN.* in 2 of .* row 6;",
    ),
    ({"x": X, "y": Y[:-1]}, r"x has 20 rows but its targets have 19; give one target per row"),
    ({"x": X[:0], "y": Y[:0]}, r"data.npz x is empty; give data with at least one row"),
    ({"x": X[:, :0], "y": Y}, r"have the shape \(20, 0\): examples without a value"),
    ({"x": X.astype(complex), "y": Y}, r"inputs of .* have the type complex128; give real numbers"),
    ({"x": X.astype(str), "y": Y}, r"inputs of .* have the type <U\d+; give real numbers"),
    ({"x": X, "y": Y.astype(complex)}, r"targets of .* have the type complex128; give integers, class names or floats"),
    ({"x": X, "y": np.eye(3, dtype=int)[Y]}, r"are int64 of shape \(20, 3\); labels must have the shape \(n,\)"),
    ({"x": X, "y": X[:, :, None]}, r"are float64 of shape \(20, 4, 1\); labels must"),
    ({"x": 3, "y": 4}, r"has a single value as its targets; give one target for each row"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_DATA)
def test_bad_data(source, arrays, message):
    with pytest.raises(NNTKError, match=message) as caught:
        load_dataset(source(**arrays), train=20, test=0)
    assert "\n" not in str(caught.value)


BAD_PAIRS = [
    ((X, Y), (X[:, :3], Y), r"examples of .* x_test have shape \(3,\), the training examples \(4,\)"),
    ((X, Y), (X, Y + 0.5), r"differ: int64 \(20,\) and float64 \(20, 1\); give both one form"),
    ((X, Y), (X, Y.astype(str)), r"differ: int64 \(20,\) and <U21 \(20,\); give both one form"),
    ((X, Y), (X[:0], Y[:0]), r"x_test is empty; give data with at least one row"),
    ((X, Y), (spoiled(X, (2, np.nan)), Y), r"inputs of .* x_test hold 4 values that are NaN.* row 2;"),
]


@pytest.mark.parametrize(("train", "test", "message"), BAD_PAIRS)
def test_test_sets_that_do_not_fit(source, train, test, message):
    name = source(x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1])
    with pytest.raises(NNTKError, match=message):
        load_dataset(name, train=None, test=None)


def test_only_selected_rows_must_be_finite(source):
    bad = int(shuffled(20, 0, stream=0)[10])
    name = source(x=spoiled(X, (bad, np.nan)), y=Y)
    assert np.isfinite(load_dataset(name, train=10, test=9).train.inputs).all()
    with pytest.raises(NNTKError, match=rf"in 1 of the 11 selected rows, the first of them row {bad};"):
        load_dataset(name, train=11, test=9)


BAD_SIZES = [
    (0, 5, r"data.train is 0; give at least 1"),
    (5, -1, r"data.test is -1; give 0 or more"),
    (15, 6, r"data.train and data.test ask for 15 \+ 6 = 21 examples, but .* has 20 rows; give at most 20"),
    (None, 20, r"ask for 1 \+ 20 = 21 examples, but"),
    (25, None, r"ask for 25 \+ 0 = 25 examples, but"),
    (None, None, r"comes as one set of 20 rows; give data.train or data.test to split it"),
]


@pytest.mark.parametrize(("train", "test", "message"), BAD_SIZES)
def test_bad_sizes(source, train, test, message):
    with pytest.raises(NNTKError, match=message):
        load_dataset(source(x=X, y=Y), train=train, test=test)


@pytest.mark.parametrize(
    ("train", "test", "key"), [(13, 1, "train is 13, but .* x_train has 12"), (1, 9, "test is 9, but .* x_test has 8")]
)
def test_more_than_a_given_set_holds(source, train, test, key):
    name = source(x_train=X[:12], y_train=Y[:12], x_test=X[12:], y_test=Y[12:])
    with pytest.raises(NNTKError, match=rf"data.{key} rows; give at most"):
        load_dataset(name, train=train, test=test)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", r"data.source is 'digits'; write FAMILY:LOCATION with one of sklearn, .*parquet"),
        ("sklean:digits", r"family of data.source is 'sklean'; allowed: sklearn, .*did you mean 'sklearn'\?"),
        ("sklearn:digit", r"data set of sklearn: is 'digit'; allowed: digits, .*did you mean 'digits'\?"),
        ("synthetic:sin", r"function of synthetic: is 'sin'; allowed: sign, .*did you mean"),
    ],
)
def test_unknown_sources(name, message):
    with pytest.raises(NNTKError, match=message):
        load_dataset(name, train=1, test=1)


def test_negative_seed():
    with pytest.raises(NNTKError, match=r"data.seed is -1; give an integer of at least 0"):
        load_dataset("sklearn:iris", train=1, test=1, seed=-1)


@pytest.mark.parametrize("columns", [{"input_columns": ["a"]}, {"target_column": "b"}])
def test_columns_of_sources_without_columns(columns):
    with pytest.raises(ArgumentError, match=r"data source 'sklearn:iris' takes no argument '(input|target)_column"):
        load_dataset("sklearn:iris", train=1, test=1, **columns)


def test_a_row_that_drowns_the_others_is_warned_of(tmp_path):
    inputs = np.linspace(1.0, 2.0, 40).reshape(10, 4)
    inputs[7] *= 1e30
    np.savez(tmp_path / "large.npz", x=inputs, y=np.arange(10) % 2)
    with pytest.warns(
        NNTKWarning, match=r"inputs of .*large.npz.*: row 7 holds numbers up to 1\.79e\+30, .* float32 cann"
    ):
        load_dataset(f"npz:{tmp_path / 'large.npz'}", train=8, test=2)
