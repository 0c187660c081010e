"""The sources that need no file: scikit-learn's data sets and the synthetic functions."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import datasets

from pipeline.data import load_dataset

SHAPES = {
    "digits": (1797, (1, 8, 8), 10, 10),
    "iris": (150, (4,), 3, 3),
    "wine": (178, (13,), 3, 3),
    "breast_cancer": (569, (30,), 2, 2),
    "diabetes": (442, (10,), None, 1),
    "linnerud": (20, (3,), None, 3),
}


@pytest.mark.parametrize("name", SHAPES)
def test_scikit_learn(name):
    rows, input_shape, num_classes, num_outputs = SHAPES[name]
    data = load_dataset(f"sklearn:{name}", train=rows - 5, test=5)
    assert (len(data.train.ids), len(data.test.ids)) == (rows - 5, 5)
    assert (data.input_shape, data.num_classes, data.num_outputs) == (input_shape, num_classes, num_outputs)


def test_digits_are_the_pictures_of_scikit_learn():
    data = load_dataset("sklearn:digits", train=1437, test=360, normalize=False)
    original = datasets.load_digits()
    assert_array_equal(data.test.inputs[:, 0] * 16, original.images[data.test.ids])
    assert_array_equal(data.test.targets, original.target[data.test.ids])


FUNCTIONS = {
    "sign": lambda x: 1.0 if x > 0 else -1.0,
    "relu": lambda x: x if x > 0 else 0.0,
    "sine": lambda x: np.sin(2 * np.pi * x),
    "sawtooth": lambda x: 2 * (2 * x - np.floor(2 * x)) - 1,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_synthetic(name):
    data = load_dataset(f"synthetic:{name}", train=4000, test=500, normalize=False, seed=3)
    x, y = data.train.inputs[:, 0].astype(np.float64), data.train.targets[:, 0]
    assert data.input_shape == (1,)
    assert data.num_classes is None
    assert_allclose(y, [FUNCTIONS[name](value) for value in x], atol=1e-12)
    # a uniform sample of [-1, 1]: its mean has the standard error 1/√(3n)
    assert abs(x.mean()) < 4 / np.sqrt(3 * len(x))
    assert x.min() > -1
    assert x.max() < 1
    assert x.max() - x.min() > 1.99
    assert set(data.train.ids).isdisjoint(data.test.ids)


def test_synthetic_points_keep_their_ids_under_every_seed():
    first = load_dataset("synthetic:sine", train=30_000, test=1, normalize=False, seed=0).train
    second = load_dataset("synthetic:sine", train=30_000, test=1, normalize=False, seed=1).train
    common, at_first, at_second = np.intersect1d(first.ids, second.ids, return_indices=True)
    assert len(common) > 1000
    assert_array_equal(first.inputs[at_first], second.inputs[at_second])
