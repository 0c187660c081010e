"""From the name of a source to a data set: open, select, label, read, check, normalise. In this order, so that a wrong
size or label costs no reading and only the selected inputs are read.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from nntk_dist.errors import NNTKError, check_choice
from pipeline.data.arrays import open_npz, open_python, open_zarr
from pipeline.data.dataset import Dataset, Split
from pipeline.data.idx import open_idx
from pipeline.data.parquet import open_parquet
from pipeline.data.preparation import check_inputs, encode_targets, fit_normalization, normalized, num_channels
from pipeline.data.scikit_learn import open_sklearn
from pipeline.data.selection import select_rows
from pipeline.data.source import Source
from pipeline.data.synthetic import open_synthetic

FAMILIES: Mapping[str, Callable[[str], Source]] = MappingProxyType(
    {
        "sklearn": open_sklearn,
        "synthetic": open_synthetic,
        "npz": open_npz,
        "idx": open_idx,
        "zarr": open_zarr,
        "python": open_python,
    }
)


def load_dataset(
    source: str,
    *,
    train: int | None,
    test: int | None,
    normalize: bool = True,
    seed: int = 0,
    input_columns: Sequence[str] | None = None,
    target_column: str | None = None,
) -> Dataset:
    """Load a data set: a pure function of its arguments and of what the source holds.

    Args:
        source: `family:location`; the families are those of `FAMILIES` and `parquet`, each described in its own file.
        train: number of training examples, or None for all.
        test: number of test examples, 0 for none, or None for all.
        normalize: subtract one mean and divide by one deviation per channel, of the selected training examples.
        seed: of the selection. An example keeps its id whatever the sizes and the seed.
        input_columns: columns of a Parquet file that hold the inputs (see `open_parquet`).
        target_column: column of a Parquet file that holds the targets.

    Raises:
        NNTKError: an unknown source, data that are missing, damaged, empty, malformed, too few or not finite, or
            columns named for a source that has none.
    """
    found = _open(source, input_columns, target_column)
    train_rows, test_rows = select_rows(found, train=train, test=test, seed=seed)
    train_targets, test_targets, num_classes = encode_targets(found, train_rows, test_rows)
    train_inputs = found.train.read(train_rows)
    check_inputs(train_inputs, train_rows, found.train.name)
    test_set = found.train if found.test is None else found.test
    test_inputs = test_set.read(test_rows) if len(test_rows) else train_inputs[:0]
    if len(test_rows):
        check_inputs(test_inputs, test_rows, test_set.name)
    if test_inputs.shape[1:] != train_inputs.shape[1:]:
        raise NNTKError(
            f"examples of {test_set.name} have shape {test_inputs.shape[1:]}, the training examples "
            f"{train_inputs.shape[1:]}; give both one shape"
        )
    channels = num_channels(train_inputs.shape[1:])
    mean, deviation = fit_normalization(train_inputs) if normalize else (np.zeros(channels), np.ones(channels))
    return Dataset(
        train=Split(train_rows, normalized(train_inputs, mean, deviation), train_targets),
        test=Split(test_rows, normalized(test_inputs, mean, deviation), test_targets),
        num_classes=num_classes,
        mean=mean,
        deviation=deviation,
    )


def _open(source: str, input_columns: Sequence[str] | None, target_column: str | None) -> Source:
    family, colon, location = source.partition(":")
    families = (*FAMILIES, "parquet")
    if not colon:
        raise NNTKError(f"data.source is '{source}'; write FAMILY:LOCATION with one of {', '.join(families)}")
    check_choice("family of data.source", family, families)
    if family == "parquet":
        return open_parquet(location, input_columns, target_column)
    if input_columns is not None or target_column is not None:
        raise NNTKError(
            f"data.input_columns and data.target_column are for parquet:, not for '{source}'; leave them out"
        )
    return FAMILIES[family](location)
