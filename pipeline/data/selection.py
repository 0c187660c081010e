"""Which rows of a source become training and test examples: a pure function of the sizes and the seed.

Training rows are the first and test rows the last of one seeded shuffle, so a larger training set contains a smaller
one (in the same order), and neither size touches the other set.
"""

import numpy as np
from jaxtyping import Int64

from nntk_dist.errors import NNTKError
from pipeline.data.source import Source


def select_rows(
    source: Source, *, train: int | None, test: int | None, seed: int
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]:
    """Rows of the training and the test examples.

    Args:
        source: split as given (its two sets are sampled separately), or one set (split into disjoint parts).
        train: number of training examples, at least 1. None: all given, or all that `test` leaves.
        test: number of test examples, at least 0. None: all given, or all that `train` leaves.
        seed: of the shuffle, not negative.

    Raises:
        NNTKError: a number or seed too small, more examples asked for than there are, or no rows at all.
    """
    if seed < 0:
        raise NNTKError(f"data.seed is {seed}; give an integer of at least 0")
    if train is not None and train < 1:
        raise NNTKError(f"data.train is {train}; give at least 1 training example, or null for all")
    if test is not None and test < 0:
        raise NNTKError(f"data.test is {test}; give 0 or more test examples, or null for all")
    for rows in (source.train, source.test):
        if rows is not None and len(rows.targets) == 0:
            raise NNTKError(f"{rows.name} is empty; give data with at least one row")
    if source.test is None:
        return _split(source.train.name, len(source.train.targets), train, test, seed)
    given = (len(source.train.targets), len(source.test.targets))
    for key, asked, rows, available in (
        ("train", train, source.train, given[0]),
        ("test", test, source.test, given[1]),
    ):
        if asked is not None and asked > available:
            raise NNTKError(f"data.{key} is {asked}, but {rows.name} has {available} rows; give at most {available}")
    return shuffled(given[0], seed, stream=0)[:train], shuffled(given[1], seed, stream=1)[:test]


def _split(
    name: str, available: int, train: int | None, test: int | None, seed: int
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]:
    if train is None and test is None:
        raise NNTKError(f"{name} comes as one set of {available} rows; give data.train or data.test to split it")
    train = available - (test or 0) if train is None else train
    test = available - train if test is None else test
    if train < 1 or test < 0 or train + test > available:
        train, test = max(train, 1), max(test, 0)
        raise NNTKError(
            f"data.train and data.test ask for {train} + {test} = {train + test} examples, "
            f"but {name} has {available} rows; give at most {available} together"
        )
    order = shuffled(available, seed, stream=0)
    return order[:train], order[available - test :]


def shuffled(count: int, seed: int, *, stream: int) -> Int64[np.ndarray, " count"]:
    """A random order of 0 … count-1, the same under every version of NumPy.

    NumPy promises stability for seed sequences and raw words, not for `Generator.permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, stream])).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)
