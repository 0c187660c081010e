"""Which rows of a source become training and test examples: a pure function of the sizes and the seed.

Training rows are the first and test rows the last of one seeded shuffle. So a larger training set contains a smaller
one in the same order, and the size of one set does not change the other.

Axes: rows of a source, training and test examples.
"""

import numpy as np
from jaxtyping import Int64

from nntk_dist.errors import ArgumentError, DataError
from pipeline.data.source import Source


def select_rows(
    source: Source, *, train: int | None, test: int | None, seed: int
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]:
    """Choose the rows of the training and the test examples.

    Args:
        source: with two sets, which are sampled separately, or with one, which is split into disjoint parts.
        train: number of training examples, at least 1. None: all, or all that `test` leaves.
        test: number of test examples, at least 0. None: all, or all that `train` leaves.
        seed: of the shuffle, not negative.

    Returns:
        Indices of the training rows and of the test rows.

    Raises:
        ArgumentError: a number or the seed is too small, or more examples are requested than exist.
        DataError: a set has no rows.
    """
    if seed < 0:
        raise ArgumentError(f"data.seed is {seed}; give an integer of at least 0")
    if train is not None and train < 1:
        raise ArgumentError(f"data.train is {train}; give at least 1 training example, or null for all")
    if test is not None and test < 0:
        raise ArgumentError(f"data.test is {test}; give 0 or more test examples, or null for all")
    for rows in (source.train, source.test):
        if rows is not None and len(rows.targets) == 0:
            raise DataError(f"{rows.name} is empty; give data with at least one row")
    if source.test is None:
        return _split(source.train.name, len(source.train.targets), train, test, seed)
    given = (len(source.train.targets), len(source.test.targets))
    for key, asked, rows, available in (
        ("train", train, source.train, given[0]),
        ("test", test, source.test, given[1]),
    ):
        if asked is not None and asked > available:
            raise ArgumentError(
                f"data.{key} is {asked}, but {rows.name} has {available} rows; give at most {available}"
            )
    return shuffled(given[0], seed, stream=0)[:train], shuffled(given[1], seed, stream=1)[:test]


def _split(
    name: str, available: int, train: int | None, test: int | None, seed: int
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]:
    if train is None and test is None:
        raise ArgumentError(f"{name} comes as one set of {available} rows; give data.train or data.test to split it")
    train = available - (test or 0) if train is None else train
    test = available - train if test is None else test
    if train < 1 or test < 0 or train + test > available:
        train, test = max(train, 1), max(test, 0)
        raise ArgumentError(
            f"data.train and data.test ask for {train} + {test} = {train + test} examples, "
            f"but {name} has {available} rows; give at most {available} together"
        )
    order = shuffled(available, seed, stream=0)
    return order[:train], order[available - test :]


def shuffled(count: int, seed: int, *, stream: int) -> Int64[np.ndarray, " count"]:
    """Return a random order of 0 … count-1, the same under every version of NumPy.

    NumPy promises stability for seed sequences and raw words, not for `Generator.permutation`.

    Args:
        count: how many.
        seed: not negative.
        stream: other streams of one seed give independent orders.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, stream])).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)
